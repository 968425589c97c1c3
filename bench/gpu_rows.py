"""What `bench.gpu` times: the rows of each group, with their contenders, their least work and their goals."""

from __future__ import annotations

import gc
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, Case, Inputs, OpSpec, outputs
from torch import Tensor

from bench import rows
from bench.measure import BF16, CapturedGraph, ceilings, device, in_turns, verify
from bench.peers import peers

ROW_SECONDS, STEP_SECONDS = 1.0, 5.0  # how long an operation's row, and a row of training steps, is timed
ROUNDS = 30  # at most
COPY, PRODUCTS = "copy of as many bytes", "three products"
YARDSTICKS = (COPY, PRODUCTS)  # contenders that only goals are compared with; no peers
LATE = ("compile", "flex")  # peers that take many seconds to compile: timed after everything else

# TFLOP/s of causal attention by direction, head_dim and tokens: the best of FlashAttention-3, TLX and cuDNN, or better.
GOALS = {
    ("forward", 64): {1024: 330, 2048: 400, 4096: 460, 8192: 500},
    ("backward", 64): {1024: 300, 2048: 370, 4096: 420},
    ("forward", 128): {1024: 367, 2048: 568, 4096: 667, 8192: 685},
}
TOKENS_PER_SECOND = 550_000  # of GPT-2 124M's training step


@dataclass(frozen=True)
class Goal:
    """A least speed of a row: in TFLOP/s or tokens/s, or as a multiple of the speed of other contenders."""

    value: float
    unit: str
    """"TFLOP/s", "tokens/s", or how the names of the other contenders begin, of which the fastest counts."""


@dataclass
class Row:
    """The contenders for the same work. Of those whose names begin with "ours", the fastest counts."""

    name: str
    contenders: dict[str, Callable[[], Any]]
    dtype: torch.dtype
    flops: float = 0.0
    moved: float = 0.0
    """The fewest bytes that the work must move."""
    tokens: int = 0
    goals: tuple[Goal, ...] = ()
    expected: float | None = None
    """Seconds that bench.expected predicts for an H100."""
    wall: bool = False
    """Measure the time from queueing to the end of the work, not the GPU's alone."""
    seconds: float = ROW_SECONDS
    """How long to time."""
    refused: dict[str, str] = field(default_factory=dict)
    """Peers that failed or computed something else, and why."""

    def measure(self, ceiling: tuple[float, float], rounds: int) -> dict[str, Any]:
        """Times the row. `ceiling`: bytes and FLOPs a second that this machine reaches at best."""
        medians = in_turns(self.contenders, rounds, self.seconds, wall=self.wall)
        mine = [name for name in medians if name.startswith("ours")]
        others = [name for name in medians if name not in mine and name not in YARDSTICKS]
        ours, best = (min(names, key=lambda name: medians[name], default="") for names in (mine, others))
        seconds = medians[ours]
        bandwidth, rate = ceiling
        shares = {"TFLOP/s": self.flops / seconds / rate, "GB/s": self.moved / seconds / bandwidth}
        bound = max(shares, key=shares.__getitem__)
        rates = {"TFLOP/s": self.flops / seconds / 1e12, "GB/s": self.moved / seconds / 1e9}
        rates["tokens/s"] = self.tokens / seconds
        unit = "tokens/s" if self.tokens else bound
        return {
            "name": self.name,
            "medians": medians,
            "ours": ours,
            "best_peer": best,
            "rate": rates[unit],
            "unit": unit,
            "share_of_ceiling": shares[bound],
            "expected": self.expected,
            "goals": [self._judged(goal, medians, seconds, rates) for goal in self.goals],
            "refused": self.refused,
        }

    def _judged(self, goal: Goal, medians: dict[str, float], seconds: float, rates: dict[str, float]) -> dict[str, Any]:
        """The goal and whether it is met; None where none of the contenders that it names was timed."""
        if goal.unit in rates:
            reached = rates[goal.unit]
        else:
            named = [median for name, median in medians.items() if name.startswith(goal.unit)]
            reached = min(named) / seconds if named else None
        return {"value": goal.value, "unit": goal.unit, "met": None if reached is None else reached >= goal.value}


