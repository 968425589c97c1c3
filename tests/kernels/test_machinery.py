"""Every operation under PyTorch's own machinery: compiler, export, autocast, checkpoints, torch.func, inference mode, threads."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gptkernels
import gptkernels.nn
import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from gptkernels import BackendUnavailableError
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, Case, Inputs, OpSpec, outputs, random_grads, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The one case of each operation that these tests are about; "33x17" where nothing is said.
CASES = {
    "attention": "B2-H2-T40-D24-causal-packed",
    "attention_varlen": "T37+1+20-H2-D16",
    "linear": "7x40-N64",
    "rotary": "B2-H3-T19-D64",
    "linear_cross_entropy": "33-C16-V17-bias-sum",
}
BACKENDS = [name for name in gptkernels.available_backends() if name != "reference"]


def representative(spec: OpSpec) -> Case:
    return next(case for case in spec.cases if case.name == CASES.get(spec.name, "33x17"))


EVERY_OP = [
    pytest.param(spec, name, id=f"{spec.name}-{name}")
    for spec in SPECS
    for name in BACKENDS
    if name in FUSED[spec.name]
]
every_op = pytest.mark.parametrize(("spec", "backend"), EVERY_OP)


def drawn(spec: OpSpec, device: str, seed: int, case: Case | None = None) -> Inputs:
    return spec.make_inputs(case or representative(spec), torch.float32, torch.device(device), seed)


def called(spec: OpSpec, backend: str | None) -> Callable[..., Any]:
    return lambda **kwargs: spec.function(**kwargs, backend=backend)


def grads_for(spec: OpSpec, inputs: Inputs) -> tuple[Tensor, ...]:
    return random_grads(spec.reference(**inputs.tensors, **inputs.options), 0)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def resized(case: Case, step: int) -> Case:
    """`case` with another number of rows or tokens, and of sequences for attention, for each `step`."""
    p, count = case.parameters, 20 + 3 * step
    if "batch" in p:
        changes: dict[str, Any] = {"batch": 2 + step} | {
            name: count - 11 for name in ("queries", "keys", "tokens") if name in p
        }
    elif isinstance(p.get("lengths"), tuple):
        changes = {"lengths": tuple((queries + step, keys + step) for queries, keys in p["lengths"])}
    else:
        name = next(name for name in ("shape", "tokens", "rows") if name in p)
        changes = {name: (count, *p[name][1:])}
    return dataclasses.replace(case, parameters={**p, **changes})


@every_op
def test_one_dynamic_graph_serves_every_size(spec: OpSpec, backend: str, device: str):
    """The first size gets a static graph, the second makes it dynamic, the others reuse that; all equal eager."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(called(spec, backend), fullgraph=True, backend=counter)
    for step in (0, 1, 3, 2):
        inputs = drawn(spec, device, step, resized(representative(spec), step))
        grads = grads_for(spec, inputs)
        assert_same(run(compiled, inputs, grads), run(called(spec, backend), inputs, grads))
    assert counter.frame_count <= 2


@every_op
def test_exported_program(spec: OpSpec, backend: str, device: str):
    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor | None]) -> Any:
            return spec.function(**tensors, **inputs.options, backend=backend)

    inputs = drawn(spec, device, 1)
    program = torch.export.export(Module(), (inputs.tensors,))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(op.startswith(f"gptkernels_{backend}.") for op in ops)
    other = drawn(spec, device, 2)
    for ours, theirs in zip(outputs(program.module()(other.tensors)), outputs(Module()(other.tensors))):
        assert torch.equal(ours, theirs)


