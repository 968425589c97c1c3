"""What the Triton kernels do on this machine's GPU, against everybody else's: ``python -m bench.gpu``.

All contenders of a row are timed in turns in one process, medians are quoted, and each call starts with an empty L2 cache
and with its work queued, so that the device's time is taken; training steps are timed by the clock. A kernel whose numbers
are outside the float64 error budget is not timed, a peer whose numbers differ is left out, and the file says why. Each group
of rows is a process of its own, and every row is saved when it is done: a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, Case, OpSpec, outputs, random_grads

from bench.measure import BF16, FP32, RESULTS, ceilings, device, in_turns, save, short, verify, versions
from bench.peers import peers

# Seconds of timing for each row, and rounds at most.
ROW_SECONDS, ROUNDS = 1.0, 30
GOALS_OF_ATTENTION = {"forward": {1024: 330, 2048: 400, 4096: 460}, "backward": {1024: 250, 2048: 300, 4096: 340}}


@dataclass(frozen=True)
class Goal:
    """What a row is held to: `unit` is TFLOP/s, "of ceiling", "of the products' speed" or "of the best peer's speed"."""

    value: float
    unit: str


@dataclass
class Row:
    """A job: ours in one or more ways (the fastest counts), its peers, and what it costs at least."""

    name: str
    ours: dict[str, Callable[[], Any]]
    peers: dict[str, Callable[[], Any]]
    dtype: torch.dtype
    flops: float = 0.0
    moved: float = 0.0  # bytes
    goal: Goal | None = None
    wall: bool = False
    refused: dict[str, str] = field(default_factory=dict)  # peers that did not run or disagreed: why

    def measure(self, ceiling: tuple[float, float], rounds: int) -> dict[str, Any]:
        """`ceiling`: bytes and FLOP a second that the machine reaches at best."""
        medians = in_turns({**self.ours, **self.peers}, rounds, ROW_SECONDS, wall=self.wall)
        ours, best = ((name, medians[name]) for name in (min(n, key=medians.__getitem__) for n in self._sides()))
        bandwidth, rate = ceiling
        shares = {"TFLOP/s": self.flops / ours[1] / rate, "GB/s": self.moved / ours[1] / bandwidth}
        unit = max(shares, key=shares.__getitem__)
        amount = self.flops / ours[1] / 1e12 if unit == "TFLOP/s" else self.moved / ours[1] / 1e9
        row: dict[str, Any] = {
            "name": self.name,
            "medians": medians,
            "ours": ours[0],
            "best_peer": best[0],
            "rate": amount,
            "unit": unit,
            "share_of_ceiling": shares[unit],
            "refused": self.refused,
        }
        if self.goal is not None:
            reached = {
                "TFLOP/s": self.flops / ours[1] / 1e12,
                "of ceiling": shares[unit],
                "of the products' speed": medians.get("three products", 0.0) / ours[1],
                "of the best peer's speed": best[1] / ours[1],
            }[self.goal.unit]
            row["goal"] = {"value": self.goal.value, "unit": self.goal.unit, "met": reached >= self.goal.value}
        return row

    def _sides(self) -> tuple[list[str], list[str]]:
        return list(self.ours), [name for name in self.peers if name != "three products"] or list(self.ours)


@dataclass(frozen=True)
class Plan:
    """Where and how large: the GPU, or with `dry` a walk over every contender at sizes that mean nothing, anywhere."""

    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device(device())

    @property
    def backend(self) -> str:
        return "auto" if self.dry else "triton"

    def ceiling(self, dtype: torch.dtype) -> tuple[float, float]:
        return (1e9, 1e9) if self.dry else ceilings(dtype)

    def specs(self) -> list[OpSpec]:
        return [spec for spec in SPECS if self.dry or "triton" in FUSED[spec.name]]

    def cases(self, spec: OpSpec) -> tuple[Case, ...]:
        if not self.dry:
            return spec.bench_cases
        return tuple(case for case in spec.cases if spec.cost(case, BF16).forward_flops >= 1000)[:1]


def _goal(name: str, case: Case, direction: str) -> Goal | None:
    p = case.parameters
    if name == "attention" and p["head_dim"] == 64 and p["is_causal"] and not (p.get("window") or p.get("dropout_p")):
        goal = GOALS_OF_ATTENTION[direction].get(p["queries"])
        return Goal(goal, "TFLOP/s") if goal and p["queries"] == p["keys"] else None
    if name in ("layer_norm", "rms_norm", "softmax", "gelu") and p["shape"][-1] >= 1024 and p.get("dim", -1) == -1:
        if direction == "forward":
            return Goal(0.9, "of ceiling")
        return Goal(0.75, "of ceiling") if name == "layer_norm" else None
    if name == "cross_entropy":
        return Goal(0.85, "of ceiling")
    return Goal(1 / 1.2, "of the products' speed") if name == "linear_cross_entropy" else None


def _pointless(spec: OpSpec, case: Case, peer: str) -> bool:
    """Peers that cost minutes and tell nothing: attention that holds its scores, FlexAttention compiled at every shape."""
    if spec.name != "attention":
        return False
    return peer in ("composed", "compile") or (
        peer == "flex" and _goal(spec.name, case, "forward") is None and not case.parameters["window"]
    )


def _work(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> tuple[float, float]:
    """FLOPs and bytes."""
    cost = spec.cost(case, dtype)
    if direction == "forward":
        return cost.forward_flops, cost.forward_bytes
    if direction == "backward":
        return cost.backward_flops, cost.backward_bytes
    # A loss with its gradient reads its input once: backward_bytes is that and the gradient.
    return cost.forward_flops + cost.backward_flops, cost.backward_bytes


def _op_rows(spec: OpSpec, case: Case, plan: Plan) -> Iterator[Row]:
    """Forward and backward; of a loss the two together, for its gradient may be made with it."""
    torch._dynamo.reset()  # or, after eight shapes, torch.compile silently runs the next one eagerly
    inputs = spec.make_inputs(case, BF16, plan.device, 0)
    ours = partial(spec.function, backend=plan.backend)
    verify(spec, ours, inputs)
    gc.collect()
    torch.cuda.empty_cache()
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    arguments, tensors = {**leaves.tensors, **leaves.options}, list(leaves.differentiable().values())
    with torch.no_grad():
        expected = outputs(spec.reference(**arguments))
    grad_outs = random_grads(expected, 0)
    together = "cross_entropy" in spec.name
    calls: dict[str, dict[str, Callable[[], Any]]] = (
        {"with gradient": {}} if together else {"forward": {}, "backward": {}}
    )
    refused: dict[str, str] = {}

    def add(name: str, function: Callable[..., Any]) -> None:
        def forward() -> Any:
            with torch.no_grad():
                return function(**arguments)

        def both() -> Any:
            return torch.autograd.grad(outputs(function(**arguments)), tensors, grad_outs)

        if together:
            both()
            calls["with gradient"][name] = both
            return
        outs = outputs(function(**arguments))
        for actual, wanted in zip(outs, expected):
            torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05)
        calls["forward"][name] = forward
        backward = partial(torch.autograd.grad, outs, tensors, grad_outs, retain_graph=True)
        backward()
        calls["backward"][name] = backward

    add("ours", ours)
    for name, peer in peers(spec, "cuda", compiled=not plan.dry).items():
        if _pointless(spec, case, name) and not plan.dry:
            continue
        try:
            add(name, peer)
        except Exception as error:  # whatever a peer cannot do is no reason to stop
            refused[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            for direction in calls.values():
                direction.pop(name, None)
    if spec.name == "linear_cross_entropy":
        calls["with gradient"]["three products"] = _three_products(**arguments)
    for direction, contenders in calls.items():
        flops, moved = _work(spec, case, BF16, direction)
        yield Row(
            f"{spec.name} {case.name} {short(BF16)}: {direction}",
            {"ours": contenders.pop("ours")},
            contenders,
            BF16,
            flops,
            moved,
            _goal(spec.name, case, direction),
            refused=refused,
        )


def _three_products(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> Callable[[], Any]:
    """The logits and both gradients' products, and nothing else: what the loss of a linear layer cannot do without."""
    x, weight = x.detach().flatten(0, -2), weight.detach()
    logits = x @ weight.T
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def products() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_x)
        torch.mm(logits.T, x, out=grad_weight)

    return products


