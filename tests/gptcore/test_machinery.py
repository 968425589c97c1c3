"""The GPT under PyTorch's own machinery: compiled training steps, wrappers, checkpoints, copies, several processes."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from gptkernels import BackendUnavailableError, available_backends
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gptcore import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=61, context=40, n_layer=2, n_head=2, width=32)
KERNELS = available_backends()
every_kernels = pytest.mark.parametrize("kernels", KERNELS)


def make(device: str, kernels: str = "auto", **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(CONFIG, kernels=kernels, **changes)).to(device)


def batch(device: str, rows: int = 3, tokens: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, CONFIG.vocab_size, (rows, tokens), generator=generator).to(device) for _ in range(2))


def train(model: GPT, loss_of: Callable[..., Tensor], sizes, device: str, compiled: bool = False) -> list[Tensor]:
    """A step of SGD for each size; the losses, then the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    losses = []
    for seed, (rows, tokens) in enumerate(sizes):
        loss = loss_of(*batch(device, rows, tokens, seed))
        loss.backward()
        step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


@every_kernels
def test_a_compiled_training_step_is_the_eager_one(kernels: str, device: str):
    """One graph without breaks from tokens to loss, whose backward is compiled with it, and the optimizer's step another.

    The first size is compiled for itself, the second makes batch and length dynamic, the others are not compiled again.
    """
    torch._dynamo.reset()
    sizes = [(2, 9), (3, 12), (4, 7)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = make(device, kernels, n_layer=1)
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    found = train(model, compiled, sizes, device, compiled=kernels != "triton")
    again = make(device, kernels, n_layer=1)
    for ours, theirs in zip(found, train(again, again.loss, sizes, device)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_inductor_compiles_the_model(device: str):
    """The compiler that users have; kernels it fuses round otherwise, so equality is to the last few bits only."""
    torch._dynamo.reset()
    model = make(device, n_layer=1)  # auto: fused kernels
    x, y = batch(device)
    names, parameters = zip(*model.named_parameters())
    loss = torch.compile(model.loss, fullgraph=True)(x, y)
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(model.loss(x, y), parameters)
    torch.testing.assert_close(loss, model.loss(x, y), rtol=1e-5, atol=1e-6)
    for name, ours, theirs in zip(names, found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@every_kernels
def test_checkpointed_blocks(kernels: str, reentrant: bool, device: str):
    """Blocks computed again in the backward give the same gradients, dropout and all: the masks are the same."""
    x, y = batch(device, rows=2, tokens=5)
    results = []
    for checkpointed in (False, True):
        model = make(device, kernels, dropout=0.3)
        if checkpointed:
            for block in model.h:
                plain = block.forward
                block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=reentrant)
        torch.manual_seed(2)
        model.loss(x, y).backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@every_kernels
def test_copies(kernels: str, device: str):
    model = make(device, kernels)
    x, y = batch(device, tokens=9)
    expected = model.loss(x, y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.loss(x, y), expected)
        assert other.config == model.config
        with torch.no_grad():
            other.wte.weight.zero_()
    assert torch.equal(model.loss(x, y), expected)


def test_made_on_the_meta_device_then_materialised(device: str):
    ids = [t.to("meta") for t in batch(device)]
    with torch.device("meta"):
        model = GPT(CONFIG)
        assert model.loss(*ids).device.type == "meta"
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():  # what memory may hold
            parameter.fill_(torch.nan)
    torch.manual_seed(5)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    norms = [m for m in model.modules() if type(m).__name__ == "LayerNorm"]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    assert float(model.wte.weight.std()) == pytest.approx(0.02, rel=0.1)


def test_without_values_the_shapes_come_out():
    """Fake tensors: what memory estimates and the compiler's front run on."""
    with FakeTensorMode():
        model = GPT(dataclasses.replace(CONFIG, kernels="reference"))
        ids = torch.zeros(2, 5, dtype=torch.long)
        model.loss(ids, ids).backward()
        assert model(ids).shape == (2, 5, CONFIG.vocab_size)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@every_kernels
def test_functional_call(kernels: str, device: str):
    model = make(device, kernels)
    x, y = batch(device, tokens=9)
    other = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, other, (x,), {"targets": y})
    with torch.no_grad():
        expected = copy.deepcopy(model)
        expected.load_state_dict(other)
        assert torch.equal(found, expected.loss(x, y))
        assert not torch.equal(found, model.loss(x, y))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of its own attention under vmap
def test_gradients_of_each_sequence(device: str):
    """vmap over grad over functional_call: auto computes it in plain PyTorch, fused kernels named explicitly refuse."""
    model = make(device)
    x, y = batch(device, tokens=9)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def each(model: GPT) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x[None],), {"targets": y[None]})

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)

    found = each(model)
    for row in range(len(x)):
        grads = torch.autograd.grad(model.loss(x[row : row + 1], y[row : row + 1]), list(model.parameters()))
        for (name, ours), theirs in zip(found.items(), grads):
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(BackendUnavailableError, match=r"use 'auto' or 'reference'"):
        each(make(device, next(k for k in KERNELS if k != "reference")))


