"""Which device a stage runs on."""

import torch

from ..store.errors import SettingsError


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that a word means.

    Args:
        device: ``auto`` for the first there is of cuda, mps and cpu; else a name of torch's.
        local_rank: of many processes on a machine, which this one is: each takes the next GPU, where
            ``device`` does not name one by its number.

    Raises:
        SettingsError: no device of this name works here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return _gpu(local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"no device {device} can be used here: choose auto or cpu") from error
    return _gpu(local_rank) if chosen == torch.device("cuda") else chosen


def _gpu(local_rank: int) -> torch.device:
    # Where each process is shown but one GPU, that is number 0 to all of them.
    return torch.device("cuda", local_rank % torch.cuda.device_count())