@dataclass(frozen=True)
class Plan:
    """Where to run and at which sizes.

    `dry`: run every contender once at tiny sizes, on any machine. `quick`: leave out contenders that take long to compile.
    """

    dry: bool = False
    quick: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(device())

    @property
    def backend(self) -> str:
        return "auto" if self.dry else "triton"

    @property
    def rounds(self) -> int:
        return 1 if self.dry else ROUNDS

    def ceiling(self, dtype: torch.dtype) -> tuple[float, float]:
        return (1e9, 1e9) if self.dry else ceilings(dtype)

    def specs(self, group: str) -> list[OpSpec]:
        return [spec for spec in rows.specs_of(group) if self.dry or "triton" in FUSED[spec.name]]

    def cases(self, spec: OpSpec) -> tuple[Case, ...]:
        if not self.dry:
            return spec.bench_cases
        return tuple(case for case in spec.cases if spec.cost(case, BF16).forward_flops >= 1000)[:1]


def goals(name: str, case: Case, direction: str) -> tuple[Goal, ...]:
    """An operation's goals for one case and direction: the least that is accepted, then what we aim at."""
    p = case.parameters
    if name == "attention" and p["is_causal"] and p["queries"] == p["keys"] and not (p["window"] or p["dropout_p"]):
        aim = GOALS.get((direction, p["head_dim"]), {}).get(p["queries"])
        return (Goal(1.0, "sdpa flash"), *([Goal(aim, "TFLOP/s")] if aim else []))
    if name in ("layer_norm", "rms_norm", "softmax", "gelu", "swiglu"):
        columns, elements = p["shape"][-1], math.prod(p["shape"])
        if direction == "forward" and columns >= 1024 and elements >= 32_768 * 1024 and p.get("dim", -1) == -1:
            return (Goal(0.95, COPY),)
        return (Goal(0.8, COPY),) if name == "layer_norm" and direction == "backward" and columns >= 4096 else ()
    if name == "cross_entropy" and p["shape"][-1] >= 50_000:
        return (Goal(0.9, COPY),)
    return (Goal(1 / 1.1, PRODUCTS),) if name == "linear_cross_entropy" else ()


def _pointless(spec: OpSpec, case: Case, peer: str) -> bool:
    """Whether a peer of attention would cost minutes and tell nothing new.

    These are attention that holds all scores; with dropout each of SDPA's backends, for all run the same plain PyTorch; and
    FlexAttention, which is compiled for each shape, at most lengths.
    """
    if spec.name != "attention":
        return False
    p = case.parameters
    if peer == "flex":
        return bool(p["dropout_p"]) or not (p["window"] or (p["is_causal"] and p["queries"] in (1024, 4096)))
    return peer in ("composed", "compile") or (bool(p["dropout_p"]) and peer.startswith("sdpa"))


