"""Which device a stage runs on."""

import pytest
import torch

from posae.pipeline.device import choose_device
from posae.store.errors import SettingsError


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    for device in ("gpu", "cuda:99", ""):
        with pytest.raises(SettingsError, match=f"no device {device} can be used here: choose auto or cpu"):
            choose_device(device)


def test_auto_takes_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
