"""Memory that is freed on a CPU and fetched again in the next step."""

import ctypes
from contextlib import suppress

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_MOST = 2**31 - 1


def keep_freed_memory(device: torch.device) -> bool:
    """
    Let the C library keep what training frees, instead of giving it back to the system.

    A step frees what the next one asks for again, and a fresh page costs as much as filling it. The process keeps the
    memory of its largest step, with gaps. GPUs have an allocator of their own, which does this anyway.

    Returns:
        Whether that was done: on CPUs, where the C library is glibc.
    """
    if device.type != "cpu":
        return False
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (an AttributeError elsewhere)
        return all(library.mallopt(which, value) for which, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST)))
    return False
