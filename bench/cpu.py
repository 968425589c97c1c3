"""What the native kernels buy on this machine's CPU, against PyTorch's best call for the same job: ``python -m bench.cpu``.

Peer and ours are timed in turns in one process, medians are quoted, and everything is done twice: with the allocator as it
is, and with one that keeps freed memory (`gptkernels.tune_allocator`, which helps PyTorch as well), each in a process of
its own. A row whose numbers disagree with the peer's is an error and not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gptkernels
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import BF16, FP32, add_saving_options, ceilings, in_turns, save, short, versions
from gptcore.train.hardware import multiplies_bf16

MAX_SECONDS = 60.0  # of a row: no more rounds than fit
# Training and its loss in the precision that this machine trains in: without bfloat16 products, float32.
TRAINED_IN = BF16 if multiplies_bf16(torch.device("cpu")) else FP32


@dataclass
class Row:
    """A job, its peers (the fastest counts) and ours; what it costs at least, for the share of the machine's ceiling."""

    name: str
    goal: float
    peers: dict[str, Callable[[], Any]]
    ours: Callable[[], Any]
    dtype: torch.dtype = BF16
    flops: float = 0.0
    moved: float = 0.0  # bytes
    rounds: int = 15
    check: Callable[[], tuple[Tensor, Tensor]] | None = None
    medians: dict[str, float] = field(default_factory=dict)

    def measure(self) -> dict[str, Any]:
        if self.check is not None:
            ours, theirs = self.check()
            tolerance = 1e-4 if self.dtype == FP32 else 4e-2
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance, msg=self.name)
        self.medians = in_turns({**self.peers, "ours": self.ours}, self.rounds, MAX_SECONDS)
        bandwidth, rate = ceilings(self.dtype)
        seconds = self.medians["ours"]
        return {
            "name": self.name,
            "goal": self.goal,
            "medians": self.medians,
            "share_of_ceiling": max(self.flops / seconds / rate, self.moved / seconds / bandwidth),
        }


def _backward(function: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad_out)


def _attention(dtype: torch.dtype, goals: tuple[float, float]) -> Iterator[Row]:
    query, key, value = (torch.randn(4, 12, 1024, 64).to(dtype).requires_grad_() for _ in range(3))
    flops = 4 * 48 * 1024 * 1024 * 64 / 2

    def peer() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def ours() -> Tensor:
        return gptkernels.causal_attention(query, key, value, backend="native")

    def check() -> tuple[Tensor, Tensor]:
        return ours(), peer()

    name = f"causal attention {short(dtype)}, B4 H12 T1024 d64"
    yield Row(
        f"{name}: forward", goals[0], {"SDPA": torch.no_grad()(peer)}, torch.no_grad()(ours), dtype, flops, check=check
    )
    outs, grad_out = (peer(), ours()), torch.randn(4, 12, 1024, 64).to(dtype)

    def again(out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, (query, key, value), grad_out, retain_graph=True)

    yield Row(f"{name}: backward", goals[1], {"SDPA": again(outs[0])}, again(outs[1]), dtype, 2.5 * flops)


def _norms(dtype: torch.dtype, goals: tuple[float, float]) -> Iterator[Row]:
    x, residual = (torch.randn(4096, 768).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(768).to(dtype).requires_grad_() for _ in range(2))
    grad_out = torch.randn(4096, 768).to(dtype)
    leaves, size = [x, weight, bias], x.nbytes

    def peer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (768,), w, b)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return gptkernels.layer_norm(x, w, b, backend="native")

    yield Row(
        f"layer_norm {short(dtype)}, 4096x768: forward + backward",
        goals[0],
        {"F.layer_norm": _backward(peer, leaves, grad_out)},
        _backward(ours, leaves, grad_out),
        dtype,
        moved=5 * size,
        rounds=41,
        check=lambda: (ours(*leaves), peer(*leaves)),
    )
    both = [x, residual, weight, bias]
    grads = (grad_out, grad_out)

    def peer_add() -> Any:
        summed = x + residual
        return torch.autograd.grad((peer(summed, weight, bias), summed), both, grads)

    def ours_add() -> Any:
        outs = gptkernels.add_layer_norm(x, residual, weight, bias, backend="native")
        return torch.autograd.grad(outs, both, grads)

    yield Row(
        f"add_layer_norm {short(dtype)}, 4096x768: forward + backward",
        goals[1],
        {"add, F.layer_norm": peer_add},
        ours_add,
        dtype,
        moved=8 * size,
        rounds=41,
        check=lambda: (ours_add()[0], peer_add()[0]),
    )


