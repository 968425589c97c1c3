"""The tables and worked examples of docs/gpu-model.md, made from what `bench.expected` predicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptkernels.testing import SPECS, Case, OpSpec

from bench import expected, h100
from bench.h100 import H100
from bench.measure import BF16
from bench.rows import directions, row_name, work

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu-model.md"


def _rows() -> Iterator[tuple[OpSpec, Case, str, list[dict[str, Any]]]]:
    """The rows of bench.gpu that the saved file holds, with their launches."""
    for spec in SPECS:
        for case in spec.bench_cases:
            for direction in directions(spec):
                if launches := expected.saved()["rows"].get(row_name(spec, case, BF16, direction)):
                    yield spec, case, direction, launches


def _rate(spec: OpSpec, case: Case, direction: str, time: float) -> str:
    """The rate of the work that the spec counts: FLOP/s of operations made of matrix products, else bytes/s."""
    flops, moved = work(spec, case, BF16, direction)
    if flops > 100 * moved:
        return f"{flops / time / 1e12:,.0f} TFLOP/s, {flops / time / H100.product_rate:.0%}"
    return f"{moved / time / 1e9:,.0f} GB/s, {moved / time / H100.bandwidth:.0%}"


def _markdown(header: str, rows: Iterator[list[str]]) -> str:
    names = header.split(" | ")
    lines = [f"| {header} |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in dict.fromkeys(map(tuple, rows))])


def rows_table() -> str:
    """Every row of bench.gpu: its predicted time and rate."""

    def cells() -> Iterator[list[str]]:
        for spec, case, direction, launches in _rows():
            time, between = expected.seconds(spec, case, BF16, direction), expected.bounds(spec, case, BF16, direction)
            assert time is not None
            assert between is not None
            fast, slow = (f"{1e3 * bound:.3f}" for bound in between)
            count = sum(launch["count"] for launch in launches)
            yield [
                f"{spec.name} {case.name}: {direction}",
                str(count),
                f"{1e3 * time:.3f}",
                "" if fast == slow else f"{fast} to {slow}",
                _rate(spec, case, direction, time),
            ]

    made = f"Compiled for {expected.saved()['target']} by Triton {expected.saved()['triton']}.\n\n"
    return made + _markdown("work, bf16 | launches | ms | with full to no overlap | rate, share of ceiling", cells())


def attention_table() -> str:
    """Attention's kernels, each once: the work of a tile, and how long each part of it takes."""
    seen: set[tuple[str, ...]] = set()

    def cells() -> Iterator[list[str]]:
        for _, case, _, launches in _rows():
            for launch in launches:
                tiles = expected.attention_tiles(launch) if "figures" in launch else None
                if tiles is None:
                    continue
                figures, sizes = expected.saved()["kernels"][launch["figures"]], launch["constants"]
                programs = h100.at_a_time(launch, figures)
                loops = [loop for loop in figures["loops"] if loop.get("flops")]
                flops = expected.PRODUCTS[launch["kernel"]] * 2 * sizes["BLOCK_M"] * sizes["BLOCK_N"] * sizes["BLOCK_D"]
                counts = sorted(loop["instructions"] * flops / (loop["flops"] * launch["warps"]) for loop in loops)
                special = loops[0].get("special", 0) * 32 * flops / loops[0]["flops"]
                plain, masked = tiles
                row = [
                    launch["kernel"],
                    f"{sizes['BLOCK_M']} x {sizes['BLOCK_N']}, {launch['warps']} warps",
                    f"{figures['registers']}" + (f", {figures['spills']} spills" if figures["spills"] else ""),
                    str(programs),
                    f"{counts[0]:.0f}, {counts[-1]:.0f}" + (", wgmma serialised" if figures["serialised"] else ""),
                    f"{special:,.0f}",
                    f"{1e9 * plain.multiply:.0f}, {1e9 * plain.feed:.0f}",
                    f"{1e9 * plain.softmax:.0f}",
                    f"{1e9 * plain.loads:.0f}",
                    f"{1e9 * plain.seconds(programs, H100.overlap):.0f}",
                    f"{1e9 * masked.seconds(programs, H100.overlap):.0f}",
                ]
                if tuple(row) not in seen:
                    seen.add(tuple(row))
                    yield [*row, case.name]

    header = "kernel | tile | registers | programs an SM | instructions a warp, plain, masked | exponentials | "
    header += (
        "products: tensor cores, shared memory, ns | softmax, ns | loads, ns | tile, ns | masked, ns | for instance in"
    )
    return _markdown(header, cells())


