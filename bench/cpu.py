"""Times the native kernels on this machine's CPU against PyTorch: ``python -m bench.cpu``.

PyTorch's function and ours are timed in turns in one process, and medians are compared. Everything is measured twice, each
time in a process of its own: with the default allocator, and with one that keeps freed memory
(`gptkernels.tune_allocator`, which helps PyTorch as well). A row whose results are outside the float64 error budget is an
error and is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gptkernels
import torch
from gptkernels.backend import FUSED
from gptkernels.testing import Case, OpSpec, outputs

from bench import rows
from bench.measure import BF16, FP32, add_saving_options, ceilings, in_turns, save, short, verify, versions
from bench.peers import peers
from bench.rows import BOTH
from gptcore.train.hardware import multiplies_bf16

ROUNDS, MAX_SECONDS = 41, 20.0  # of a row, at most
DTYPES = (BF16, FP32)
TRAINED_IN = BF16 if multiplies_bf16(torch.device("cpu")) else FP32
"""What `gptcore train` computes in on this CPU, and so do the training step and the loss of a linear layer here."""


@dataclass
class Row:
    """Ours and what PyTorch offers for the same work, of which the fastest counts."""

    name: str
    peers: dict[str, Callable[[], Any]]
    ours: Callable[[], Any]
    dtype: torch.dtype = BF16
    flops: float = 0.0
    moved: float = 0.0
    """The fewest bytes that the work must move."""
    goal: float | None = None
    """How many times as fast as the fastest peer ours should be."""

    def measure(self, rounds: int = ROUNDS) -> dict[str, Any]:
        medians = in_turns({**self.peers, "ours": self.ours}, rounds, MAX_SECONDS)
        bandwidth, rate = ceilings(self.dtype)
        seconds = medians["ours"]
        return {
            "name": self.name,
            "goal": self.goal,
            "medians": medians,
            "share_of_ceiling": max(self.flops / seconds / rate, self.moved / seconds / bandwidth),
        }


@dataclass(frozen=True)
class Shown:
    """How the tables name a case and PyTorch's side of it, and its goals; an empty text leaves the spec's name."""

    title: str = ""
    size: str = ""
    peer: str = "eager"
    goals: Mapping[tuple[torch.dtype, str], float] = field(default_factory=dict)


SHOWN = {
    ("attention", "B4-H12-T1024-D64-causal"): Shown(
        "causal attention", "B4 H12 T1024 d64", "SDPA",
        {(BF16, "forward"): 2.5, (BF16, "backward"): 3.0, (FP32, "forward"): 1.1, (FP32, "backward"): 1.2},
    ),
    ("layer_norm", "4096x768"): Shown(peer="F.layer_norm", goals={(BF16, BOTH): 3.0, (FP32, BOTH): 1.7}),
    ("add_layer_norm", "4096x768"): Shown(peer="add, F.layer_norm", goals={(BF16, BOTH): 3.0, (FP32, BOTH): 2.0}),
    ("softmax", "4096x1024"): Shown(peer="F.softmax", goals={(FP32, BOTH): 1.3}),
    ("softmax", "4x12x1024x1024-causal"): Shown(
        "causal softmax", "B4 H12 T1024", "masked_fill, F.softmax", {(FP32, BOTH): 3.0}
    ),
    ("gelu", "4096x3072"): Shown("bias + GELU", "", "add, F.gelu", {(BF16, BOTH): 2.0}),
    ("linear_cross_entropy", "1024-C768-V50257"): Shown(
        "", "1024 tokens, width 768, vocabulary 50257", "F.linear, F.cross_entropy", {(TRAINED_IN, BOTH): 3.0}
    ),
}  # fmt: skip


def dtypes(spec: OpSpec) -> tuple[torch.dtype, ...]:
    # On a CPU without bfloat16 products, PyTorch takes minutes for this loss in bfloat16.
    return (TRAINED_IN,) if spec.name == "linear_cross_entropy" else DTYPES


def directions(spec: OpSpec) -> tuple[str, ...]:
    """What is timed by itself: attention's two passes; of `linear` the forward, which is a decoding step's."""
    return {"attention": ("forward", "backward"), "linear": ("forward",)}.get(spec.name, (BOTH,))


def row_name(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> str:
    """A row's name in tables and saved results, which are compared by it."""
    shown = SHOWN.get((spec.name, case.name), Shown())
    return f"{shown.title or spec.name} {short(dtype)}, {shown.size or case.name}: {direction}"


