"""Predicts how long our kernels take on an H100, without a GPU: ``python -m bench.expected``.

`seconds` predicts a row of bench.gpu from bench/results/expected-h100.json. ``--compile`` makes that file: what each row
launches, and what the compiler makes of each kernel. docs/gpu-model.md explains the model, works two examples by hand, and
shows the tables that this command prints.
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
from bench.measure import RESULTS
from bench.rows import DIRECTIONS, row_name

SAVED = RESULTS / "expected-h100.json"
PRODUCTS = {
    "_forward_kernel": 2,
    "_dq_kernel": 3,
    "_dkdv_kernel": 4,
}  # matrix products of attention's kernels, each tile
BATCH, PRESET = 16, "gpt2-124m"  # of the training step
TRAINING = f"GPT {PRESET} training step, bf16 autocast, B{BATCH} T1024"
# Bytes that fused AdamW moves for each parameter, in float32: it reads the weight, the gradient and two averages, and
# writes all but the gradient.
OPTIMIZER_BYTES = 28


@cache
def saved() -> dict[str, Any]:
    """The file that ``--compile`` writes."""
    return json.loads(SAVED.read_text())


def seconds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> float | None:
    """Predicted GPU time of one call on an H100; None for a row that the saved file does not hold.

    Args:
        spec, case, dtype: a row of bench.gpu: a bench case in bfloat16.
        direction: "forward" or "backward"; for a loss "forward + backward".

    Raises:
        ValueError: another direction.
    """
    return _seconds(spec, case, dtype, direction, H100.overlap)


def bounds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> tuple[float, float] | None:
    """`seconds` with full overlap of attention's matrix products and softmax, and with none."""
    fast, slow = (_seconds(spec, case, dtype, direction, (overlap, overlap)) for overlap in (1.0, 0.0))
    return None if fast is None or slow is None else (fast, slow)


def _seconds(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str, overlap: Overlap) -> float | None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: got {direction!r}; accepted are {', '.join(DIRECTIONS)}")
    launches = saved()["rows"].get(row_name(spec, case, dtype, direction))
    if launches is None:
        return None
    return sum(launch["count"] * launch_seconds(launch, case.parameters, overlap) for launch in launches)


def launch_seconds(launch: Mapping[str, Any], parameters: Mapping[str, Any], overlap: Overlap = H100.overlap) -> float:
    """Predicted time of one launch. `parameters`: attention's case, which says how its tiles are masked."""
    if "figures" not in launch:
        return h100.pytorch_seconds(launch)
    if launch["kernel"] == "_scale_kernel":  # reads a factor, which is 1 here, and returns
        return H100.launch
    figures = saved()["kernels"][launch["figures"]]
    tiles = attention_tiles(launch)
    if tiles is None:
        return h100.streaming_seconds(launch, figures)
    return h100.attention_seconds(launch, figures, programs(launch, parameters), tiles, overlap)


def attention_tiles(launch: Mapping[str, Any]) -> tuple[Tile, Tile] | None:
    """The costs of a tile without a mask and of one with; None for a kernel that is not attention's."""
    if launch["folder"] != "attention" or launch["kernel"] not in PRODUCTS:
        return None
    sizes, warps = launch["constants"], launch["warps"]
    block_m, block_n, block_d = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    flops = PRODUCTS[launch["kernel"]] * 2 * block_m * block_n * block_d
    walked = block_m if launch["kernel"] == "_dkdv_kernel" else block_n
    loaded = 2 * walked * block_d * 2  # keys and values, or queries and gradients, 2 bytes each
    loops = [loop for loop in saved()["kernels"][launch["figures"]]["loops"] if loop.get("flops")]
    # The loop with the mask takes more instructions.
    costs = sorted((h100.tile(loop, flops, loaded, warps) for loop in loops), key=lambda tile: tile.softmax)
    return costs[0], costs[-1]


def programs(launch: Mapping[str, Any], p: Mapping[str, Any]) -> list[Tiles]:
    """How many tiles each program of an attention kernel computes, in the order of the launch."""
    block_m, block_n = launch["constants"]["BLOCK_M"], launch["constants"]["BLOCK_N"]
    # In a packed batch sequences have lengths of their own, and each gets as many programs as the longest.
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
        if by_keys:  # a key/value head serves all query heads of its group
            group = p["heads"] // p["kv_heads"]
            found += [(group * plain, group * masked) for plain, masked in blocks] * p["kv_heads"]
        else:  # programs start with the last queries, which see the most keys
            found += blocks[::-1] * p["heads"]
    return found


def training_parts() -> dict[str, float]:
    """Predicted seconds of each part of bench.gpu's training step (`TRAINING`), longest first."""
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
    """Predicted GPU time of bench.gpu's training step (`TRAINING`): the time of its CUDA graph."""
    return sum(training_parts().values())


def _compile() -> None:
    """Compiles everything and writes the saved file."""
    from bench.launches import compiled, everything

    made = compiled(everything())
    # A line for each kernel and launch, so that a diff shows what has changed.
    kernels = ",\n ".join(map(json.dumps, made["kernels"]))
    rows = ",\n ".join(
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(map(json.dumps, launches)) + "]"
        for name, launches in made["rows"].items()
    )
    head = json.dumps({key: value for key, value in made.items() if key not in ("kernels", "rows")})[:-1]
    SAVED.write_text(f'{head},\n"kernels": [\n {kernels}],\n"rows": {{\n {rows}}}}}\n')
    saved.cache_clear()


def differences(ops: Sequence[str] = ()) -> list[str]:
    """Names of the rows that launch other Triton kernels than the saved file says.

    Args:
        ops: the operations to compare; without any, all and the training step.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` is set.
    """
    from bench.launches import everything, without_figures

    def ours(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:  # PyTorch's own kernels vary with its version
        shown = [{key: value for key, value in launch.items() if key != "figures"} for launch in launches]
        return [launch for launch in shown if "folder" in launch]

    found = {name: ours(launches) for name, launches in without_figures(everything(ops)).items()}
    known = {name: ours(launches) for name, launches in saved()["rows"].items()}
    names = found if ops else {**found, **known}
    return [name for name in names if found.get(name) != known.get(name)]


EXAMPLES = """examples:
  python -m bench.expected                    print the tables
  python -m bench.expected --compile          after a change of kernels or tiles: compile all, save, rewrite docs/gpu-model.md
  python -m bench.expected --document         after a change of the GPU's figures: rewrite docs/gpu-model.md
  python -m bench.expected --check            list the rows whose launches differ from the saved file
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.expected",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--compile", action="store_true", help=f"make {SAVED.name} again (minutes), and rewrite docs/gpu-model.md"
    )
    action.add_argument("--document", action="store_true", help="rewrite the tables of docs/gpu-model.md")
    action.add_argument(
        "--check",
        action="store_true",
        help="compare the saved file with the current launches; exit with 1 if they differ",
    )
    options = parser.parse_args(arguments)
    if (options.check or options.compile) and interpreting():
        parser.error("TRITON_INTERPRET is 1: unset it, the interpreter compiles nothing")
    if options.check:
        found = differences()
        print("\n".join([f"launches differ: {name}" for name in found] or ["all rows launch what the file says"]))
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
