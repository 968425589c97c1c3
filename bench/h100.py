"""A model of an H100: its figures, and how long a kernel should take on it. docs/gpu-model.md works two examples by hand."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

Overlap = tuple[float, float]
"""(of a program alone on its multiprocessor, of one that shares it): see `Card.overlap`."""


@dataclass(frozen=True)
class Card:
    """NVIDIA H100 SXM5 80GB. Figures that NVIDIA does not publish are marked "measured" or "assumed"."""

    multiprocessors: int = 132
    clock: float = 1.75e9
    """Hz under load, assumed: between the maximum of 1.98e9 and 1.48e9, which would give `product_rate` if tensor cores never
    waited."""
    product_rate: float = 798e12
    """FLOP/s of a product of 8,192 x 8,192 bf16 matrices, measured on one H100 80GB HBM3, 2026-11-13 (datasheet: 989e12)."""
    bandwidth: float = 3.0e12
    """bytes/s of a copy within the GPU's memory, measured on the same card (datasheet: 3.35e12)."""
    cache_bandwidth: float = 5.5e12
    """bytes/s from the second-level cache (measured by Chips and Cheese on the PCIe card)."""
    cache_bytes: int = 50 * 2**20
    latency: float = 0.7e-6
    """seconds from a load to its data while memory is busy, assumed (about 0.3e-6 while it is idle)."""
    launch: float = 2.5e-6
    """seconds that a kernel takes in addition to its work, assumed: start, first load, last store, end."""
    schedulers: int = 4
    """warps for which a multiprocessor issues an instruction in each cycle; one takes 32 of float32's 128 lanes."""
    special_lanes: int = 16
    """exponentials, logarithms, reciprocals or square roots that a multiprocessor computes in each cycle."""
    shared_bandwidth: int = 128
    """bytes that a multiprocessor's shared memory gives in each cycle."""
    shared_bytes: int = 228 * 1024
    registers: int = 65536
    threads: int = 2048
    overlap: Overlap = (0.0, 1 / 3)
    """The share of the shorter of matrix products and softmax that overlaps with the longer: in a program alone on its
    multiprocessor, and in one that shares it. Assumed; FlashAttention-3's published speeds correspond to a third to a half."""
    small_product: float = 0.75
    """The share of `product_rate` that products with a dimension under 1,024 reach, assumed (600 TFLOP/s)."""


H100 = Card()
Tiles = tuple[int, int]
"""(plain, masked): how many tiles a program computes without a mask, and with one."""