def op_rows(spec: OpSpec, case: Case, dtype: torch.dtype, check: bool = True) -> Iterator[Row]:
    """The rows of one case in one dtype. With `check`, first verifies that our results are within the error budget."""
    inputs = spec.make_inputs(case, dtype, torch.device("cpu"), 0)
    ours = partial(spec.function, backend="native")
    if check:
        verify(spec, ours, inputs)
    leaves = rows.with_gradients(inputs)
    found, grad_outs = [], None
    for function in (peers(spec, "cpu", compiled=False)["eager"], ours):
        outs = outputs(function(**leaves.tensors, **leaves.options))
        grad_outs = grad_outs or rows.output_gradients(spec, outs)
        found.append(rows.calls(function, leaves, outs, grad_outs))
    theirs, mine = found
    shown = SHOWN.get((spec.name, case.name), Shown())
    for direction in directions(spec):
        flops, moved = rows.work(spec, case, dtype, direction)
        name, goal = row_name(spec, case, dtype, direction), shown.goals.get((dtype, direction))
        yield Row(name, {shown.peer: theirs[direction]}, mine[direction], dtype, flops, moved, goal)


def op_cases(group: str) -> Iterator[tuple[OpSpec, Case, torch.dtype]]:
    """What a group of operations is timed on: the CPU cases of their specs."""
    for spec in rows.specs_of(group):
        if "native" in FUSED[spec.name]:
            yield from ((spec, case, dtype) for dtype in dtypes(spec) for case in spec.cpu_cases)


