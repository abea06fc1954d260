"""Which device a stage runs on, what of processors and memory there is, and what becomes of freed memory."""

import ctypes
import os
from collections.abc import Iterator

import psutil
import torch

from ..store.errors import SettingsError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def choose_device(device: str, local_rank: int = 0, *, with_float64: bool = False) -> torch.device:
    """The device that a word means.

    Args:
        device: ``auto`` for the first there is of cuda, mps and cpu; else a name of torch's.
        local_rank: of many processes on a machine, which this one is: each takes the next GPU, where
            ``device`` does not name one by its number.
        with_float64: whether scores are added up there in float64, which mps does not have.

    Raises:
        SettingsError: no device of this name works here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return _gpu(local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() and not with_float64 else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen, dtype=torch.float64 if with_float64 else None)
        if chosen.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingsError(f"device {device} is not available: use auto or cpu") from error
    return _gpu(local_rank) if chosen == torch.device("cuda") else chosen


def _gpu(local_rank: int) -> torch.device:
    # If each process sees only one GPU, that is number 0 for all of them.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def n_cores() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the machine for other devices."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def numbers_at_once(device: torch.device) -> int:
    """Block size, in numbers, for work that makes several copies of a tensor.

    On a CPU a megabyte of float32, which stays in the cache; on a GPU, to keep it busy, what fits into half
    of its free memory as 16 copies in float64.
    """
    if device.type == "cuda":
        return max(2**20, min(2**28, free_bytes(device) // 256))
    return 2**18


def blocks_of_rows(of: torch.Tensor) -> Iterator[slice]:
    """Rows of a tensor [rows, columns] in blocks of ``numbers_at_once``, in order.

    >>> list(blocks_of_rows(torch.empty(5, 2**17)))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    n_rows, n_columns = of.shape
    size = max(1, numbers_at_once(of.device) // n_columns)
    return (slice(start, start + size) for start in range(0, n_rows, size))


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next large tensors, in the whole process.

    glibc returns blocks of some megabytes to the system at once, so every training step on a CPU allocates
    its pages again: up to a quarter of its time. Does nothing elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