def cdiv(n: int, by: int) -> int:
    return -(-n // by)


def resident(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> int:
    """How many programs of a kernel one multiprocessor holds at a time, limited by registers, shared memory and threads."""
    warps = launch["warps"]
    registers = cdiv(32 * figures["registers"], 256) * 256 * warps  # allocated to a warp in pieces of 256
    shared = figures["shared"] + 1024  # CUDA reserves 1 KiB for each program
    return max(1, min(32, card.registers // registers, card.shared_bytes // shared, card.threads // (32 * warps)))


def at_a_time(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> int:
    """How many programs share a multiprocessor: as many as it holds, or fewer if the launch has fewer."""
    return min(resident(launch, figures, card), cdiv(launch["programs"], card.multiprocessors))


def _passes(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The loops of a streaming kernel that each load all of its input. Decoding's loops share the keys and count as one."""
    loading = [loop for loop in figures["loops"] if loop.get("loads")]
    sharing = [loop for loop in loading if loop.get("flops")]
    return sharing[:1] or loading


def issue_seconds(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> float:
    """Seconds to issue a streaming kernel's instructions, or to compute its exponentials if that takes longer.

    Code outside of loops runs once; a loop runs until it has loaded what the kernel reads.
    """
    turns = [(figures["straight"], launch["programs"] * launch["warps"])]  # of one warp
    turns += [(loop, launch["read"] / (32 * loop["loads"])) for loop in _passes(figures)]
    cycles = sum(
        count * max(section["instructions"] / card.schedulers, section.get("special", 0) * 32 / card.special_lanes)
        for section, count in turns
    )
    return cycles / card.multiprocessors / card.clock


def in_flight(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> float:
    """Bytes that are on their way to a multiprocessor at a time, on average.

    Each thread requests what one section of its code loads and waits for it half of the time. In a loop that loads ahead, it
    always has the tiles ahead on their way.
    """
    sections = _passes(figures) or [figures["straight"]]
    stages = launch["constants"].get("STAGES", launch["stages"])
    ahead = max(stages - 1, 1) if any(section.get("async") for section in sections) else 1 / 2
    thread = max(section.get("loads", 0) for section in sections)
    return at_a_time(launch, figures, card) * launch["warps"] * 32 * thread * ahead


def read_again(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> float:
    """Bytes that are read from memory more than once: by every loop but the first, as far as the cache no longer holds them.

    Between two reads of the same bytes the cache takes in what all running programs read, and keeps the last of it, which a
    loop that walks backwards reads first.
    """
    between = launch["read"] / launch["programs"] * at_a_time(launch, figures, card) * card.multiprocessors
    lost = max(0.0, 1 - card.cache_bytes / between) if between else 0.0
    return max(len(_passes(figures)) - 1, 0) * launch["read"] * lost


def streaming_seconds(launch: Mapping[str, Any], figures: Mapping[str, Any], card: Card = H100) -> float:
    """Seconds of a memory-bound kernel: the launch, and the longer of its instructions and its bytes.

    The bytes move at the bandwidth that the loads in flight allow.
    """
    read = launch.get("read", 0) + read_again(launch, figures, card)
    moved = read + launch.get("written", 0)
    # Little's law, for the reads alone: no thread waits for what it writes.
    needed = card.bandwidth * card.latency / card.multiprocessors * read / moved
    share = min(1.0, in_flight(launch, figures, card) / needed) if needed else 1.0
    return card.launch + max(moved / (card.bandwidth * share), issue_seconds(launch, figures, card))


def pytorch_seconds(launch: Mapping[str, Any], card: Card = H100) -> float:
    """Seconds of a PyTorch kernel: its bytes at the bandwidth or, of a matrix product, its FLOPs if they take longer."""
    moved = launch.get("read", 0) + launch.get("written", 0)
    seconds = moved / card.bandwidth
    if "product" in launch:
        m, k, n = launch["product"]
        share = card.small_product if min(m, k, n) < 1024 else 1.0
        seconds = max(seconds, 2 * m * k * n / (share * card.product_rate))
    return card.launch + seconds


# Attention: tiles of queries by keys.


def key_tiles(start: int, queries: int, keys: int, causal: bool, window: int, block_m: int, block_n: int) -> Tiles:
    """How many tiles of keys the block of queries from `start` on computes (`window` 0: no window); see `key_range`."""
    diagonal = keys - queries
    begin, whole_from, whole_to, end = 0, 0, keys, keys
    if causal:
        end = max(min(keys, start + diagonal + block_m), 0)
        whole_to = max(min(keys, start + diagonal + 1), 0)
    whole_to = whole_to // block_n * block_n
    if window:
        first_seen = start + diagonal - window + 1
        begin = max(first_seen, 0) // block_n * block_n
        whole_to = max(whole_to, begin)
        whole_from = min(cdiv(max(first_seen + block_m - 1, 0), block_n) * block_n, whole_to)
    masked = (whole_from - begin) // block_n + cdiv(max(end - whole_to, 0), block_n)
    return (whole_to - whole_from) // block_n, masked


def query_tiles(start: int, queries: int, keys: int, causal: bool, window: int, block_m: int, block_n: int) -> Tiles:
    """How many tiles of queries the block of keys from `start` on computes in `_dkdv_kernel`."""
    diagonal = keys - queries
    first, whole_from, last = 0, 0, queries
    if causal:
        first = min(max(start - diagonal, 0) // block_m * block_m, queries)
        whole_from = cdiv(max(start + block_n - 1 - diagonal, 0), block_m) * block_m
    if window:
        last = min(last, max(start + block_n - 1 - diagonal + window, 0))
    whole_from = min(whole_from, cdiv(last, block_m) * block_m)
    whole_to = last
    if window:
        whole_to = max(min(last, max(start - diagonal + window, 0) // block_m * block_m), whole_from)
    masked = cdiv(max(whole_from - first, 0), block_m) if causal else 0
    return cdiv(max(whole_to - whole_from, 0), block_m), masked + cdiv(max(last - whole_to, 0), block_m)


@dataclass(frozen=True)
class Tile:
    """Seconds that each unit of a multiprocessor needs for one tile."""

    multiply: float
    """of the tensor cores"""
    feed: float
    """of the shared memory that feeds the tensor cores"""
    softmax: float
    """of the longer of issuing all instructions and computing the exponentials"""
    loads: float
    """of the second-level cache, while all multiprocessors load"""

    @property
    def products(self) -> float:
        return max(self.multiply, self.feed)

    def seconds(self, programs: int, overlap: Overlap) -> float:
        """Seconds of a tile with `programs` on the multiprocessor: products, then softmax, less what overlaps."""
        hidden = overlap[programs > 1] * min(self.products, self.softmax)
        return max(self.products + self.softmax - hidden, self.loads)


def tile(section: Mapping[str, Any], flops: int, loaded: int, warps: int, card: Card = H100) -> Tile:
    """The tile of a loop's code (`section`); `flops` and `loaded` bytes are of one tile, a turn may compute several."""
    tiles = warps * section["flops"] / flops  # of one turn of the loop
    cycles = warps / tiles / card.clock
    shared = cycles * section.get("shared_bytes", 0) / card.shared_bandwidth
    issued = cycles * section["instructions"] / card.schedulers
    special = cycles * section.get("special", 0) * 32 / card.special_lanes
    multiply = flops / (card.product_rate / card.multiprocessors)
    return Tile(multiply, shared, max(issued, special), loaded * card.multiprocessors / card.cache_bandwidth)


def makespan(programs: Sequence[Sequence[float]], multiprocessors: int) -> float:
    """Seconds until the last program ends. They start in this order, each on the multiprocessor that has room first.

    `programs`: for each the seconds that it takes alone on a multiprocessor, as one of two, of three, and so on, up to as
    many as a multiprocessor holds.
    """
    waiting = iter(programs)
    running: list[list[tuple[float, Sequence[float]]]] = [[] for _ in range(multiprocessors)]  # (share left, seconds)

    def next_end(index: int) -> float:
        return min(left * seconds[len(running[index]) - 1] for left, seconds in running[index])

    for _ in programs[0] if programs else ():  # one round of all multiprocessors after another
        for members in running:
            members += [(1.0, seconds) for seconds in itertools.islice(waiting, 1)]
    # For each busy multiprocessor the time of its next end, and the time at which `running` holds.
    events = [(next_end(index), index, 0.0) for index, members in enumerate(running) if members]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, index, since = heapq.heappop(events)
        sharing = len(running[index])
        left = [(share - (now - since) / seconds[sharing - 1], seconds) for share, seconds in running[index]]
        running[index] = [member for member in left if member[0] > 1e-9]
        room = sharing - len(running[index])
        running[index] += [(1.0, seconds) for seconds in itertools.islice(waiting, room)]
        if running[index]:
            heapq.heappush(events, (now + next_end(index), index, now))
    return now


def attention_seconds(
    launch: Mapping[str, Any],
    figures: Mapping[str, Any],
    programs: Sequence[Tiles],
    kinds: tuple[Tile, Tile],
    overlap: Overlap = H100.overlap,
    card: Card = H100,
) -> float:
    """Seconds of an attention kernel. `programs`: how many tiles of the two `kinds` each computes, in the launch's order.

    Every program also waits twice for memory: for its own tile before the loop, and for the first tile of the loop.
    """
    plain, masked = kinds
    together = range(1, at_a_time(launch, figures, card) + 1)

    @cache
    def alone_and_sharing(whole: int, partial: int) -> tuple[float, ...]:
        of_tiles = (whole * plain.seconds(n, overlap) + partial * masked.seconds(n, overlap) for n in together)
        return tuple(2 * card.latency + n * seconds for n, seconds in zip(together, of_tiles))

    work = [alone_and_sharing(*tiles) for tiles in programs if any(tiles)]
    memory = (launch.get("read", 0) + launch.get("written", 0)) / card.bandwidth
    return card.launch + max(makespan(work, card.multiprocessors), memory)