def streaming_table() -> str:
    """The memory-bound kernels that take at least a tenth of their row: bytes, loads in flight, instructions."""

    def cells() -> Iterator[list[str]]:
        for spec, case, direction, launches in _rows():
            for launch in launches:
                if "figures" not in launch or expected.attention_tiles(launch) or launch["kernel"] == "_scale_kernel":
                    continue
                figures = expected.saved()["kernels"][launch["figures"]]
                moved = launch.get("read", 0) + launch.get("written", 0)
                again = h100.read_again(launch, figures)
                time = h100.streaming_seconds(launch, figures)
                if time < (expected.seconds(spec, case, BF16, direction) or 0.0) / 10:
                    continue
                yield [
                    launch["kernel"],
                    f"{spec.name} {case.name}: {direction}",
                    f"{launch['warps']}, {figures['registers']}" + (f", {figures['spills']} spills" if figures["spills"] else ""),
                    str(h100.at_a_time(launch, figures)),
                    f"{moved / 1e6:,.1f}" + (f" + {again / 1e6:,.1f}" if again else ""),
                    f"{h100.in_flight(launch, figures) / 1024:.0f}",
                    f"{h100.issue_seconds(launch, figures) / time:.0%}",
                    f"{1e6 * time:.1f}",
                ]  # fmt: skip

    header = "kernel | in | warps, registers | programs an SM | MB moved + read again | KiB in flight an SM | "
    return _markdown(header + "issuing | us", cells())


def training_table() -> str:
    """The parts of the training step and their times."""
    parts, total = expected.training_parts(), expected.training_seconds()
    rows = [[name, f"{1e3 * part:.2f}", f"{part / total:.0%}"] for name, part in parts.items()]
    tokens = expected.BATCH * 1024
    rows.append([f"all: {tokens / total:,.0f} tokens/s", f"{1e3 * total:.2f}", ""])
    return _markdown("part | ms | share", iter(rows))


def _case(op: str, name: str) -> tuple[OpSpec, Case]:
    spec = next(spec for spec in SPECS if spec.name == op)
    return spec, next(case for case in spec.bench_cases if case.name == name)


def worked_streaming() -> str:
    """A memory-bound kernel, step by step."""
    spec, case = _case("layer_norm", "4096x8192")
    (launch,) = expected.saved()["rows"][row_name(spec, case, BF16, "forward")]
    figures = expected.saved()["kernels"][launch["figures"]]
    together, warps = h100.at_a_time(launch, figures), launch["warps"]
    loads, instructions = figures["straight"]["loads"], figures["straight"]["instructions"]
    read, moved = launch["read"], launch["read"] + launch["written"]
    needed = H100.bandwidth * H100.latency / H100.multiprocessors
    waited, flying = needed * read / moved, h100.in_flight(launch, figures)
    issuing, time = h100.issue_seconds(launch, figures), h100.streaming_seconds(launch, figures)
    steps = [
        f"Bytes: {read / 1e6:.1f} MB are read and {launch['written'] / 1e6:.1f} MB written. "
        f"At 3.0 TB/s these {moved / 1e6:.1f} MB take {1e6 * moved / H100.bandwidth:.1f} us.",
        "Loads under way: for 3.0 TB/s to arrive after a latency of 0.7 us, 3.0e12 x 0.7e-6 / 132 = "
        f"{needed / 1e3:.1f} kB must be under way to each multiprocessor; for the reads alone, since nothing waits for writes, "
        f"these are {waited / 1e3:.1f} kB. A program has {warps} warps and {figures['registers']} registers a thread, so that "
        f"{together} share a multiprocessor. A thread requests {loads} bytes at once and waits for them half of the time: "
        f"{together} x {warps} x 32 x {loads} / 2 = {flying / 1e3:.0f} kB. "
        + ("Enough." if flying >= waited else f"This is only {flying / waited:.0%} of that: the bytes take longer."),
        f"Instructions: {launch['programs']:,} programs x {warps} warps x {instructions}, 4 a cycle on each of 132 "
        f"multiprocessors at 1.75 GHz, are {1e6 * issuing:.1f} us. They overlap with the loads: the longer time counts.",
        f"The launch: 2.5 us. Together **{1e6 * time:.1f} us**, or {moved / time / 1e9:,.0f} GB/s.",
    ]
    title = "`layer_norm` of 4,096 rows of 8,192 bfloat16 numbers, forward:"
    return "\n".join([title, "", *(f"{number}. {step}" for number, step in enumerate(steps, 1))])