def _training_rows(plan: Plan) -> Iterator[Row]:
    from gptcore import GPT, GPTConfig

    batch, preset, changes = (2, "tiny", {"vocab_size": 61}) if plan.dry else (16, "gpt2-124m", {})
    context = GPTConfig.preset(preset).context
    tokens = torch.randint(0, changes.get("vocab_size", 50257), (2, batch, context), device=plan.device)
    losses: dict[str, float] = {}

    def stepper(name: str, kernels: Any, *, compiled: bool = False, graphed: bool = False) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset(preset, kernels=kernels, **changes)).to(plan.device)
        loss_of = torch.compile(model.loss) if compiled else model.loss
        options: dict[str, Any] = {"capturable": True} if graphed else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, **options)

        def step() -> torch.Tensor:
            # The cache of cast weights would outlive a graph's capture.
            with torch.autocast(plan.device.type, BF16, cache_enabled=not graphed):
                loss = loss_of(tokens[0], tokens[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        losses[name] = float(step().detach())
        return _graphed(step) if graphed else step

    fused = "auto" if plan.dry else "triton"
    reference = {"eager": stepper("eager", "reference")}
    ours = {"ours": stepper("ours", fused)}
    if not plan.dry:
        reference["torch.compile"] = stepper("torch.compile", "reference", compiled=True)
        ours["ours, torch.compile"] = stepper("ours, torch.compile", fused, compiled=True)
        ours["ours, CUDA graph"] = stepper("ours, CUDA graph", fused, graphed=True)
    for name, loss in losses.items():
        assert abs(loss - losses["eager"]) < 0.02, f"{name}: the first loss is {loss}, eager's {losses['eager']}"
    model = GPT(GPTConfig.preset(preset, **changes))
    yield Row(
        f"GPT {preset} training step, bf16 autocast, B{batch} T{context}",
        ours,
        reference,
        BF16,
        flops=model.flops((batch, context)),
        goal=Goal(1.0, "of the best peer's speed"),
        wall=True,
    )


def _graphed(step: Callable[[], Any]) -> Callable[[], Any]:
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
    return graph.replay


def _memory(plan: Plan) -> dict[str, int]:
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
# What matters most comes first; operations of no group come in the one before the last.
GROUPS = ("attention", "norms", "losses", "training", "softmax", "others")


def measured(group: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A group's rows, timed one after another; ``{"failed": name, "why": ...}`` for one that was not."""
    import torch._functorch.config as compiler

    compiler.donated_buffer = False  # or a compiled backward could not be run again and again
    if group == "training":
        sources: list[tuple[str, Callable[[], Iterator[Row]]]] = [("GPT", partial(_training_rows, plan))]
    else:
        grouped = {name for names in OPS.values() for name in names}
        specs = [
            s for s in plan.specs() if s.name in OPS.get(group, ()) or (group == "others" and s.name not in grouped)
        ]
        sources = [
            (f"{spec.name} {case.name}", partial(_op_rows, spec, case, plan))
            for spec in specs
            for case in plan.cases(spec)
        ]
    for name, rows in sources:
        try:
            for row in rows():
                yield row.measure(plan.ceiling(row.dtype), 1 if plan.dry else ROUNDS)
        except Exception as error:
            yield {"failed": name, "why": f"{type(error).__name__}: {error}".strip()[:400]}
        gc.collect()
        torch.cuda.empty_cache()
    if group == "losses" and plan.device.type == "cuda" and any(s.name == "linear_cross_entropy" for s in plan.specs()):
        yield {"memory": _memory(plan)}


def machine(plan: Plan, commit: str | None = None) -> dict[str, Any]:
    """What a result was measured on."""
    import triton

    return {
        "gpu": "no GPU (dry run)" if plan.dry else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        **versions(),
        **({"commit": commit} if commit else {}),
        "copy_gb_per_s": plan.ceiling(FP32)[0] / 1e9,
        "product_tflop_per_s": {short(BF16): plan.ceiling(BF16)[1] / 1e12},
    }


def take_in(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds what `measured` yielded to a result."""
    if "name" in found:
        saved["failed"] = {name: why for name, why in saved["failed"].items() if not found["name"].startswith(name)}
    if "failed" in found:
        saved["failed"][found["failed"]] = found["why"]
    elif "memory" in found:
        saved["memory"] = found["memory"]
    else:
        saved["rows"][found["name"]] = found


def continue_file(saved: dict[str, Any], file: Path) -> None:
    """Keeps the rows of an earlier run of the same commit with the same versions: the groups may be run one by one."""
    if not file.exists():
        return
    earlier = json.loads(file.read_text())
    if all(earlier["machine"].get(key) == saved["machine"][key] for key in ("gpu", "commit", "torch", "triton")):
        saved.update({key: value for key, value in earlier.items() if key != "machine"})


def _reached(row: dict[str, Any]) -> str:
    if "goal" not in row:
        return ""
    value, unit = row["goal"]["value"], row["goal"]["unit"]
    text = f"{value:g} {unit}" if unit == "TFLOP/s" else f"{value:.0%} {unit}"
    return f"{text}: {'met' if row['goal']['met'] else 'missed'}"


def table(saved: dict[str, Any]) -> str:
    """A saved result as a Markdown table."""
    lines = [
        "| work | ours, ms | rate | share of ceiling | goal | best peer, ms | ratio | other contenders, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in saved["rows"].items():
        medians = dict(row["medians"])
        ours, best = medians.pop(row["ours"]), medians.pop(row["best_peer"], None)
        how = "" if row["ours"] == "ours" else f" ({row['ours'].removeprefix('ours, ')})"
        peer, ratio = ("", "") if best is None else (f"{best * 1e3:.3f} ({row['best_peer']})", f"{best / ours:.2f}x")
        cells = [name, f"{ours * 1e3:.3f}{how}", f"{row['rate']:,.0f} {row['unit']}", f"{row['share_of_ceiling']:.0%}"]
        cells += [_reached(row), peer, ratio, ", ".join(f"{n} {s * 1e3:.3f}" for n, s in medians.items())]
        lines.append("| " + " | ".join(cells) + " |")
    if memory := saved.get("memory"):
        eager, ours = memory["eager"] / 2**20, memory["ours"] / 2**20
        met = "met" if 5 * ours <= eager else "missed"
        work = "linear_cross_entropy's memory beside the gradients"
        lines.append(
            f"| {work} | {ours:,.0f} MiB | | | a fifth: {met} | {eager:,.0f} MiB (eager) | {eager / ours:.1f}x | |"
        )
    return "\n".join(lines)


def section(saved: dict[str, Any]) -> str:
    """What the README shows of a saved result: on what it was measured, the table, and what failed."""
    m = saved["machine"]
    products = " and ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in m["product_tflop_per_s"].items())
    text = (
        f"{m['gpu']}, CUDA {m['cuda']}, PyTorch {m['torch']}, Triton {m['triton']}, Python {m['python']}, commit "
        f"{m['commit']}, {m['date']}; its ceilings: a copy at {m['copy_gb_per_s']:,.0f} GB/s, matrix products at {products} "
        f"TFLOP/s.\n\n{table(saved)}"
    )
    failed = "".join(f"\n- not timed: {name}: {why.splitlines()[0]}" for name, why in saved["failed"].items())
    return text + ("\n" + failed if failed else "")


def _run_groups(groups: Sequence[str], saved: dict[str, Any], file: Path, minutes: float) -> None:
    """Each group in a process of its own, until the time is up; saves after each row."""
    deadline = time.monotonic() + 60 * minutes
    for group in groups:
        left = deadline - time.monotonic()
        if left < 20:
            saved["failed"][group] = f"the {minutes:g} minutes were over"
            continue
        saved["failed"].pop(group, None)
        print(f"{group}: {left:.0f} s left", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bench.gpu", "--child", group]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            stop = threading.Timer(left, child.kill)
            stop.start()
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    take_in(saved, json.loads(line))
                    save(saved, file)
            code = child.wait()
            stop.cancel()
        if code:
            why = "the time was up" if time.monotonic() >= deadline else f"its process ended with {code}"
            saved["failed"][group] = f"not finished: {why}"
        save(saved, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.gpu\n  python -m bench.gpu attention norms --minutes 5 --out /tmp/results\n"
        "  python -m bench.gpu --show bench/results/nvidia-h100-80gb-hbm3.json",
    )
    parser.add_argument("groups", nargs="*", help=f"what to time (default: all): {', '.join(GROUPS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for <gpu>.json (default: bench/results)")
    parser.add_argument("--commit", help="what the file says was measured, where there is no git to ask")
    parser.add_argument("--show", type=Path, help="print a saved table and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="every contender once, tiny and anywhere; saves nothing")
    parser.add_argument("--child", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"groups: got {', '.join(sorted(unknown))}; accepted are {', '.join(GROUPS)}")
    if options.show:
        print(section(json.loads(options.show.read_text())))
        return 0
    groups = options.groups or list(GROUPS)
    if not options.dry_run and device() != "cuda":
        parser.error(
            "there is no GPU here; --dry-run walks through everything without one, --show prints a saved table"
        )
    plan = Plan(options.dry_run)
    if options.child:
        for found in measured(options.child, plan):
            print(json.dumps(found), flush=True)
        return 0
    saved: dict[str, Any] = {"machine": machine(plan, options.commit), "rows": {}, "failed": {}}
    if options.dry_run:
        for group in groups:
            for found in measured(group, plan):
                take_in(saved, found)
        print(section(saved))
        return 0
    torch.cuda.empty_cache()  # what the ceilings were measured with; the groups have processes of their own
    file = options.out / f"{'-'.join(saved['machine']['gpu'].lower().split())}.json"
    continue_file(saved, file)
    _run_groups(groups, saved, file, options.minutes)
    print(section(saved))
    print(f"\nsaved as {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
