"""Which device a stage runs on, and how much memory is free there."""

import psutil
import torch

from ..store.errors import SettingsError


def choose_device(device: str) -> torch.device:
    """The device that a word means.

    Args:
        device: ``auto`` for the first there is of cuda, mps and cpu; else a name of torch's.

    Raises:
        SettingsError: no device of this name works here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"no device {device} can be used here: choose auto or cpu") from error
    return chosen


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now: of a GPU its own, else the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
