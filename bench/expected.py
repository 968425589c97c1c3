"""What to expect of our kernels on an H100: predicted times, from figures that need no GPU.

`seconds` predicts a row of bench.gpu. It reads what the kernels are made of from bench/results/expected-h100.json, which
``--compile`` makes. docs/gpu-model.md explains the model, works it by hand, and shows these tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from gptkernels.backend import interpreting
from gptkernels.testing import Case, OpSpec

from bench import h100
from bench.h100 import H100, Overlap, Tile, Tiles
from bench.measure import RESULTS, short

SAVED = RESULTS / "expected-h100.json"
PRODUCTS = {"_forward_kernel": 2, "_dq_kernel": 3, "_dkdv_kernel": 4}  # of attention, for each tile
BATCH, PRESET = 16, "gpt2-124m"  # of the training step
TRAINING = f"GPT {PRESET} training step, bf16 autocast, B{BATCH} T1024"
# AdamW, fused, for each parameter: float32 weight, gradient and two averages read, all but the gradient written.
OPTIMIZER_BYTES = 28


@cache
def saved() -> dict[str, Any]:
    """What ``--compile`` wrote."""
    return json.loads(SAVED.read_text())


def directions(spec: OpSpec) -> tuple[str, ...]:
    """What bench.gpu times: of a loss forward and backward together, for the gradient may come with the loss."""
    return ("with gradient",) if "cross_entropy" in spec.name else ("forward", "backward")


def row_name(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> str:
    """What bench.gpu calls the row."""
    return f"{spec.name} {case.name} {short(dtype)}: {direction}"


def seconds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> float | None:
    """What one call should take on an H100, device time alone; None for what the saved file does not hold.

    Args:
        spec, case, dtype: as bench.gpu times them: the bench cases, in bfloat16.
        direction: "forward", "backward", or "with gradient" (both, of a loss).

    Raises:
        ValueError: another direction.
    """
    return _seconds(spec, case, dtype, direction, H100.overlap)


def bounds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> tuple[float, float] | None:
    """`seconds` if all of the shorter of products and softmax hid behind the longer, and if nothing did."""
    fast, slow = (_seconds(spec, case, dtype, direction, (overlap, overlap)) for overlap in (1.0, 0.0))
    return None if fast is None or slow is None else (fast, slow)


def _seconds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str, overlap: Overlap) -> float | None:
    if direction not in ("forward", "backward", "with gradient"):
        raise ValueError(f"direction: got {direction!r}; accepted are forward, backward, with gradient")
    launches = saved()["rows"].get(row_name(spec, case, dtype, direction))
    if launches is None:
        return None
    return sum(launch["count"] * launch_seconds(launch, case.parameters, overlap) for launch in launches)


def launch_seconds(launch: Mapping[str, Any], parameters: Mapping[str, Any], overlap: Overlap = H100.overlap) -> float:
    """What one launch should take; `parameters` of attention's case say how its tiles are masked."""
    if "figures" not in launch:
        return h100.pytorch_seconds(launch)
    if launch["kernel"] == "_scale_kernel":  # looks at a factor that is 1, and leaves
        return H100.launch
    figures = saved()["kernels"][launch["figures"]]
    tiles = attention_tiles(launch)
    if tiles is None:
        return h100.streaming_seconds(launch, figures)
    return h100.attention_seconds(launch, figures, programs(launch, parameters), tiles, overlap)


def attention_tiles(launch: Mapping[str, Any]) -> tuple[Tile, Tile] | None:
    """What a tile without and with a mask costs; None for a kernel that computes no tiles."""
    if launch["folder"] != "attention" or launch["kernel"] not in PRODUCTS:
        return None
    sizes, warps = launch["constants"], launch["warps"]
    block_m, block_n, block_d = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    flops = PRODUCTS[launch["kernel"]] * 2 * block_m * block_n * block_d
    walked = block_m if launch["kernel"] == "_dkdv_kernel" else block_n
    loaded = 2 * walked * block_d * 2  # keys and values, or queries and gradients, of 2 bytes
    loops = [loop for loop in saved()["kernels"][launch["figures"]]["loops"] if loop.get("flops")]
    # The loop with the mask does the same and more.
    costs = sorted((h100.tile(loop, flops, loaded, warps) for loop in loops), key=lambda tile: tile.softmax)
    return costs[0], costs[-1]