def _softmaxes() -> Iterator[Row]:
    x = torch.randn(4096, 1024).requires_grad_()
    grad_out = torch.randn(4096, 1024)

    def ours(x: Tensor) -> Tensor:
        return gptkernels.softmax(x, backend="native")

    yield Row(
        "softmax fp32, 4096x1024: forward + backward",
        1.3,
        {"F.softmax": _backward(lambda x: F.softmax(x, -1), [x], grad_out)},
        _backward(ours, [x], grad_out),
        FP32,
        moved=5 * x.nbytes,
        rounds=31,
        check=lambda: (ours(x), F.softmax(x, -1)),
    )
    scores = torch.randn(4, 12, 1024, 1024).requires_grad_()
    grad_scores = torch.randn(4, 12, 1024, 1024)
    future = torch.ones(1024, 1024, dtype=torch.bool).triu(1)

    def masked(x: Tensor) -> Tensor:
        return F.softmax(x.masked_fill(future, -math.inf), -1)

    def causal(x: Tensor) -> Tensor:
        return gptkernels.softmax(x, causal=True, backend="native")

    yield Row(
        "causal softmax fp32, B4 H12 T1024: forward + backward",
        3.0,
        {"masked_fill, F.softmax": _backward(masked, [scores], grad_scores)},
        _backward(causal, [scores], grad_scores),
        FP32,
        moved=3.5 * scores.nbytes,
        rounds=5,
        check=lambda: (causal(scores), masked(scores)),
    )


def _gelu() -> Iterator[Row]:
    x = torch.randn(4096, 3072).to(BF16).requires_grad_()
    bias = torch.randn(3072).to(BF16).requires_grad_()
    grad_out = torch.randn(4096, 3072).to(BF16)

    def peer(x: Tensor, b: Tensor) -> Tensor:
        return F.gelu(x + b, approximate="tanh")

    def ours(x: Tensor, b: Tensor) -> Tensor:
        return gptkernels.gelu(x, b, backend="native")

    yield Row(
        "bias + GELU bf16, 4096x3072: forward + backward",
        2.0,
        {"add, F.gelu": _backward(peer, [x, bias], grad_out)},
        _backward(ours, [x, bias], grad_out),
        moved=5 * x.nbytes,
        check=lambda: (ours(x, bias), peer(x, bias)),
    )


def _loss_calls() -> tuple[Callable[[], Any], Callable[[], Any]]:
    x = torch.randn(1024, 768).to(TRAINED_IN).requires_grad_()
    weight = (torch.randn(50257, 768) / 28).to(TRAINED_IN).requires_grad_()
    target = torch.randint(0, 50257, (1024,))

    def peer() -> Any:
        loss = F.cross_entropy(F.linear(x, weight).float(), target)
        return loss, *torch.autograd.grad(loss, (x, weight))

    def ours() -> Any:
        loss = gptkernels.linear_cross_entropy(x, weight, target, backend="native")
        return loss, *torch.autograd.grad(loss, (x, weight))

    return peer, ours


def _loss() -> Iterator[Row]:
    peer, ours = _loss_calls()
    yield Row(
        f"linear_cross_entropy {short(TRAINED_IN)}, 1024 tokens, width 768, vocabulary 50257: forward + backward",
        3.0,
        {"F.linear, F.cross_entropy": peer},
        ours,
        TRAINED_IN,
        flops=6.0 * 1024 * 768 * 50257,
        rounds=5,
        check=lambda: (ours()[0], peer()[0]),
    )


def _training() -> Iterator[Row]:
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
        1.5,
        {"eager": stepper("reference"), "torch.compile": stepper("reference", compiled=True)},
        stepper("native"),
        TRAINED_IN,
        flops=model.flops((2, 512)),
        rounds=4,
    )


