"""What `bench.gpu` times: the rows of each group, their contenders, what they cost at least, and what they are held to."""

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
from gptkernels.testing import SPECS, Case, OpSpec, outputs, random_grads
from torch import Tensor

from bench.measure import BF16, ceilings, device, in_turns, short, verify
from bench.peers import peers

ROW_SECONDS, STEP_SECONDS = 1.0, 5.0  # of timing for a row of an operation, and for training steps
ROUNDS = 30  # at most
COPY, PRODUCTS = "copy of as many bytes", "three products"
YARDSTICKS = (COPY, PRODUCTS)  # timed in turns with the others, and no peers
LATE = ("compile", "flex")  # peers that take many seconds to compile: they come when everything else has been timed

# TFLOP/s of causal attention by head_dim and tokens. FlashAttention-3's, TLX's and cuDNN's best, or better.
GOALS = {
    ("forward", 64): {1024: 330, 2048: 400, 4096: 460, 8192: 500},
    ("backward", 64): {1024: 300, 2048: 370, 4096: 420},
    ("forward", 128): {1024: 367, 2048: 568, 4096: 667, 8192: 685},
}
TOKENS_PER_SECOND = 550_000  # of GPT-2 124M's training step


@dataclass(frozen=True)
class Goal:
    """What a row is held to: `unit` is TFLOP/s, tokens/s, or what contenders' names begin with: times the fastest's speed."""

    value: float
    unit: str


@dataclass
class Row:
    """A job: its contenders, of which the fastest "ours" counts as ours, and what it costs at least."""

    name: str
    contenders: dict[str, Callable[[], Any]]
    dtype: torch.dtype
    flops: float = 0.0
    moved: float = 0.0  # bytes
    tokens: int = 0
    goals: tuple[Goal, ...] = ()
    expected: float | None = None  # seconds on an H100, by bench.expected
    wall: bool = False
    seconds: float = ROW_SECONDS
    refused: dict[str, str] = field(default_factory=dict)  # peers that did not run or disagreed: why

    def measure(self, ceiling: tuple[float, float], rounds: int) -> dict[str, Any]:
        """`ceiling`: bytes and FLOP a second that the machine reaches at best."""
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
        """The goal and whether it is met; None where no contender that it speaks of was timed."""
        if goal.unit in rates:
            reached = rates[goal.unit]
        else:
            named = [median for name, median in medians.items() if name.startswith(goal.unit)]
            reached = min(named) / seconds if named else None
        return {"value": goal.value, "unit": goal.unit, "met": None if reached is None else reached >= goal.value}


@dataclass(frozen=True)
class Plan:
    """Where and how large: the GPU, or with `dry` a walk over every contender at sizes that mean nothing, anywhere.

    `quick` leaves out the contenders that take long to compile.
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

    def specs(self) -> list[OpSpec]:
        return [spec for spec in SPECS if self.dry or "triton" in FUSED[spec.name]]

    def cases(self, spec: OpSpec) -> tuple[Case, ...]:
        if not self.dry:
            return spec.bench_cases
        return tuple(case for case in spec.cases if spec.cost(case, BF16).forward_flops >= 1000)[:1]


def goals(name: str, case: Case, direction: str) -> tuple[Goal, ...]:
    """What an operation's row is held to: first what is due now, then what is aimed at."""
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
    """Peers that cost minutes and tell nothing.

    Attention that holds its scores; with dropout, which is the reference's own, SDPA's backends one by one; FlexAttention,
    compiled for each shape, at every length.
    """
    if spec.name != "attention":
        return False
    p = case.parameters
    if peer == "flex":
        return bool(p["dropout_p"]) or not (p["window"] or (p["is_causal"] and p["queries"] in (1024, 4096)))
    return peer in ("composed", "compile") or (bool(p["dropout_p"]) and peer.startswith("sdpa"))