def worked_attention() -> str:
    """An attention kernel, step by step."""
    spec, case = _case("attention", "B4-H12-T4096-D64-causal")
    (launch,) = expected.saved()["rows"][row_name(spec, case, BF16, "forward")]
    figures, sizes, warps = expected.saved()["kernels"][launch["figures"]], launch["constants"], launch["warps"]
    tiles = expected.attention_tiles(launch)
    time = expected.seconds(spec, case, BF16, "forward")
    assert tiles is not None
    assert time is not None
    plain = tiles[0]
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    flops = 2 * 2 * m * n * 64
    loops = [loop for loop in figures["loops"] if loop.get("flops")]
    loop = min(loops, key=lambda loop: loop["instructions"] / loop["flops"])
    of_tile = flops / loop["flops"]  # work of all warps for a tile / work of one warp in a turn of the loop
    instructions, special = loop["instructions"] * of_tile, loop["special"] * of_tile * 32
    together = h100.at_a_time(launch, figures)
    costs = [kind.seconds(together, H100.overlap) for kind in tiles]
    programs = expected.programs(launch, case.parameters)
    counts = [sum(kind) for kind in zip(*programs)]
    work = sum(count * seconds for count, seconds in zip(counts, costs)) / H100.multiprocessors
    waiting = 2 * H100.latency * launch["programs"] / H100.multiprocessors / together
    done = spec.cost(case, BF16).forward_flops
    hidden = f"less {H100.overlap[1]:.0%} of the shorter time, because programs share the multiprocessor"
    steps = [
        f"Products of a tile, scores and output: 2 x 2 x {m} x {n} x 64 = {flops / 1e6:.2f} MFLOP. A multiprocessor's share of "
        f"798 TFLOP/s is 6.05 TFLOP/s: {1e9 * plain.multiply:.0f} ns. Its shared memory moves "
        f"{loop['shared_bytes'] * of_tile / 1024:.0f} KiB for them, 128 bytes a cycle: {1e9 * plain.feed:.0f} ns.",
        f"Softmax of a tile: {special:,.0f} exponentials, 16 a cycle, are {special / 16:.0f} cycles; {instructions:,.0f} "
        f"instructions of {warps} warps, 4 a cycle, are {instructions / 4:.0f}. The longer time counts, at 1.75 GHz: "
        f"{1e9 * plain.softmax:.0f} ns.",
        f"Loads of a tile, keys and values: {2 * n * 64 * 2 / 1024:.0f} KiB. The second-level cache gives all 132 "
        f"multiprocessors 5.5 TB/s: {1e9 * plain.loads:.0f} ns, at the same time as the rest.",
        f"A tile: products and softmax one after the other{', ' + hidden if together > 1 else ''}: {1e9 * costs[0]:.0f} ns. "
        f"A tile on the diagonal also computes the mask: {1e9 * costs[1]:.0f} ns.",
        f"All tiles: the program of a head's last {m} queries has {programs[0][0]} whole tiles and {programs[0][1]} on the "
        f"diagonal, that of its first {programs[len(programs) // 48 - 1][0]} and {programs[len(programs) // 48 - 1][1]}. Over "
        f"48 heads they are {counts[0]:,} and {counts[1]:,}, on 132 multiprocessors {1e6 * work:.0f} us.",
        f"Waiting: each of {launch['programs']:,} programs waits twice for memory, 0.7 us each, {together} at a time on a "
        f"multiprocessor: {1e6 * waiting:.0f} us.",
        "The tail: programs do not all end at once. They start in the order of the launch, each where there is room first; "
        f"the last one ends {1e6 * (time - work - waiting - H100.launch):.0f} us later than if all ended at once.",
        f"The launch: 2.5 us. Together **{1e6 * time:.0f} us**; {done / 1e9:.0f} GFLOP (half of the square counted) are "
        f"{done / time / 1e12:.0f} TFLOP/s.",
    ]
    title = (
        "`attention` of 4 sequences, 12 heads, 4,096 tokens, head_dim 64, causal, forward. A program takes "
        f"{m} queries and iterates over their keys in tiles of {n}, with {warps} warps and {figures['registers']} registers a "
        f"thread; {together} on a multiprocessor at a time:"
    )
    return "\n".join([title, "", *(f"{number}. {step}" for number, step in enumerate(steps, 1))])


SECTIONS: dict[str, Callable[[], str]] = {
    "worked streaming": worked_streaming,
    "worked attention": worked_attention,
    "expected rows": rows_table,
    "expected training": training_table,
    "expected attention": attention_table,
    "expected streaming": streaming_table,
}


def rewritten(text: str) -> str:
    """The document's `text` with a new table or example between each pair of markers.

    Raises:
        ValueError: a section has no markers, or several pairs.
    """
    for name, section in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, s=section: f"{found[1]}{s()}\n{found[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{name}: got {count} pairs of markers; accepted is one")
    return text