def _decoding() -> Iterator[Row]:
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
    peers = {"Hugging Face generate": lambda: theirs.generate(prompt, **options)}
    if TRAINED_IN == FP32:  # without bfloat16 products the best that PyTorch does is float32
        wide = copy.deepcopy(theirs).float()
        peers["Hugging Face generate, fp32"] = lambda: wide.generate(prompt, **options)
    yield Row(
        f"decoding with a cache, GPT-2 124M bf16, one sequence, 32 + {new} tokens",
        2.0,
        peers,
        lambda: ours.generate(prompt, new, temperature=0.0),
        moved=new * 2.0 * ours.num_parameters(),
        rounds=4,
    )


GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "attention-bf16": lambda: _attention(BF16, (2.5, 3.0)),
    "attention-fp32": lambda: _attention(FP32, (1.1, 1.2)),
    "norms-bf16": lambda: _norms(BF16, (3.0, 3.0)),
    "norms-fp32": lambda: _norms(FP32, (1.7, 2.0)),
    "softmax": _softmaxes,
    "gelu": _gelu,
    "loss": _loss,
    "training": _training,
    "decoding": _decoding,
}


def _peak_of_loss(name: str) -> int:
    """Bytes by which one loss with its gradients raises this process's memory at most, without the gradients (Linux)."""
    peer, ours = _loss_calls()
    gptkernels.softmax(torch.zeros(1), backend="native")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now

    def held(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

    before = held("VmRSS:")
    results = (peer if name == "peer" else ours)()
    return held("VmHWM:") - before - sum(result.nbytes for result in results)


def _child(*arguments: str) -> list[Any]:
    command = [sys.executable, "-m", "bench.cpu", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


def machine(commit: str | None = None) -> dict[str, Any]:
    """What a result was measured on; `commit` as `versions` takes it."""
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "CPU"),
        "instructions": str(gptkernels.report()).split("native kernels: ")[-1].split("\n")[0].split(",")[0],
        "threads": torch.get_num_threads(),
        **versions(commit),
        "copy_gb_per_s": ceilings(FP32)[0] / 1e9,
        "product_gflop_per_s": {short(dtype): ceilings(dtype)[1] / 1e9 for dtype in (BF16, FP32)},
    }


def ratios(result: dict[str, Any], name: str) -> tuple[str, float, float, float]:
    """``(fastest peer, its seconds, ours, ratio)`` of one row with one allocator."""
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
        cells = [name, f"{theirs * 1e3:.2f} ({peer})", f"{ours * 1e3:.2f}", f"{ratio:.2f}x", f"{row['goal']:g}x"]
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
            f"| linear_cross_entropy's memory beside the gradients | {peer} | {ours} | {ratio:.1f}x | 8x | | |"
        )
    return "\n".join(lines)


def section(saved: dict[str, Any]) -> str:
    """What the README shows of a saved result: on what it was measured, and the table."""
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
        epilog="examples:\n  python -m bench.cpu --out bench/results\n  python -m bench.cpu norms-bf16 loss\n"
        "  python -m bench.cpu --show bench/results/amd-epyc.json",
    )
    parser.add_argument("groups", nargs="*", help=f"what to time (default: all): {', '.join(GROUPS)}")
    add_saving_options(parser, "<cpu>.json")
    parser.add_argument("--show", type=Path, help="print a saved table and time nothing")
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
    chosen = options.groups or list(GROUPS)
    if options.child:
        if options.child == "tuned":
            gptkernels.tune_allocator()
        for group in chosen:
            for row in GROUPS[group]():
                print(json.dumps(row.measure()), flush=True)
        return 0
    saved: dict[str, Any] = {"machine": machine(options.commit)}
    for allocator in ("default", "tuned"):
        rows: dict[str, Any] = {}
        for group in chosen:
            print(f"{allocator} allocator: {group}", file=sys.stderr, flush=True)
            rows |= {row["name"]: row for row in _child("--child", allocator, group)}
        saved[allocator] = {"rows": rows}
    if "loss" in chosen:
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