def _plain(name: str) -> Callable[..., Any]:
    """PyTorch's own operation, called in the usual way."""

    def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight=None, bias=None: function(
            x,
            x.shape[-1:],
            *(p if p is None else p.to(x.dtype) for p in (weight, bias)[: 1 + (function is F.layer_norm)]),
        )

    def add_norm(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        def added(x: Tensor, residual: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor]:
            return norm(function)(x + residual, **parameters), x + residual

        return added

    return {
        "layer_norm": norm(F.layer_norm),
        "add_layer_norm": add_norm(F.layer_norm),
        "rms_norm": norm(F.rms_norm),
        "add_rms_norm": add_norm(F.rms_norm),
        "softmax": lambda x, dim, **_: F.softmax(x, dim),
        "attention": lambda query, key, value, **_: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "linear": F.linear,
        "gelu": lambda x, bias, **_: F.gelu(x + bias.to(x.dtype), approximate="tanh"),
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "cross_entropy": lambda logits, target, **_: F.cross_entropy(logits, target),
        "linear_cross_entropy": lambda x, weight, target, bias, **_: F.cross_entropy(F.linear(x, weight, bias), target),
    }[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch casts by other lists on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_op
def test_autocast_gives_the_dtype_of_the_operation_it_replaces(spec: OpSpec, backend: str, dtype: torch.dtype):
    """On a CPU, operation by operation.

    Products (`linear`, `attention`) come out in autocast's dtype. What moves memory (norms, softmax, activations) keeps
    its input's: PyTorch's CPU lists leave them alone. Losses are float32. On a GPU PyTorch widens norms, softmax and
    losses to float32; here norms and softmax stay in their input's dtype there as well: their statistics are float32
    anyway, and a widened result would only be narrowed by the next product.
    """
    inputs = spec.make_inputs(representative(spec), dtype, torch.device("cpu"), 0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs(spec.function(**inputs.tensors, **inputs.options, backend=backend))
        if spec.name in UNREPLACED:
            assert [out.dtype for out in ours] == [UNREPLACED[spec.name] or dtype]
            return
        theirs = outputs(_plain(spec.name)(**inputs.tensors, **inputs.options))
    assert [out.dtype for out in ours] == [out.dtype for out in theirs]


# PyTorch has no such operation: packed attention is a product, rotary moves memory and keeps the input's dtype.
UNREPLACED = {"attention_varlen": torch.bfloat16, "rotary": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU's autocast")
@every_op
def test_autocast_gives_the_gradients_of_its_casts(spec: OpSpec, backend: str):
    """The gradients of float32 leaves are float32, and as close to the reference's as bfloat16 allows."""
    inputs = drawn(spec, "cpu", 0)
    with torch.autocast("cpu", torch.bfloat16):
        grads = random_grads(spec.reference(**inputs.tensors, **inputs.options), 0)
        ours = run(called(spec, backend), inputs, grads)
        theirs = run(spec.reference, inputs, grads)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.02 * scale, msg=name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@every_op
def test_activation_checkpointing(spec: OpSpec, backend: str, reentrant: bool, device: str):
    inputs = drawn(spec, device, 4)
    grads = grads_for(spec, inputs)

    def gradients(through: Callable[..., Any]) -> dict[str, Tensor]:
        leaves = inputs.mapped(lambda t: t.detach().clone().requires_grad_())
        names, tensors = zip(*leaves.differentiable().items())

        def function(*args: Tensor) -> Any:
            return spec.function(**(leaves.tensors | dict(zip(names, args))), **leaves.options, backend=backend)

        # .backward and not autograd.grad: the reentrant form knows no other.
        torch.autograd.backward(outputs(through(function, *tensors)), grads)
        return {name: tensor.grad for name, tensor in leaves.differentiable().items() if tensor.grad is not None}

    plain = gradients(lambda function, *args: function(*args))
    assert len(plain) == len(inputs.differentiable())
    assert_same(gradients(lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)), plain)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of its own attention under vmap
@every_op
def test_torch_func_takes_the_reference_or_says_why_not(spec: OpSpec, backend: str, device: str):
    """ "auto" differentiates and batches as plain PyTorch does; an explicit fused backend raises an error."""
    inputs = drawn(spec, device, 5)
    names, tensors = zip(*inputs.differentiable().items())

    def total(backend: str | None) -> Callable[..., Tensor]:
        def function(*args: Tensor) -> Tensor:
            outs = outputs(
                spec.function(**(inputs.tensors | dict(zip(names, args))), **inputs.options, backend=backend)
            )
            return torch.stack([out.square().sum() for out in outs]).sum()

        return function

    every = tuple(range(len(tensors)))
    batch = [torch.stack([t, 0.5 * t]) for t in tensors]
    expected = torch.func.grad(total("reference"), every)(*tensors)
    for ours, theirs in zip(torch.func.grad(total(None), every)(*tensors), expected):
        torch.testing.assert_close(ours, theirs)
    each = torch.stack([total("reference")(*tensors), total("reference")(*(0.5 * t for t in tensors))])
    torch.testing.assert_close(torch.func.vmap(total(None))(*batch), each)
    for transformed, arguments in (
        (torch.func.grad(total(backend)), tensors),
        (torch.func.vmap(total(backend)), batch),
    ):
        for recording in (True, False):
            with torch.set_grad_enabled(recording), pytest.raises(BackendUnavailableError, match=r"torch\.func"):
                transformed(*arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the kernels run for one gradient after the other
@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
@pytest.mark.parametrize(
    ("spec", "backend"), [p for p in EVERY_OP if p.values[1] == BACKENDS[-1] or "cross_entropy" in p.values[0].name]
)
def test_gradients_in_batches(spec: OpSpec, backend: str, create_graph: bool, device: str):
    """``is_grads_batched``: several vectors times one Jacobian; afterwards the graph still serves a single vector."""
    leaves = drawn(spec, device, 8).mapped(lambda t: t.detach().requires_grad_())
    tensors = list(leaves.differentiable().values())
    outs = outputs(spec.function(**leaves.tensors, **leaves.options, backend=backend))
    first, second = (
        grads_for(spec, leaves),
        tuple(-0.5 * g.flip(0) if g.dim() else 3 * g for g in grads_for(spec, leaves)),
    )
    batch = [torch.stack(pair) for pair in zip(first, second)]
    options = {"retain_graph": True, "create_graph": create_graph}
    found = torch.autograd.grad(outs, tensors, batch, is_grads_batched=True, **options)
    for i, grads in enumerate((first, second)):
        for ours, theirs in zip(found, torch.autograd.grad(outs, tensors, grads, retain_graph=True)):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-5)


@every_op
def test_forward_mode_is_an_error_and_not_a_lost_tangent(spec: OpSpec, backend: str, device: str):
    inputs = drawn(spec, device, 6)
    with forward_ad.dual_level():
        dual = inputs.mapped(lambda t: forward_ad.make_dual(t, torch.ones_like(t)))
        for recording in (True, False):
            with torch.set_grad_enabled(recording), pytest.raises(BackendUnavailableError, match="forward-mode"):
                spec.function(**dual.tensors, **dual.options, backend=backend)


@every_op
def test_inference_mode(spec: OpSpec, backend: str, device: str):
    inputs = drawn(spec, device, 7)
    expected = outputs(spec.function(**inputs.tensors, **inputs.options, backend=backend))
    with torch.inference_mode():
        made_inside = inputs.mapped(torch.clone)
        for given in (inputs, made_inside):
            outs = outputs(spec.function(**given.tensors, **given.options, backend=backend))
            assert all(out.is_inference() for out in outs)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs, expected))


@pytest.mark.skipif("native" not in BACKENDS, reason="the native kernels run on the CPU")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "native" in FUSED[spec.name]], ids=lambda spec: spec.name)
def test_threads_do_not_disturb_each_other(spec: OpSpec):
    """Four Python threads at once, with different numbers, get the results that they get one after another."""
    jobs = []
    for seed in range(4):
        inputs = drawn(spec, "cpu", seed)
        jobs.append((inputs, grads_for(spec, inputs)))
    expected = [run(called(spec, "native"), *job) for job in jobs]
    start = threading.Barrier(len(jobs))

    def work(job: tuple[Inputs, tuple[Tensor, ...]]) -> list[dict[str, Tensor]]:
        start.wait(timeout=30)
        return [run(called(spec, "native"), *job) for _ in range(10)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(work, jobs))
    for results, one in zip(found, expected):
        for result in results:
            assert_same(result, one)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native kernels run on the CPU")
