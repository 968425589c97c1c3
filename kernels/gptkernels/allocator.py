"""Memory that a training step frees and asks for again a moment later, kept in the process instead of given back."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def tune_allocator() -> bool:
    """Tells glibc's malloc to keep the memory that tensors free; True where it did.

    By default glibc takes each block of more than 32 MiB, and in a fresh process of more than 128 KiB, from the system and
    gives it back when it is freed. The next tensor's pages are then zeroed by the kernel one by one, at every step:
    much of a CPU training step's time. After this call freed blocks stay in one heap that all threads share.

    The price is that the process does not shrink: its memory stays at the highest it has reached, and a little above (a
    heap fragments). It holds for the process, cannot be undone, and concerns CPU memory alone. The commands of `gptcore`
    call it unless told ``--no-tune-allocator``; nothing calls it at import.

    Returns:
        False where there is no glibc (musl, macOS, Windows): nothing has changed there.
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