def _training() -> Iterator[Row]:
    """A training step of GPT-2 124M, beside eager PyTorch and torch.compile."""
    from gptcore import GPT, GPTConfig

    def stepper(kernels: str, compiled: bool = False) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset("gpt2-124m", kernels=kernels))
        loss_of = torch.compile(model.loss) if compiled else model.loss
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> float:
            with torch.autocast("cpu", BF16, enabled=TRAINED_IN == BF16):
                loss = loss_of(tokens[0], tokens[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    tokens = torch.randint(0, 50257, (2, 2, 512))
    model = GPT(GPTConfig.preset("gpt2-124m"))
    yield Row(
        f"GPT-2 124M training step, {short(TRAINED_IN)}{' autocast' if TRAINED_IN == BF16 else ''}, B2 T512",
        {"eager": stepper("reference"), "torch.compile": stepper("reference", compiled=True)},
        stepper("native"),
        TRAINED_IN,
        flops=model.flops((2, 512)),
        goal=1.5,
    )


def _decoding() -> Iterator[Row]:
    """Greedy generation by GPT-2 124M with a key/value cache, beside transformers'."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gptcore import GPT, GPTConfig
    from gptcore.weights import config_to_huggingface

    config = GPTConfig.preset("gpt2-124m", kernels="native")
    ours = GPT(config).to(BF16).eval()
    theirs: Any = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(config)))
    theirs = theirs.to(BF16).eval()
    prompt, new = torch.randint(0, 50257, (1, 32)), 48
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 50256}
    options["attention_mask"] = torch.ones_like(prompt)
    theirs_by_name = {"Hugging Face generate": lambda: theirs.generate(prompt, **options)}
    if TRAINED_IN == FP32:  # without bfloat16 products PyTorch is fastest in float32
        wide = copy.deepcopy(theirs).float()
        theirs_by_name["Hugging Face generate, fp32"] = lambda: wide.generate(prompt, **options)
    yield Row(
        f"decoding with a cache, GPT-2 124M bf16, one sequence, 32 + {new} tokens",
        theirs_by_name,
        lambda: ours.generate(prompt, new, temperature=0.0),
        moved=new * 2.0 * ours.num_parameters(),
        goal=2.0,
    )


MODELS: dict[str, Callable[[], Iterator[Row]]] = {"training": _training, "decoding": _decoding}
GROUPS = (*rows.GROUPS, rows.OTHERS, *MODELS)


def measured(group: str, check: bool) -> Iterator[dict[str, Any]]:
    """A group's rows, timed one after another. `check`: see `op_rows`."""
    if group in MODELS:
        yield from (row.measure() for row in MODELS[group]())
    else:
        yield from (row.measure() for case in op_cases(group) for row in op_rows(*case, check))


def _peak_of_loss(name: str) -> int:
    """Peak bytes that one loss of a linear layer adds to this process's memory, without its gradients (Linux)."""
    (spec,) = (spec for spec in rows.specs_of("losses") if spec.name == "linear_cross_entropy")
    function = partial(spec.function, backend="native") if name == "ours" else peers(spec, "cpu", False)["eager"]
    leaves = rows.with_gradients(spec.make_inputs(spec.cpu_cases[0], TRAINED_IN, torch.device("cpu"), 0))
    tensors = list(leaves.differentiable().values())
    gptkernels.softmax(torch.zeros(1), backend="native")  # loads the native kernels
    Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak to what is held now

    def held(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

    before = held("VmRSS:")
    loss = outputs(function(**leaves.tensors, **leaves.options))
    results = (*loss, *torch.autograd.grad(loss, tensors))
    return held("VmHWM:") - before - sum(result.nbytes for result in results)


def _child(*arguments: str) -> list[Any]:
    """What another process of this bench prints as JSON."""
    command = [sys.executable, "-m", "bench.cpu", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


def machine(commit: str | None = None) -> dict[str, Any]:
    """What a result was measured on. `commit`: see `versions`."""
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "CPU"),
        "instructions": str(gptkernels.report()).split("native kernels: ")[-1].split("\n")[0].split(",")[0],
        "threads": torch.get_num_threads(),
        **versions(commit),
        "copy_gb_per_s": ceilings(FP32)[0] / 1e9,
        "product_gflop_per_s": {short(dtype): ceilings(dtype)[1] / 1e9 for dtype in (BF16, FP32)},
    }


def ratios(result: dict[str, Any], name: str) -> tuple[str, float, float, float]:
    """``(fastest peer, its seconds, our seconds, their ratio)`` of one row; `result`: a saved file's part for one allocator."""
    medians = dict(result["rows"][name]["medians"])
    ours = medians.pop("ours")
    best = min(medians, key=medians.__getitem__)
    return best, medians[best], ours, medians[best] / ours


def table(saved: dict[str, Any]) -> str:
    """A saved result as a Markdown table."""
    lines = [
        "| work | PyTorch's best, ms | ours, ms | ratio | goal | share of ceiling | ratio, allocator tuned |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in saved["default"]["rows"].items():
        peer, theirs, ours, ratio = ratios(saved["default"], name)
        tuned = f"{ratios(saved['tuned'], name)[3]:.2f}x" if name in saved["tuned"]["rows"] else ""
        goal = "" if row["goal"] is None else f"{row['goal']:g}x"
        cells = [name, f"{theirs * 1e3:.2f} ({peer})", f"{ours * 1e3:.2f}", f"{ratio:.2f}x", goal]
        lines.append("| " + " | ".join([*cells, f"{row['share_of_ceiling']:.0%}", tuned]) + " |")
    for name, row in saved["default"]["rows"].items():
        if "training step" in name and name in saved["tuned"]["rows"]:
            eager, ours = row["medians"]["eager"], saved["tuned"]["rows"][name]["medians"]["ours"]
            lines.append(
                f"| the same, ours with the tuned allocator against eager as it is | {eager * 1e3:.2f} (eager) | "
                f"{ours * 1e3:.2f} | {eager / ours:.2f}x | 2.5x | | |"
            )
    if "memory" in saved:
        peer, ours = (f"{saved['memory'][name] / 2**20:,.0f} MiB" for name in ("peer", "ours"))
        ratio = saved["memory"]["peer"] / max(saved["memory"]["ours"], 1)
        lines.append(
            f"| linear_cross_entropy's peak memory without the gradients | {peer} | {ours} | {ratio:.1f}x | 8x | | |"
        )
    return "\n".join(lines)


def section(saved: dict[str, Any]) -> str:
    """What docs/benchmarks.md shows of a saved result: on what it was measured, and the table."""
    m = saved["machine"]
    products = " and ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in m["product_gflop_per_s"].items())
    return (
        f"{m['cpu']}, {m['instructions']}, {m['threads']} threads, PyTorch {m['torch']}, Python {m['python']}, commit "
        f"{m['commit']}, {m['date']}; its ceilings: a copy at {m['copy_gb_per_s']:.0f} GB/s, matrix products at {products} "
        f"GFLOP/s.\n\n{table(saved)}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.cpu --out bench/results\n  python -m bench.cpu norms losses\n"
        "  python -m bench.cpu --show bench/results/amd-epyc-avx2.json",
    )
    parser.add_argument("groups", nargs="*", help=f"what to time (default: all): {', '.join(GROUPS)}")
    add_saving_options(parser, "<cpu>.json")
    parser.add_argument("--show", type=Path, help="print the table of this saved result and time nothing")
    parser.add_argument("--child", choices=("default", "tuned", "peer", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"groups: got {', '.join(sorted(unknown))}; accepted are {', '.join(GROUPS)}")
    if options.show:
        print(section(json.loads(options.show.read_text())))
        return 0
    if options.child in ("peer", "ours"):
        print(json.dumps([_peak_of_loss(options.child)]))
        return 0
    groups = options.groups or GROUPS
    if options.child:
        if options.child == "tuned":
            gptkernels.tune_allocator()
        for group in groups:
            for row in measured(group, check=options.child == "default"):  # which runs before "tuned"
                print(json.dumps(row), flush=True)
        return 0
    saved: dict[str, Any] = {"machine": machine(options.commit)}
    for allocator in ("default", "tuned"):
        saved[allocator] = {"rows": {}}
        for group in groups:
            print(f"{allocator} allocator: {group}", file=sys.stderr, flush=True)
            saved[allocator]["rows"] |= {row["name"]: row for row in _child("--child", allocator, group)}
    if "losses" in groups:
        saved["memory"] = {name: _child("--child", name)[0][0] for name in ("peer", "ours")}
    print(section(saved))
    if options.out:
        name = "-".join(saved["machine"]["cpu"].lower().split()) + "-" + saved["machine"]["instructions"]
        file = options.out / f"{name}.json"
        save(saved, file)
        print(f"\nsaved as {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
