"""Finds the tiles in which attention's Triton kernels run fastest on this GPU: ``python -m bench.tune --out FOLDER``.

It tries a dozen tiles for each of the forward, dK/dV and dQ kernels at head_dim 64 and 128, in bfloat16 with a causal mask.
First all are compiled, on every core. Dropped are those that spill registers, make each matrix product wait for the one
before it, do not fit the GPU, or give results outside the float64 error budget. The others are timed in turns at 1,024 to
8,192 tokens; results are saved after each length of each kernel. A backward kernel's time is that of the whole backward,
with the other kernels in their shipped tiles.

Printed last are the fastest tiles as `gptkernels/attention/tiles.py` lists them for plain attention (no dropout, window,
mask, lengths or packed batch). tests/kernels/test_compile.py must pass with them under every supported Triton.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gptkernels
import torch
from gptkernels import compile_report
from gptkernels.attention.spec import SPEC
from gptkernels.attention.tiles import Tile, tile
from gptkernels.backend import interpreting
from gptkernels.testing import Case, outputs

from bench.measure import BF16, device, in_turns, save, verify, versions

KERNELS = {"forward": "_forward_kernel", "dkdv": "_dkdv_kernel", "dq": "_dq_kernel"}
HEAD_DIMS = (64, 128)
CHECKED = 1024  # tokens at which a candidate's results are checked
LENGTHS = (4096, 1024, 8192, 2048)  # in this order, so that a run that is cut covers the range
TOKENS, WIDTH = 16384, 2048  # tokens of a batch, and heads x head_dim: as in the FlashAttention papers
MAX_MINUTES = 9.5
ROUNDS = 60  # at most
NOISE = 0.01  # a tile replaces the shipped one if it is faster by more than this share

# block_m, block_n, warps, stages, registers.
CANDIDATES: dict[Key, tuple[Tile, ...]] = {
    ("forward", 64): (
        Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 4, 128), Tile(128, 64, 8, 3),
        Tile(128, 64, 4, 2), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3, 128),
        Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(256, 64, 8, 2), Tile(256, 64, 8, 3), Tile(128, 32, 8, 3),
    ),
    ("forward", 128): (
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4),
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 32, 8, 3), Tile(128, 32, 8, 4, 128),
        Tile(64, 32, 4, 3, 128), Tile(64, 32, 4, 3), Tile(128, 256, 8, 1),
    ),
    ("dkdv", 64): (
        Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(32, 128, 8, 3),
        Tile(32, 128, 8, 2, 128), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 64, 4, 3),
        Tile(32, 64, 4, 3, 168), Tile(128, 64, 4, 1), Tile(128, 128, 8, 1),
    ),
    ("dkdv", 128): (
        Tile(32, 128, 8, 2), Tile(32, 128, 8, 1), Tile(32, 128, 8, 3), Tile(16, 128, 8, 2), Tile(16, 128, 8, 3),
        Tile(64, 128, 8, 1), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 2),
        Tile(16, 64, 4, 3), Tile(32, 64, 8, 2), Tile(64, 64, 4, 1),
    ),
    ("dq", 64): (
        Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 4, 2),
        Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 32, 8, 2),
        Tile(128, 32, 8, 3), Tile(256, 64, 8, 2), Tile(128, 64, 8, 1, 128),
    ),
    ("dq", 128): (
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 3, 128),
        Tile(128, 32, 8, 2, 128), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 3),
        Tile(128, 128, 8, 1), Tile(64, 128, 4, 1),
    ),
}  # fmt: skip
Key = tuple[str, int]  # direction and head_dim
Medians = Mapping[Tile, Mapping[int, float]]  # seconds by tile and number of tokens


def chooser(direction: str, candidate: Tile) -> Callable[..., Tile]:
    """A replacement of `tiles.tile` that gives `candidate` for one direction and the shipped tiles for the others."""
    return lambda wanted, *args: candidate if wanted == direction else tile(wanted, *args)


@contextmanager
def choosing(choose: Callable[..., Tile]) -> Iterator[None]:
    """Makes attention's launchers ask `choose` for their tiles."""
    from gptkernels.attention import triton as launchers

    with mock.patch.object(launchers, "tile", choose):
        yield