def work(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> tuple[float, float]:
    """FLOPs and bytes."""
    cost = spec.cost(case, dtype)
    if direction == "forward":
        return cost.forward_flops, cost.forward_bytes
    if direction == "backward":
        return cost.backward_flops, cost.backward_bytes
    # A loss with its gradient reads its input once: backward_bytes is that and the gradient.
    return cost.forward_flops + cost.backward_flops, cost.backward_bytes


def _agree(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raises an `AssertionError` when a peer computes something else; rounding differs between any two."""
    distance = torch.linalg.vector_norm(theirs.float() - ours.float())
    size = torch.linalg.vector_norm(ours.float())
    assert bool(distance <= 0.05 * size), f"{what}: differs from ours by {float(distance / size):.3g} of its size"


def op_rows(spec: OpSpec, case: Case, plan: Plan, late: bool = False) -> Iterator[Row]:
    """Forward and backward; of a loss the two together, for its gradient may be made with it.

    `late`: with the peers that take long to compile, and nothing where there are none.
    """
    torch._dynamo.reset()  # or, after eight shapes, torch.compile silently runs the next one eagerly
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
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    arguments, tensors = {**leaves.tensors, **leaves.options}, list(leaves.differentiable().values())
    together = "cross_entropy" in spec.name
    directions = ("with gradient",) if together else ("forward", "backward")
    calls: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in directions}
    refused: dict[str, str] = {}
    grad_outs: tuple[Tensor, ...] = ()
    results: tuple[Tensor, ...] = ()  # ours: the outputs and the gradients

    def add(name: str, function: Callable[..., Any]) -> None:
        nonlocal grad_outs, results

        def forward() -> Any:
            with torch.no_grad():
                return function(**arguments)

        def both() -> Any:
            return torch.autograd.grad(outputs(function(**arguments)), tensors, grad_outs)

        outs = outputs(function(**arguments))
        # Of a mean loss training takes the gradient as it is.
        grad_outs = grad_outs or (tuple(map(torch.ones_like, outs)) if together else random_grads(outs, 0))
        backward = partial(torch.autograd.grad, outs, tensors, grad_outs, retain_graph=True)
        found = *(out.detach() for out in outs), *backward()
        results = results or found
        for mine, theirs in zip(results, found):
            _agree(mine, theirs, "outputs and gradients")
        if together:
            calls["with gradient"][name] = both
        else:
            calls["forward"][name], calls["backward"][name] = forward, backward

    add("ours", ours)
    for name in wanted:
        try:
            add(name, found[name])
        except Exception as error:  # whatever a peer cannot do is no reason to stop
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            if "out of memory" in refused[name]:
                _free_memory()
    del results
    bandwidth, rate = plan.ceiling(BF16)
    for direction, contenders in calls.items():
        flops, moved = work(spec, case, BF16, direction)
        if spec.name == "linear_cross_entropy":
            contenders[PRODUCTS] = _three_products(**arguments)
        elif moved / bandwidth > flops / rate:
            contenders[COPY] = _copy(int(moved), plan.device)
        yield Row(
            f"{spec.name} {case.name} {short(BF16)}: {direction}",
            contenders,
            BF16,
            flops,
            moved,
            goals=goals(spec.name, case, direction),
            expected=_predicted(plan, lambda model, way=direction: model.seconds(spec, case, BF16, way)),
            refused=refused,
        )


def _predicted(plan: Plan, ask: Callable[[Any], float | None]) -> float | None:
    """What bench.expected answers, in seconds; None where it has none. Why it failed is printed: no figure is lost for it."""
    if plan.dry:
        return None
    try:
        return ask(importlib.import_module("bench.expected"))
    except Exception as error:
        print(f"no prediction ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        return None


def _copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device).random_()
    return partial(torch.empty_like(source).copy_, source)


def _three_products(x: Tensor, weight: Tensor, **_: Any) -> Callable[[], Any]:
    """The logits and both gradients' products, and nothing else: what the loss of a linear layer cannot do without."""
    x, weight = x.detach().flatten(0, -2), weight.detach()
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
    """GPT-2 124M's training step, once more with each contender that is ready: what takes longest to compile comes last."""
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
        with plan.device:  # drawn there
            model = GPT(GPTConfig.preset(preset, kernels=kernels, **changes))

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return model.loss(x, y)

        if compiled:
            # What was compiled is kept by its code object: with one of its own, no contender runs another's.
            loss_of.__code__ = loss_of.__code__.replace(co_name="loss_of_" + name.replace(", ", "_").replace(" ", "_"))
            loss_of = torch.compile(loss_of, fullgraph=True, backend="eager" if plan.dry else "inductor")
        # Fused AdamW may be captured when it keeps its count of steps on the GPU.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=graphed)

        def step() -> Tensor:
            # The cache of cast weights would outlive a graph's capture.
            with torch.autocast(plan.device.type, BF16, cache_enabled=not graphed), pinned_sdpa(sdpa):
                loss = loss_of(tokens[0], tokens[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        losses[name] = loss = float(step())
        assert abs(loss - losses["eager"]) < 0.02, f"the first loss is {loss}, eager's {losses['eager']}"
        contenders[name] = captured(step) if graphed else step

    def row() -> Row:
        return Row(
            f"GPT {preset} training step, bf16 autocast, B{batch} T{context}",
            dict(contenders),
            BF16,
            flops,
            tokens=batch * context,
            goals=(Goal(1.0, "compile"), Goal(TOKENS_PER_SECOND, "tokens/s")),
            expected=_predicted(plan, lambda model: model.training_seconds()),
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
        except Exception as error:  # one that cannot run leaves the others
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            _free_memory()
            continue
        yield row()


def pinned_sdpa(backend: Any) -> AbstractContextManager[object]:
    """Within it `scaled_dot_product_attention` runs by this one of its backends; None: by the one that it chooses.

    The backward runs by the backend of its forward, wherever it is called.
    """
    return nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> Callable[[], Any]:
        graph.replay()
        return step  # held here: a graph works on the weights' addresses, and does not keep them alive

    return replay


def memory(plan: Plan) -> dict[str, int]:
    """Bytes that the loss of a linear layer takes at most beside its gradients: plain PyTorch's, and ours."""
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


OPS = {
    "attention": ("attention", "attention_varlen"),
    "norms": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "losses": ("cross_entropy", "linear_cross_entropy"),
    "softmax": ("softmax",),
}
# What matters most comes first; "others" are the operations of no group.
GROUPS = ("attention", "training", "norms", "losses", "softmax", "others")


def measured(group: str, plan: Plan, late: bool = False) -> Iterator[dict[str, Any]]:
    """A group's rows, timed one after another; ``{"failed": name, "why": ...}`` for one that was not.

    `late`: once more, with the peers that take long to compile, those rows that have any.
    """
    import torch._functorch.config as compiler

    compiler.donated_buffer = False  # or a compiled backward could not be run again and again
    if group == "training":
        sources: list[tuple[str, Callable[[], Iterator[Row]]]] = [] if late else [("GPT", partial(training_rows, plan))]
    else:
        grouped = {name for names in OPS.values() for name in names}
        specs = [
            s for s in plan.specs() if s.name in OPS.get(group, ()) or (group == "others" and s.name not in grouped)
        ]
        sources = [
            (f"{spec.name} {case.name}", partial(op_rows, spec, case, plan, late))
            for spec in specs
            for case in plan.cases(spec)
        ]
    for name, rows in sources:
        try:
            for row in rows():
                yield row.measure(plan.ceiling(row.dtype), plan.rounds)
        except Exception as error:
            yield {"failed": name, "why": f"{type(error).__name__}: {error}".strip()[:400]}
        _free_memory()
    if group == "losses" and not late and plan.device.type == "cuda":
        yield {"memory": memory(plan)}