def programs(launch: Mapping[str, Any], p: Mapping[str, Any]) -> list[Tiles]:
    """The tiles of each program of an attention kernel, in the order of the launch."""
    block_m, block_n = launch["constants"]["BLOCK_M"], launch["constants"]["BLOCK_N"]
    # Of a packed batch every sequence has its own queries and keys, and as many programs as the longest.
    sequences = p["lengths"] if "batch" not in p else ((p["queries"], p["keys"]),) * p["batch"]
    by_keys = launch["kernel"] == "_dkdv_kernel"
    walk, step = (h100.query_tiles, block_n) if by_keys else (h100.key_tiles, block_m)
    longest = max(lengths[by_keys] for lengths in sequences)
    found: list[Tiles] = []
    for queries, keys in sequences:
        blocks = []
        for start in range(0, longest, step):
            one = walk(start, queries, keys, p["is_causal"], p["window"] or 0, block_m, block_n)
            blocks.append(one if start < (keys if by_keys else queries) else (0, 0))
        if by_keys:  # a key/value head meets the queries of its whole group
            group = p["heads"] // p["kv_heads"]
            found += [(group * plain, group * masked) for plain, masked in blocks] * p["kv_heads"]
        else:  # late queries, who see most, come first
            found += blocks[::-1] * p["heads"]
    return found


def training_parts() -> dict[str, float]:
    """Seconds of the training step of bench.gpu (`TRAINING`) by what they are spent on."""
    from gptcore import GPTConfig

    config = GPTConfig.preset(PRESET)
    heads = {"heads": config.n_head, "kv_heads": config.kv_heads}
    attention = {"batch": BATCH, "queries": config.context, "keys": config.context, "is_causal": True, "window": None}
    parts: dict[str, float] = {}
    for launch in saved()["rows"][TRAINING]:
        part = launch.get("folder") or ("products" if "product" in launch else "PyTorch's other kernels")
        if config.vocab_size in launch.get("product", ()):
            part = "products of the loss"
        parts[part] = parts.get(part, 0.0) + launch["count"] * launch_seconds(launch, attention | heads)
    parts["partial sums"] = parts.pop("gptkernels", 0.0)
    parts["cross_entropy"] = parts.pop("_loss", 0.0)
    parts["optimizer"] = OPTIMIZER_BYTES * 124.4e6 / H100.bandwidth
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def training_seconds() -> float:
    """Device time of a training step of bench.gpu's row `TRAINING`: what a CUDA graph of it should take."""
    return sum(training_parts().values())


def _compile() -> None:
    from bench.launches import compiled, everything

    made = compiled(everything())
    # A line for each kernel and launch: what has changed is then easy to see.
    kernels = ",\n ".join(map(json.dumps, made["kernels"]))
    rows = ",\n ".join(
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, launches)) + "]"
        for name, launches in made["rows"].items()
    )
    head = json.dumps({key: value for key, value in made.items() if key not in ("kernels", "rows")})[:-1]
    SAVED.write_text(f'{head},\n"kernels": [\n {kernels}],\n"rows": {{\n {rows}}}}}\n')
    saved.cache_clear()


def differences(ops: Sequence[str] = ()) -> list[str]:
    """Rows in which `ops` (none: all, and the training step) launch other kernels of ours than the saved file says.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` is set.
    """
    from bench.launches import everything, without_figures

    def ours(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:  # PyTorch's kernels vary with its version
        shown = [{key: value for key, value in launch.items() if key != "figures"} for launch in launches]
        return [launch for launch in shown if "folder" in launch]

    found = {name: ours(launches) for name, launches in without_figures(everything(ops)).items()}
    known = {name: ours(launches) for name, launches in saved()["rows"].items()}
    names = found if ops else {**found, **known}
    return [name for name in names if found.get(name) != known.get(name)]


EXAMPLES = """examples:
  python -m bench.expected                    print the tables
  python -m bench.expected --compile          after a kernel or a tile changed: compile all, save, and rewrite the document
  python -m bench.expected --document         after a figure of the card changed: rewrite the document's tables alone
  python -m bench.expected --check            say which rows launch something else than the saved file says
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.expected",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--compile", action="store_true", help=f"make {SAVED.name} anew (minutes), and the document")
    action.add_argument("--document", action="store_true", help="rewrite the tables of docs/gpu-model.md")
    action.add_argument(
        "--check", action="store_true", help="compare with what is launched now; exit with 1 if it differs"
    )
    options = parser.parse_args(arguments)
    if (options.check or options.compile) and interpreting():
        parser.error("TRITON_INTERPRET is 1: unset it, the interpreter launches and compiles nothing")
    if options.check:
        found = differences()
        print("\n".join([f"launches something else: {name}" for name in found] or ["all rows launch what was saved"]))
        return 1 if found else 0
    if options.compile:
        _compile()
    from bench import expected_tables

    if options.compile or options.document:
        document = expected_tables.DOCUMENT
        document.write_text(expected_tables.rewritten(document.read_text()))
        return 0
    print("\n\n".join(f"{name}\n\n{section()}" for name, section in expected_tables.SECTIONS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