def described(candidate: Tile) -> str:
    """The tile as tiles.py writes it."""
    figures = (candidate.block_m, candidate.block_n, candidate.num_warps, candidate.num_stages, candidate.maxnreg)
    return f"Tile({', '.join(str(figure) for figure in figures if figure is not None)})"


def parsed(text: str) -> Tile:
    """The tile that a command line names: "128,64,8,3" or "128,64,8,3,128"."""
    figures = text.split(",")
    if len(figures) not in (4, 5) or not all(figure.strip().isdecimal() for figure in figures):
        raise argparse.ArgumentTypeError(f"got {text!r}; a tile is block_m,block_n,warps,stages or with ,maxnreg")
    return Tile(*map(int, figures))


def causal(batch: int, tokens: int, head_dim: int) -> Case:
    """A causal case of attention. Its sizes are multiples of 16, so that Triton compiles one kernel for all of them."""
    heads = WIDTH // head_dim
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "queries": tokens, "keys": tokens, "head_dim": head_dim}
    return Case(f"B{batch}-H{heads}-T{tokens}-D{head_dim}-causal", {**SPEC.bench_cases[0].parameters, **sizes})


def _name(key: Key, candidate: Tile) -> str:
    return f"{key[0]} d{key[1]} {described(candidate)}"


def shipped_tile(direction: str, head_dim: int, target: str) -> Tile:
    return tile(direction, compile_report.TARGETS[target].launcher_arch, BF16.itemsize, head_dim, is_plain=True)


