"""Shows pytest-benchmark's JSON as a Markdown table and a plot: ``python -m bench.report FILE``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RATES = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "tokens_per_s": "tokens/s"}


def read(files: list[Path]) -> list[dict[str, Any]]:
    """The benchmarks of pytest-benchmark's JSON files.

    Raises:
        ValueError: a file that cannot be read, or is not pytest-benchmark's.
    """
    found = []
    for file in files:
        try:
            for row in json.loads(file.read_text())["benchmarks"]:
                found.append({"group": row["group"], "median": row["stats"]["median"], **row["extra_info"]})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not a file that pytest --benchmark-json wrote ({error})") from error
    return found


def _relative(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """How many times as fast as PyTorch's own op; for a training step, as the reference kernels."""
    for name in ("eager", "reference"):
        for other in rows:
            if other["group"] == row["group"] and other["contender"] == name:
                return other["median"] / row["median"]
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each contender, groups in the order in which they ran."""
    header = ["", "contender", "median ms", "against eager", *RATES.values(), "share of ceiling"]
    lines = [" | ".join(["", *header, ""]).strip(), "|" + " --- |" * len(header)]
    group = None
    for row in rows:
        ratio = _relative(row, rows)
        cells = [row["group"] if row["group"] != group else "", row["contender"], f"{row['median'] * 1e3:.3f}"]
        cells.append("" if ratio is None else f"{ratio:.2f}x")
        cells += [f"{row[key]:,.2f}" if key in row else "" for key in RATES]
        cells.append(f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
        group = row["group"]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the medians as bars, a panel for each group."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(7, 1.2 + 1.1 * len(groups)), layout="constrained")
    for axes, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups):
        members = [row for row in rows if row["group"] == group]
        axes.barh([row["contender"] for row in members], [row["median"] * 1e3 for row in members])
        axes.set_title(group, fontsize=8)
        axes.set_xlabel("ms", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Show saved benchmarks as a Markdown table, and as a plot.",
        epilog="example: pytest bench --benchmark-only --benchmark-json=b.json && python -m bench.report b.json --plot b.png",
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON files that pytest --benchmark-json wrote")
    parser.add_argument("--plot", type=Path, help="also draw the medians into this file (png, svg, pdf)")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.files)
    except ValueError as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