def _agree(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raises an `AssertionError` if a peer's result differs from ours by more than rounding explains."""
    distance = torch.linalg.vector_norm(theirs.float() - ours.float())
    size = torch.linalg.vector_norm(ours.float())
    assert bool(distance <= 0.05 * size), f"{what}: differs from ours by {float(distance / size):.3g} of its size"


def op_rows(spec: OpSpec, case: Case, plan: Plan, late: bool = False) -> Iterator[Row]:
    """The rows of one case: one for each of `rows.directions`.

    Peers that take long to compile take part only if `late`; a case without such peers then has no rows.
    """
    torch._dynamo.reset()  # without it torch.compile silently runs the ninth shape eagerly
    found = peers(spec, "cuda", compiled=not plan.dry)
    wanted = [name for name in found if plan.dry or not _pointless(spec, case, name)]
    if not late:
        wanted = [name for name in wanted if name not in LATE]
    elif not set(wanted) & set(LATE):
        return
    inputs = spec.make_inputs(case, BF16, plan.device, 0)
    ours = partial(spec.function, backend=plan.backend)
    verify(spec, ours, inputs)
    _free_memory()
    leaves = rows.with_gradients(inputs)
    timed: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in rows.directions(spec)}
    refused: dict[str, str] = {}
    grad_outs: tuple[Tensor, ...] = ()
    results: tuple[Tensor, ...] = ()  # ours: the outputs and the gradients

    def add(name: str, function: Callable[..., Any]) -> None:
        nonlocal grad_outs, results
        outs = outputs(function(**leaves.tensors, **leaves.options))
        grad_outs = grad_outs or rows.output_gradients(spec, outs)
        calls = rows.calls(function, leaves, outs, grad_outs)
        found = *(out.detach() for out in outs), *calls["backward"]()
        results = results or found
        for mine, theirs in zip(results, found):
            _agree(mine, theirs, "outputs and gradients")
        for direction, contenders in timed.items():
            contenders[name] = calls[direction]

    add("ours", ours)
    for name in wanted:
        try:
            add(name, found[name])
        except Exception as error:  # a peer that fails must not stop the bench
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            if "out of memory" in refused[name]:
                _free_memory()
    del results
    bandwidth, rate = plan.ceiling(BF16)
    for direction, contenders in timed.items():
        flops, moved = rows.work(spec, case, BF16, direction)
        if spec.name == "linear_cross_entropy":
            contenders[PRODUCTS] = _three_products(leaves)
        elif moved / bandwidth > flops / rate:
            contenders[COPY] = _copy(int(moved), plan.device)
        yield Row(
            rows.row_name(spec, case, BF16, direction),
            contenders,
            BF16,
            flops,
            moved,
            goals=goals(spec.name, case, direction),
            expected=_predicted(plan, lambda expected, which=direction: expected.seconds(spec, case, BF16, which)),
            refused=refused,
        )