def compile_check(
    wanted: Sequence[Key], tiles: Sequence[Tile], target: str, jobs: int | None, deadline: float
) -> dict[Key, dict[Tile, str]]:
    """Compiles candidates for `target`; returns for each why it must not be timed, or an empty text.

    Candidates are the shipped tile and `tiles` or, without any, `CANDIDATES`.
    """
    found: list[tuple[Key, Tile, compile_report.Launch]] = []
    for key in wanted:
        direction, head_dim = key
        case = causal(TOKENS // LENGTHS[0], LENGTHS[0], head_dim)
        for candidate in dict.fromkeys((shipped_tile(*key, target), *(tiles or CANDIDATES[key]))):
            with choosing(chooser(direction, candidate)):
                launches = compile_report.launches((target,), ("attention",), ("bf16",), cases=(case,))
            (launch,) = (launch for launch in launches if launch.source.fn.__name__ == KERNELS[direction])
            found.append((key, candidate, launch))
    faults = {key: {tile: "not compiled: the time was up" for k, tile, _ in found if k == key} for key in wanted}
    results = compile_report.compile_launches([launch for *_, launch in found], jobs)
    for ((direction, head_dim), candidate, _), result in zip(found, results):
        faults[direction, head_dim][candidate] = "; ".join(result.faults())
        figures = f"{result.registers} registers, {result.shared_bytes} B shared, {result.blocks} blocks"
        figures = "; ".join([figures, *result.faults()])
        print(f"{_name((direction, head_dim), candidate)}: {figures}", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            break
    return faults


def chosen(medians: Medians, shipped: Tile) -> Tile:
    """The tile with the least geometric mean of its times relative to each length's best; the shipped one if within `NOISE`.

    Only lengths at which every tile was timed count; without any, the shipped tile is chosen.
    """
    lengths = set.intersection(*(set(times) for times in medians.values())) if medians else set()
    if not lengths:
        return shipped
    best = {length: min(times[length] for times in medians.values()) for length in lengths}

    def above(candidate: Tile) -> float:
        return math.exp(sum(math.log(medians[candidate][length] / best[length]) for length in lengths) / len(lengths))

    fastest = min(medians, key=above)
    return shipped if shipped in medians and above(shipped) <= above(fastest) * (1 + NOISE) else fastest


def table(results: Mapping[Key, Medians], target: str) -> str:
    """The chosen tiles as entries of tiles.py's `_PLAIN`."""
    arch = compile_report.TARGETS[target].launcher_arch
    best = {key: chosen(medians, shipped_tile(*key, target)) for key, medians in results.items()}
    return "\n".join(f'    ("{arch}", "{key[0]}", {key[1]}): {described(found)},' for key, found in best.items())


def times(direction: str, head_dim: int, medians: Medians, shipped: Tile) -> str:
    """One kernel's candidates, fastest first: milliseconds at each length."""
    lengths = sorted({length for found in medians.values() for length in found})
    best = chosen(medians, shipped)
    lines = [f"{direction} d{head_dim}, ms at {', '.join(map(str, lengths))} tokens"]
    for candidate in sorted(medians, key=lambda candidate: sum(medians[candidate].values())):
        figures = "  ".join(f"{seconds * 1e3:7.3f}" for _, seconds in sorted(medians[candidate].items()))
        marks = [mark for mark, which in (("shipped", shipped), ("chosen", best)) if which == candidate]
        lines.append(f"  {described(candidate):<28} {figures}  {', '.join(marks)}".rstrip())
    return "\n".join(lines)


def _why_wrong(direction: str, head_dim: int, candidate: Tile) -> str:
    """Why the candidate's results are wrong; an empty text if they are right."""
    inputs = SPEC.make_inputs(causal(1, CHECKED, head_dim), BF16, torch.device(device()), 0)
    try:
        with choosing(chooser(direction, candidate)):
            verify(SPEC, lambda **given: gptkernels.attention(**given, backend="triton"), inputs)
    except Exception as error:  # it may also fail to launch
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def _contenders(direction: str, head_dim: int, tokens: int, tiles: Sequence[Tile]) -> dict[str, Callable[[], Any]]:
    """A call to time for each tile: the forward, or the whole backward."""
    inputs = SPEC.make_inputs(causal(TOKENS // tokens, tokens, head_dim), BF16, torch.device(device()), 0)

    def forward() -> Any:
        return gptkernels.attention(**inputs.tensors, **inputs.options, backend="triton")

    def call(choose: Callable[..., Tile]) -> Any:
        with choosing(choose):
            if direction == "forward":
                return forward()
            return torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    leaves = [x.requires_grad_(direction != "forward") for x in inputs.tensors.values() if x is not None]
    outs = outputs(forward())
    grads = [torch.randn_like(out) for out in outs]
    choosers = {described(candidate): chooser(direction, candidate) for candidate in tiles}
    return {name: lambda choose=choose: call(choose) for name, choose in choosers.items()}


def measure(
    faults: Mapping[Key, Mapping[Tile, str]],
    lengths: Sequence[int],
    deadline: float,
    saved: dict[str, Any],
    file: Path | None,
) -> dict[Key, dict[Tile, dict[int, float]]]:
    """Median seconds of the candidates that have no faults and give right results; saves after each length of each kernel."""
    results: dict[Key, dict[Tile, dict[int, float]]] = {key: {} for key in faults}
    for key, candidates in faults.items():
        for candidate in [candidate for candidate, why in candidates.items() if not why]:
            if why := _why_wrong(*key, candidate):
                saved["failed"][_name(key, candidate)] = why
            else:
                results[key][candidate] = {}
    turns = [(tokens, key) for tokens in lengths for key, medians in results.items() if medians]
    for done, (tokens, key) in enumerate(turns):
        left = deadline - time.monotonic()
        name = f"{key[0]} d{key[1]} {tokens} tokens"
        if left <= 0:
            saved["failed"][name] = "the time was up"
            continue
        calls = _contenders(*key, tokens, list(results[key]))
        found = in_turns(calls, ROUNDS, 0.5 * left / (len(turns) - done))
        for candidate, medians in results[key].items():
            medians[tokens] = found[described(candidate)]
        saved["medians"][name] = found
        saved["table"] = table(results, saved["machine"]["target"])
        if file:
            save(saved, file)
        print(f"{name}: {len(found)} tiles, {left:.0f} s left", file=sys.stderr, flush=True)
    return results


TILE_HELP = "block_m,block_n,warps,stages[,maxnreg] of a tile to try instead of the dozen; may be repeated"
EXAMPLES = """examples:
  python -m bench.tune --out /tmp/tiles                        everything, in 9.5 minutes at most
  python -m bench.tune --kernel forward --head-dim 64 --tile 128,64,8,3,128 --tile 128,128,8,2 --minutes 1
  python -m bench.tune --dry-run                               without a GPU: compile for an H100, list what would be timed
"""


def _target(asked: str | None) -> str:
    """The target to compile for: the one asked for, this GPU's, or without a GPU an H100's."""
    if asked or device() != "cuda":
        return asked or "sm_90"
    found = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if torch.version.hip or found not in compile_report.TARGETS:
        raise SystemExit(f"bench.tune: no target for this GPU ({found}); known are {', '.join(compile_report.TARGETS)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel", action="append", choices=KERNELS, help="kernel to tune; may be repeated (default: all)"
    )
    parser.add_argument(
        "--head-dim",
        action="append",
        type=int,
        choices=HEAD_DIMS,
        help="head_dim to tune for; may be repeated (default: both)",
    )
    parser.add_argument(
        "--tokens",
        action="append",
        type=int,
        choices=sorted(LENGTHS),
        help="tokens to time at; may be repeated (default: all)",
    )
    parser.add_argument("--tile", action="append", type=parsed, default=[], help=TILE_HELP)
    parser.add_argument("--minutes", type=float, default=MAX_MINUTES, help="when to stop (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for tiles.json (default: nothing is saved)")
    parser.add_argument(
        "--target", choices=compile_report.TARGETS, help="GPU to compile for, with --dry-run (default: sm_90)"
    )
    parser.add_argument("--jobs", type=int, help="kernels to compile at a time (default: one for each core)")
    parser.add_argument("--dry-run", action="store_true", help="only compile, and list what would be timed")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is 1: unset it, interpreted kernels have no machine code")
    if device() != "cuda" and not options.dry_run:
        parser.error("there is no GPU here; --dry-run compiles all candidates and lists what would be timed")
    if options.target and not options.dry_run:
        parser.error("--target: accepted with --dry-run only; otherwise this GPU is the target")
    target = _target(options.target)
    wanted = [(k, d) for d in options.head_dim or HEAD_DIMS for k in options.kernel or KERNELS]
    lengths = [n for n in LENGTHS if n in (options.tokens or LENGTHS)]
    deadline = start + 60 * options.minutes
    faults = compile_check(wanted, options.tile, target, options.jobs, deadline)
    failed = {_name(key, tile): why for key, candidates in faults.items() for tile, why in candidates.items() if why}
    saved: dict[str, Any] = {"machine": versions() | {"target": target}, "failed": failed, "medians": {}, "table": ""}
    file = options.out / "tiles.json" if options.out else None
    if file:
        save(saved, file)
    if options.dry_run:
        for (direction, head_dim), candidates in faults.items():
            fitting = [described(candidate) for candidate, why in candidates.items() if not why]
            at = ", ".join(map(str, sorted(lengths)))
            print(f"{direction} d{head_dim}, to be timed at {at} tokens:", *fitting, sep="\n  ")
    else:
        saved["machine"]["gpu"] = torch.cuda.get_device_name()
        results = measure(faults, lengths, deadline, saved, file)
        for key, medians in results.items():
            print(times(*key, medians, shipped_tile(*key, target)))
        saved["table"] = table(results, target)
    if file:
        save(saved, file)
    for name, why in saved["failed"].items():
        print(f"left out: {name}: {why}")
    print(saved["table"] or "dry run: nothing was timed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
