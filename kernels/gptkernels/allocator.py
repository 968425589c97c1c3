"""Makes glibc keep freed memory in the process, because a training step soon asks for it again."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def tune_allocator() -> bool:
    """Tells glibc's malloc to keep the memory that tensors free.

    By default glibc gets each block of more than 32 MiB (in a fresh process, of more than 128 KiB) from the system, and gives
    it back when it is freed. The system then zeroes every page of the next tensor, which takes much of a CPU training
    step's time. After this call, freed blocks stay in one heap that all threads share.

    The process then never shrinks: it keeps the most memory that it has used, and slightly more, because a heap
    fragments. The setting affects the whole process and only CPU memory, and cannot be undone. The commands of `gptcore`
    make this call unless given ``--no-tune-allocator``; importing the library does not.

    Returns:
        True if glibc accepted the settings; False without glibc (musl, macOS, Windows), where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    limit = 2**31 - 1
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: limit, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    accepted = [libc.mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(accepted)
