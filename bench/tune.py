"""Which tiles attention's kernels run fastest in on this GPU: ``python -m bench.tune --out FOLDER``.

For the forward, dK with dV, and dQ, in bfloat16 and causal, a dozen tiles each at a head_dim of 64 and of 128. First all
are compiled, on every core: those that spill, make each product wait for the one before it, or do not fit are dropped, and
so are those whose numbers are outside the float64 error budget. The others are timed in turns, at 1,024 to 8,192 tokens;
what is known is saved after each length of each kernel. A backward kernel's figure is the time of the whole backward, the
other kernels in the shipped tiles. Printed last are the fastest tiles as `gptkernels/attention/tiles.py` lists them for
plain attention (no dropout, window, mask, lengths or packed batch); test_compile.py has to pass with them under every Triton.
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
CHECKED = 1024  # tokens at which a candidate's numbers are held to the budget
LENGTHS = (4096, 1024, 8192, 2048)  # a run that is cut has the ends of the range
TOKENS, WIDTH = 16384, 2048  # of each batch, and all heads together: as in the FlashAttention papers
MAX_MINUTES = 9.5
ROUNDS = 60  # at most
NOISE = 0.01  # a tile replaces the shipped one if it is faster by more

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
    """What stands in for `tiles.tile`: the shipped tiles but for one direction's."""
    return lambda wanted, *args: candidate if wanted == direction else tile(wanted, *args)


@contextmanager
def choosing(choose: Callable[..., Tile]) -> Iterator[None]:
    """Within it, attention asks `choose` for its tiles."""
    from gptkernels.attention import triton as launchers

    with mock.patch.object(launchers, "tile", choose):
        yield


def described(candidate: Tile) -> str:
    """As it is written in tiles.py."""
    figures = (candidate.block_m, candidate.block_n, candidate.num_warps, candidate.num_stages, candidate.maxnreg)
    return f"Tile({', '.join(str(figure) for figure in figures if figure is not None)})"


def parsed(text: str) -> Tile:
    """A tile of the command line: "128,64,8,3" or "128,64,8,3,128"."""
    figures = text.split(",")
    if len(figures) not in (4, 5) or not all(figure.strip().isdecimal() for figure in figures):
        raise argparse.ArgumentTypeError(f"got {text!r}; a tile is block_m,block_n,warps,stages or with ,maxnreg")
    return Tile(*map(int, figures))


def causal(batch: int, tokens: int, head_dim: int) -> Case:
    """Of SPEC. Sizes are multiples of 16 as long as the constants are: to Triton that is one kernel for all of them."""
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
    """Why each candidate is not to be timed on `target`, empty if it is: `tiles`, or the lists above, and the shipped one."""
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
    """The tile whose times are, over all lengths, least above the best of each; the shipped one if that is as good.

    Compared are the lengths at which every tile was timed; with none it is the shipped one.
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
    """The entries of tiles.py's `_PLAIN`."""
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
    """Why its numbers are wrong; empty if they are right."""
    inputs = SPEC.make_inputs(causal(1, CHECKED, head_dim), BF16, torch.device(device()), 0)
    try:
        with choosing(chooser(direction, candidate)):
            verify(SPEC, lambda **given: gptkernels.attention(**given, backend="triton"), inputs)
    except Exception as error:  # one that cannot be launched is a line of the report
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def _contenders(direction: str, head_dim: int, tokens: int, tiles: Sequence[Tile]) -> dict[str, Callable[[], Any]]:
    """A call for each tile: the forward, or the backward."""
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
    """Medians of the candidates without faults whose numbers are right; saves after each turn."""
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


TILE_HELP = "block_m,block_n,warps,stages[,maxnreg]: instead of the dozen; may be repeated"
EXAMPLES = """examples:
  python -m bench.tune --out /tmp/tiles                        everything, on this machine's GPU, in 9.5 minutes at most
  python -m bench.tune --kernel forward --head-dim 64 --tile 128,64,8,3,128 --tile 128,128,8,2 --minutes 1
  python -m bench.tune --dry-run                               without a GPU: what compiles for an H100, what would be timed
"""


def _target(asked: str | None) -> str:
    """This GPU's, or an H100's where there is none."""
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
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="may be repeated (default: all)")
    parser.add_argument(
        "--head-dim", action="append", type=int, choices=HEAD_DIMS, help="may be repeated (default: both)"
    )
    parser.add_argument("--tokens", action="append", type=int, choices=sorted(LENGTHS), help="(default: all)")
    parser.add_argument("--tile", action="append", type=parsed, default=[], help=TILE_HELP)
    parser.add_argument("--minutes", type=float, default=MAX_MINUTES, help="when to stop (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for tiles.json (default: nothing is saved)")
    parser.add_argument("--target", choices=compile_report.TARGETS, help="for --dry-run (default: sm_90)")
    parser.add_argument("--jobs", type=int, help="kernels compiled at a time (default: one a core)")
    parser.add_argument("--dry-run", action="store_true", help="compile alone, and say what would be timed")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is 1: unset it, interpreted kernels have no machine code")
    if device() != "cuda" and not options.dry_run:
        parser.error("there is no GPU here; --dry-run compiles all candidates and says what would be timed")
    if options.target and not options.dry_run:
        parser.error("--target goes with --dry-run: what is timed is compiled for this GPU")
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
