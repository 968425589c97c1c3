"""Draws the README's picture, docs/speed.svg, from a saved result of bench.cpu: ``python -m bench.picture``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.measure import RESULTS

PICTURE = Path(__file__).parents[1] / "docs/speed.svg"
INK, GREY, BLUE = "#1f2328", "#57606a", "#2f6fb0"  # on a white background, readable on light and dark pages


def times(saved: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """``(PyTorch's fastest, ours)`` in seconds, for each row of a saved result that has a goal."""
    found = {}
    for name, row in saved["default"]["rows"].items():
        medians = dict(row["medians"])
        ours = medians.pop("ours")
        if row["goal"] is not None:
            found[name] = min(medians.values()), ours
    return found


def lines(name: str) -> tuple[str, str]:
    """A row's name in two lines: the work with its direction, and its size."""
    work, _, size = name.partition(", ")
    size, _, direction = size.partition(": ")
    return f"{work}: {direction}" if direction else work, size


def shown(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def draw(saved: dict[str, Any], file: Path) -> None:
    """A bar for each row. Text stays text in the file, and the same result gives the same file."""
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gptcore"})
    from matplotlib.figure import Figure

    found = times(saved)
    head, row, foot = 1.0, 0.4, 0.4  # inches
    height = head + row * len(found) + foot
    figure = Figure(figsize=(8.6, height), facecolor="white")  # as wide as GitHub shows a README
    axes = figure.add_axes((0.4, foot / height, 0.57, 1 - (head + foot) / height))
    axes.set_xscale("log", base=2)
    for place, (name, (theirs, ours)) in enumerate(found.items()):
        ratio = theirs / ours
        axes.barh(place, ratio - 1, 0.56, left=1, color=BLUE)
        work, size = lines(name)
        left = {"xy": (0, place), "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(work, xytext=(-8, 1), ha="right", va="bottom", fontsize=9, color=INK, **left)
        axes.annotate(size, xytext=(-8, -1), ha="right", va="top", fontsize=8, color=GREY, **left)
        right = {"xy": (max(ratio, 1), place), "xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{ratio:.2f}x", fontsize=9, color=INK, weight="bold", **right)
        right["xytext"] = (46, 0)
        axes.annotate(f"{shown(theirs)} → {shown(ours)}", fontsize=8, color=GREY, **right)
    axes.axvline(1, color=INK, linewidth=1)
    least = min(1.0, *(theirs / ours for theirs, ours in found.values()))
    most = max(2.0, *(theirs / ours for theirs, ours in found.values()))
    axes.set_xlim(0.95 * least, most * 3)  # room for the last column of text
    axes.set_ylim(len(found) - 0.4, -0.6)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if 0.95 * least <= tick <= most]
    axes.set_xticks(ticks, ["PyTorch" if tick == 1 else f"{tick:g}x" for tick in ticks], fontsize=9, color=INK)
    axes.minorticks_off()
    axes.set_yticks([])
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    machine = saved["machine"]
    about = (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instructions'].upper()}, "
        f"PyTorch {machine['torch'].partition('+')[0]}, {machine['date']}."
    )
    how = "Timed in turns in one process; medians. Bar: the ratio. Grey: PyTorch's fastest call → the C++ kernel."
    for inches, text, style in (
        (0.3, "C++ kernels on a CPU: how many times as fast as PyTorch", {"fontsize": 12, "weight": "bold", "color": INK}),
        (0.54, about, {"fontsize": 9, "color": GREY}),
        (0.74, how, {"fontsize": 9, "color": GREY}),
    ):  # fmt: skip
        figure.text(0.02, 1 - inches / height, text, **style)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.picture",
        description="Draw how fast the native kernels are against PyTorch, from a saved result of bench.cpu.",
        epilog="example: python -m bench.picture bench/results/amd-epyc-avx2.json --out docs/speed.svg",
    )
    parser.add_argument(
        "result", nargs="?", type=Path, default=RESULTS / "amd-epyc-avx512_bf16.json", help="a saved result"
    )
    parser.add_argument("--out", type=Path, default=PICTURE, help="svg or png file (default: docs/speed.svg)")
    options = parser.parse_args(arguments)
    draw(json.loads(options.result.read_text()), options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
