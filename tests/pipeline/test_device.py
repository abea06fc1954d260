"""Which device a stage runs on."""

import pytest
import torch

from posae.pipeline.device import choose_device
from posae.store.errors import SettingsError


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    for device in ("gpu", "cuda:99", "", "meta"):
        with pytest.raises(SettingsError, match=f"device {device} is not available: use auto or cpu"):
            choose_device(device)


def test_auto_takes_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    assert choose_device("auto", with_float64=True).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto").type == "cuda"


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [choose_device("auto", rank).index for rank in range(5)] == [0, 1, 2, 3, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # SLURM shows each process only its own
    assert choose_device("auto", 3).index == 0
    assert choose_device("cpu", 3) == torch.device("cpu")