def test_threads_may_meet_at_first_use(monkeypatch: pytest.MonkeyPatch):
    """The first thread prepares the extension; the others wait for it."""
    from gptkernels import _native

    assert _native.load() is None
    level = _native.loaded()
    monkeypatch.setattr(_native, "_loaded", None)
    start = threading.Barrier(4)

    def first_use(_: int) -> tuple[str | None, Tensor]:
        start.wait(timeout=30)
        return _native.load(), gptkernels.softmax(torch.zeros(2, 2), backend="native")

    with ThreadPoolExecutor(4) as pool:
        for failure, out in pool.map(first_use, range(4)):
            assert failure is None
            assert torch.equal(out, torch.full((2, 2), 0.5))
    assert _native.loaded() == level


MODULES = [
    pytest.param(lambda: gptkernels.nn.LayerNorm(16), id="LayerNorm"),
    pytest.param(lambda: gptkernels.nn.RMSNorm(16), id="RMSNorm"),
    pytest.param(lambda: gptkernels.nn.Softmax(dim=-1), id="Softmax"),
    pytest.param(lambda: gptkernels.nn.GELU(), id="GELU"),
    pytest.param(lambda: swapped(torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.GELU())), id="swapped"),
]


def swapped(model: torch.nn.Module) -> torch.nn.Module:
    gptkernels.replace_modules(model)
    return model


@pytest.mark.parametrize("make", MODULES)
def test_modules_are_copied_pickled_compiled_and_called_functionally(make: Callable[[], torch.nn.Module], device: str):
    module, x = make().to(device), torch.randn(5, 16, device=device)
    with torch.no_grad():
        for parameter in module.parameters():  # off their initial values, or a copy without them would not show
            parameter.add_(torch.randn_like(parameter))
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), compiled]
    for other in copies:
        assert torch.equal(other(x), expected)
    other = {name: 0.5 * p.detach() for name, p in module.named_parameters()}
    found = torch.func.functional_call(module, other, (x,))
    with torch.no_grad():
        for copied in copies[:2]:
            copied.load_state_dict(other)
            assert torch.equal(copied(x), found)
    assert torch.equal(module(x), expected)