@every_kernels
def test_exported_for_any_batch_and_length(kernels: str, device: str):
    model = make(device, kernels).eval()
    sizes = {"tokens": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=40)}}
    program = torch.export.export(model, (batch(device, tokens=9)[0],), dynamic_shapes=sizes)
    other = batch(device, rows=2, tokens=12, seed=3)[0]
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-6)


@every_kernels
def test_inference_mode(kernels: str, device: str):
    model = make(device, kernels)
    x, y = batch(device, rows=2, tokens=5)
    with torch.inference_mode():
        logits, loss, ids = model(x), model.loss(x, y), model.generate(x[:1], 2, temperature=0.0)
    assert torch.equal(logits, model(x))
    assert torch.equal(loss, model.loss(x, y))
    assert torch.equal(ids, model.generate(x[:1], 2, temperature=0.0))
    model.loss(x, y).backward()  # nothing was left in inference mode


def test_targets_alone():
    model = make("cpu", "reference")
    x, y = batch("cpu")
    assert torch.equal(model(x, targets=y), model.loss(x, y))
    with pytest.raises(ValueError, match="targets: got them with a cache or return_attention"):
        model(x, model.new_cache(), targets=y)
    with pytest.raises(ValueError, match="targets: got them with a cache or return_attention"):
        make("cpu", "reference", attention_impl="explicit")(x, targets=y, return_attention=True)


@pytest.mark.parametrize(("size", "device"), [(2, "cpu"), pytest.param(1, "cuda", marks=pytest.mark.gpu)])
def test_several_processes_train_what_one_trains(size: int, device: str, tmp_path: Path):
    """DistributedDataParallel and FSDP2 over gloo and NCCL: three steps each, then an orderly end, exit code and all."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # FSDP warns of PyTorch's own products, whose results are views.
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", "tests.gptcore.processes", str(tmp_path / "store")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(size), device],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, said):
        assert worker.returncode == 0, output
        assert [line for line in output.splitlines() if line.endswith(" equal")] == ["ddp equal", "fsdp equal"], output


@pytest.mark.gpu
def test_a_captured_training_step_replays():
    """Forward, loss, backward and AdamW as one CUDA graph: replayed over new batches it trains what eager steps train."""

    def make_step(model: GPT, tokens: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True, fused=True)

        def step() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model.loss(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    batches = [batch("cuda", seed=seed) for seed in range(6)]
    eager = make("cuda", "triton")
    static = tuple(t.clone() for t in batches[0])
    eager_step = make_step(eager, *static)
    graphed = make("cuda", "triton")
    captured_step = make_step(graphed, *static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured_step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        eager_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured_step()
    for x, y in batches[1:]:
        static[0].copy_(x)
        static[1].copy_(y)
        graph.replay()
        assert torch.equal(loss, eager_step())
    assert all(torch.equal(a, b) for a, b in zip(graphed.parameters(), eager.parameters()))
