"""Draws the README's picture, docs/speed.svg, from a saved result of bench.cpu: ``python -m bench.picture``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

PICTURE = Path(__file__).parents[1] / "docs/speed.svg"


def ratios(saved: dict[str, Any]) -> dict[str, float]:
    """How many times faster than PyTorch's best each work of a saved result is."""
    found = {}
    for name, row in saved["default"]["rows"].items():
        medians = dict(row["medians"])
        ours = medians.pop("ours")
        found[name] = min(medians.values()) / ours
    return found


def draw(saved: dict[str, Any], file: Path) -> None:
    """A bar for each work; text stays text in the file, and the same result gives the same file."""
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gptcore"})
    from matplotlib.figure import Figure

    found = ratios(saved)
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(found), list(found.values()), color="#4477aa")
    axes.bar_label(bars, [f"{ratio:.2f}x" for ratio in found.values()], padding=3, fontsize=7)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    machine = saved["machine"]
    about = f"{machine['cpu']}, {machine['instructions']}, PyTorch {machine['torch']}, {machine['date']}"
    axes.set_xlabel(f"times as fast as PyTorch's best; {about}", fontsize=7)
    axes.margins(x=0.1)
    figure.savefig(file, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.picture",
        description="Draw how fast the native kernels are against PyTorch, from a result of bench.cpu.",
        epilog="example: python -m bench.picture bench/results/amd-epyc-avx2.json --out docs/speed.svg",
    )
    parser.add_argument("result", nargs="?", type=Path, default=RESULTS / "amd-epyc-avx2.json", help="a saved result")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: docs/speed.svg)")
    options = parser.parse_args(arguments)
    draw(json.loads(options.result.read_text()), options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
