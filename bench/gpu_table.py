"""Collects the rows of a result of `bench.gpu`, and shows it as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def take_in(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds one item of `gpu_rows.measured` to a result."""
    if "name" in found:
        saved["failed"] = {name: why for name, why in saved["failed"].items() if not found["name"].startswith(name)}
    if "failed" in found:
        saved["failed"][found["failed"]] = found["why"]
    elif "memory" in found:
        saved["memory"] = found["memory"]
    else:
        saved["rows"][found["name"]] = found


def continue_file(saved: dict[str, Any], file: Path) -> None:
    """Takes over the rows that an earlier run of the same commit and versions saved, so that groups can be run one by one."""
    if not file.exists():
        return
    earlier = json.loads(file.read_text())
    if all(earlier["machine"].get(key) == saved["machine"][key] for key in ("gpu", "commit", "torch", "triton")):
        saved.update({key: value for key, value in earlier.items() if key != "machine"})


def _goal(goal: dict[str, Any]) -> str:
    value, unit = goal["value"], goal["unit"]
    if unit.endswith("/s"):
        text = f"{value:,g} {unit}"
    else:
        text = f"as fast as {unit}" if value == 1 else f"{value:.0%} of {unit}"
    return f"{text}: " + {True: "met", False: "missed", None: "not judged"}[goal["met"]]


def table(saved: dict[str, Any]) -> str:
    """A saved result as a Markdown table."""
    lines = [
        "| work | ours, ms | predicted, ms | rate | share of ceiling | goals | best peer, ms | ratio | others, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in saved["rows"].items():
        medians = dict(row["medians"])
        ours, best = medians.pop(row["ours"]), medians.pop(row["best_peer"], None)
        how = "" if row["ours"] == "ours" else f" ({row['ours'].removeprefix('ours, ')})"
        peer, ratio = ("", "") if best is None else (f"{best * 1e3:.3f} ({row['best_peer']})", f"{best / ours:.2f}x")
        expected = "" if row["expected"] is None else f"{row['expected'] * 1e3:.3f}"
        cells = [name, f"{ours * 1e3:.3f}{how}", expected]
        cells += [f"{row['rate']:,.0f} {row['unit']}", f"{row['share_of_ceiling']:.0%}"]
        cells += ["; ".join(map(_goal, row["goals"])), peer, ratio]
        cells.append(", ".join(f"{n} {s * 1e3:.3f}" for n, s in medians.items()))
        lines.append("| " + " | ".join(cells) + " |")
    if memory := saved.get("memory"):
        eager, ours = memory["eager"] / 2**20, memory["ours"] / 2**20
        met = "met" if 5 * ours <= eager else "missed"
        work = "linear_cross_entropy's peak memory without the gradients"
        lines.append(
            f"| {work} | {ours:,.0f} MiB | | | | a fifth: {met} | {eager:,.0f} MiB (eager) | {eager / ours:.1f}x | |"
        )
    return "\n".join(lines)


def short_table(saved: dict[str, Any]) -> str:
    """A saved result for a terminal, one line for each row: milliseconds, the best peer, and how many goals are met."""
    m = saved["machine"]
    lines = [
        f"{m['gpu']}, CUDA {m['cuda']}, PyTorch {m['torch']}, Triton {m['triton']}, Python {m['python']}, commit {m['commit']}, "
        f"{m['date']}: copy {m['copy_gb_per_s']:,.0f} GB/s, product {m['product_tflop_per_s']['bf16']:,.0f} TFLOP/s",
        *(f"not timed: {name}: {why.splitlines()[0]}"[:180] for name, why in saved["failed"].items()),
        f"{'':<56}{'ours':>9}{'predicted':>10}{'rate':>16}{'ceiling':>8}{'goals':>6}  how much faster than the best peer",
    ]
    for name, row in saved["rows"].items():
        medians, met = row["medians"], [goal["met"] for goal in row["goals"]]
        ours, best = medians[row["ours"]], medians.get(row["best_peer"])
        expected = "" if row["expected"] is None else f"{row['expected'] * 1e3:.3f}"
        rate, goals = f"{row['rate']:,.0f} {row['unit']}", f"{met.count(True)}/{len(met)}" if met else ""
        peer = "" if best is None else f"{best / ours:.2f}x {row['best_peer']}"
        how = "" if row["ours"] == "ours" else f", {row['ours']}"
        line = f"{name:<56}{ours * 1e3:>9.3f}{expected:>10}{rate:>16}{row['share_of_ceiling']:>8.0%}{goals:>6}  {peer}{how}"
        lines.append(line)
    return "\n".join(lines)


def section(saved: dict[str, Any]) -> str:
    """What docs/benchmarks.md shows of a saved result: on what it was measured, the table, and what failed."""
    m = saved["machine"]
    products = " and ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in m["product_tflop_per_s"].items())
    text = (
        f"{m['gpu']}, CUDA {m['cuda']}, PyTorch {m['torch']}, Triton {m['triton']}, Python {m['python']}, commit "
        f"{m['commit']}, {m['date']}; its ceilings: a copy at {m['copy_gb_per_s']:,.0f} GB/s, matrix products at {products} "
        f"TFLOP/s. The times predicted are an H100's.\n\n{table(saved)}"
    )
    notes = [f"- not timed: {name}: {why.splitlines()[0]}" for name, why in saved["failed"].items()]
    refused: dict[tuple[str, str], list[str]] = {}
    for name, row in saved["rows"].items():
        for peer, why in row["refused"].items():
            refused.setdefault((peer, why), []).append(name)
    for (peer, why), rows in refused.items():
        which = rows[0] if len(rows) == 1 else f"{rows[0]} and {len(rows) - 1} more"
        notes.append(f"- without {peer}: {which}: {why}")
    return "\n".join([text, *([""] if notes else []), *notes])