def _predicted(plan: Plan, ask: Callable[[Any], float | None]) -> float | None:
    """The seconds that `ask` gets from the module bench.expected; None without a prediction.

    A prediction that fails is printed and does not stop the bench.
    """
    if plan.dry:
        return None
    try:
        return ask(importlib.import_module("bench.expected"))
    except Exception as error:
        print(f"no prediction ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        return None


def _copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves `moved` bytes, half of them read and half written."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device).random_()
    return partial(torch.empty_like(source).copy_, source)


def _three_products(leaves: Inputs) -> Callable[[], Any]:
    """The three matrix products that the loss of a linear layer needs: the logits and both gradients."""
    x, weight = (leaves.differentiable()[name].detach() for name in ("x", "weight"))
    x = x.flatten(0, -2)
    logits = x @ weight.T
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def products() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_x)
        torch.mm(logits.T, x, out=grad_weight)

    return products


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def training_rows(plan: Plan) -> Iterator[Row]:
    """GPT-2 124M's training step: the same row again after each contender is ready, those that compile longest last.

    A run that is cut therefore keeps the contenders that were ready.
    """
    from gptcore import GPT, GPTConfig

    batch, preset, changes = (2, "tiny", {"vocab_size": 61}) if plan.dry else (16, "gpt2-124m", {})
    context = GPTConfig.preset(preset).context
    tokens = torch.randint(0, changes.get("vocab_size", 50257), (2, batch, context), device=plan.device)
    ours: Any = "auto" if plan.dry else "triton"
    with torch.device("meta"):
        flops = GPT(GPTConfig.preset(preset, **changes)).flops((batch, context))
    contenders: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    refused: dict[str, str] = {}

    def add(name: str, kernels: Any, *, compiled: bool = False, graphed: bool = False, sdpa: Any = None) -> None:
        torch.manual_seed(0)
        with plan.device:  # initialises the weights on the GPU
            model = GPT(GPTConfig.preset(preset, kernels=kernels, **changes))

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return model.loss(x, y)

        if compiled:
            # torch.compile caches by code object: a copy keeps contenders from running each other's compiled code.
            loss_of.__code__ = loss_of.__code__.replace(co_name="loss_of_" + name.replace(", ", "_").replace(" ", "_"))
            loss_of = torch.compile(loss_of, fullgraph=True, backend="eager" if plan.dry else "inductor")
        # `capturable` keeps AdamW's step count on the GPU, as a CUDA graph needs it.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=graphed)

        def step() -> Tensor:
            # Autocast's cache of cast weights would keep those of the capture.
            with torch.autocast(plan.device.type, BF16, cache_enabled=not graphed), pinned_sdpa(sdpa):
                loss = loss_of(tokens[0], tokens[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        losses[name] = loss = float(step())
        assert abs(loss - losses["eager"]) < 0.02, f"the first loss is {loss}, eager's {losses['eager']}"
        contenders[name] = CapturedGraph(step) if graphed else step

    def row() -> Row:
        return Row(
            f"GPT {preset} training step, bf16 autocast, B{batch} T{context}",
            dict(contenders),
            BF16,
            flops,
            tokens=batch * context,
            goals=(Goal(1.0, "compile"), Goal(TOKENS_PER_SECOND, "tokens/s")),
            expected=_predicted(plan, lambda expected: expected.training_seconds()),
            wall=True,
            seconds=STEP_SECONDS,
            refused=refused,
        )

    add("eager", "reference")
    add("ours", ours)
    yield row()
    kinds = torch.nn.attention.SDPBackend
    later: dict[str, dict[str, Any]] = {
        "eager, sdpa cudnn": {"kernels": "reference", "sdpa": kinds.CUDNN_ATTENTION},
        "ours, CUDA graph": {"kernels": ours, "graphed": True},
        "compile, sdpa cudnn": {"kernels": "reference", "compiled": True, "sdpa": kinds.CUDNN_ATTENTION},
        "compile, sdpa flash": {"kernels": "reference", "compiled": True, "sdpa": kinds.FLASH_ATTENTION},
        "ours, compile": {"kernels": ours, "compiled": True},
    }
    for name, how in later.items():
        if plan.quick and how.get("compiled"):
            continue
        try:
            add(name, **how)
        except Exception as error:  # a contender that fails must not stop the others
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            _free_memory()
            continue
        yield row()


def pinned_sdpa(backend: Any) -> AbstractContextManager[object]:
    """Restricts `scaled_dot_product_attention` to one of its backends; None leaves the choice to PyTorch.

    The backward uses the backend of its forward, also outside this context.
    """
    return nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend)


def memory(plan: Plan) -> dict[str, int]:
    """Peak bytes that the loss of a linear layer allocates without its gradients: plain PyTorch's, and ours."""
    spec = next(spec for spec in SPECS if spec.name == "linear_cross_entropy")
    inputs = spec.make_inputs(plan.cases(spec)[-1], BF16, plan.device, 0)
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    taken = {}
    for name, function in (("eager", spec.reference), ("ours", partial(spec.function, backend=plan.backend))):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = function(**leaves.tensors, **leaves.options)
        grads = torch.autograd.grad(loss, list(leaves.differentiable().values()))
        taken[name] = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
        del loss, grads
    return taken


GROUPS = ("attention", "training", "norms", "losses", "softmax", rows.OTHERS)
"""What matters most comes first."""


def measured(group: str, plan: Plan, late: bool = False) -> Iterator[dict[str, Any]]:
    """A group's rows, timed one after another; ``{"failed": name, "why": ...}`` for one that could not be timed.

    `late`: only rows with peers that take long to compile, this time with those peers.
    """
    import torch._functorch.config as compiler

    compiler.donated_buffer = False  # a compiled backward can then be run more than once
    if group == "training":
        sources: list[tuple[str, Callable[[], Iterator[Row]]]] = [] if late else [("GPT", partial(training_rows, plan))]
    else:
        sources = [
            (f"{spec.name} {case.name}", partial(op_rows, spec, case, plan, late))
            for spec in plan.specs(group)
            for case in plan.cases(spec)
        ]
    for name, rows_of in sources:
        try:
            for row in rows_of():
                yield row.measure(plan.ceiling(row.dtype), plan.rounds)
        except Exception as error:
            yield {"failed": name, "why": f"{type(error).__name__}: {error}".strip()[:400]}
        _free_memory()
    if group == "losses" and not late and plan.device.type == "cuda":
        yield {"memory": memory(plan)}
