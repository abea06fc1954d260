"""An architecture that posae does not have: this file and one entry of the registry are all it needs."""

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Unpack

import pytest
import torch
from torch import Tensor, nn

from posae.cli.app import main
from posae.pipeline.sae.autoencoder import Codes, CommonSettings
from posae.pipeline.sae.families import PAPER, L1Settings
from posae.pipeline.sae.plain import Plain
from posae.pipeline.sae.position_adapter import Rows, empty_weight
from posae.pipeline.sae.registry import ARCHITECTURES
from posae.pipeline.sae.saving import load_autoencoder
from posae.pipeline.settings import Group, Preset, TrainSettings, setting
from posae.pipeline.train.controls import CONTROLS

if TYPE_CHECKING:
    from ...conftest import MakeStore


class GainedSettings(L1Settings):
    """Settings of ``gained``."""

    architecture: str = "gained"
    """ReLU, L1, and a gain for each feature in each position range."""

    first_gain: float = setting(1.0, Group.ARCHITECTURE, gt=0)
    """Gain of each feature at the start."""


class Gained(Plain):
    """``standard`` with codes multiplied by a gain for each range and feature."""

    architecture: ClassVar[str] = "gained"
    settings: ClassVar[type[TrainSettings]] = GainedSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "gained": Preset("Gains by range, from 1.", PAPER),
        "gained-low": Preset("Gains by range, from a half.", {**PAPER, "first_gain": 0.5}),
    }
    agnostic_architecture: ClassVar[str | None] = "standard"

    def __init__(
        self, *, l1_coefficient: float, first_gain: float = 1.0, **common: Unpack[CommonSettings]
    ) -> None:
        super().__init__(**common)
        self.l1_coefficient, self.first_gain = l1_coefficient, first_gain
        n_gains = 1 if self.shared_adapters else len(self.ranges)
        self.gains = empty_weight(n_gains, self.dictionary_size, device=self.W_enc.device)
        self._start()

    def _initialise(self) -> None:
        super()._initialise()
        nn.init.constant_(self.gains, self.first_gain)

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        lengths = [len(scaled)] if self.shared_adapters else rows.needed_lengths()
        gains = self.gains.repeat_interleave(torch.tensor(lengths), dim=0)
        return Codes(self._activations(scaled, rows) * gains)

    def _sparsity(self, codes: Codes) -> Tensor:
        return self.sparsity_factor * self.l1_coefficient * codes.dense.abs().sum() / len(codes.dense)

    def base_parameters(self) -> int:
        return super().base_parameters() - self.gains.numel()


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Posae = Callable[..., Ended]

SMALL = ("--steps", 300, "--batch-size", 64, "--window-contexts", 8, "--checkpoint-steps", 20)


@pytest.fixture
def posae(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Posae:
    """The command line with the architecture registered."""
    monkeypatch.setitem(ARCHITECTURES, "gained", Gained)

    def run(*words: object) -> Ended:
        torch.set_num_threads(1)
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["posae", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def store(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gained") / "made.zarr"
    return make_store(root, n_contexts=40, context_length=16, layers=(1, 2), held_out=8).root


def weights(run: Path) -> bytes:
    return (run / "sae_weights.safetensors").read_bytes()


def test_its_options_stand_in_help_and_are_refused_with_others(
    posae: Posae, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = posae("train", "--help").out
    assert "--first-gain" in told
    assert "gained: ReLU, L1, and a gain" in " ".join(told.split()).replace("│ │ ", "")
    assert "gained-low" in told
    refused = posae("train", store, tmp_path / "run", "--architecture", "topk", "--first-gain", 2)
    assert "first_gain is a setting of gained, and means nothing to topk; leave it out" in " ".join(
        refused.err.split()
    )


def test_it_is_trained_killed_and_resumed_scored_and_reported(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = ("--architecture", "gained", "--ranges", 2, *SMALL)
    process = subprocess.Popen(
        [sys.executable, __file__, "train", str(store), str(killed), *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (killed / "checkpoint" / "state.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "sae_weights.safetensors").exists()
    for run in (killed, whole):
        ended = posae("train", store, run, *words)
        assert ended.code == 0, ended.err
    assert weights(killed) == weights(whole)
    settings = json.loads((whole / "config.json").read_text())["settings"]
    assert settings["first_gain"] == 1.0
    assert not settings.keys() & {"target_l0", "adapter_width", "mask"}
    refused = posae("train", store, whole, *words, "--first-gain", 2)
    assert (refused.code, "first_gain was 1.0 and is now 2.0" in refused.err) == (1, True)
    scores = json.loads(posae("evaluate", whole, "--json").out)
    assert scores["n_parameters"] - scores["n_base_parameters"] == 2 * scores["dictionary_size"]
    assert "gained" in posae("report", whole, killed).out


def test_a_sweep_sets_it_beside_all_its_controls(posae: Posae, store: Path, tmp_path: Path) -> None:
    file, runs = tmp_path / "sweep.toml", tmp_path / "runs"
    file.write_text(
        'study = "gains"\n[train]\nsteps = 20\nbatch_size = 64\nwindow_contexts = 8\nranges = "2"\n'
        '[runs.low]\npreset = "gained-low"\n'
    )
    ended = posae("train", store, runs, "--sweep", file)
    assert ended.code == 0, ended.err
    found = {
        path.parent.parent.name: json.loads(path.read_text())["settings"]
        for path in runs.glob("*/seed-0/config.json")
    }
    assert found.keys() == {"low", *(f"low.{role}" for role in CONTROLS)}
    assert found["low"]["first_gain"] == 0.5
    assert found["low.shared"] == {**found["low"], "shared_adapters": True}
    assert found["low.agnostic"]["architecture"] == "standard"
    assert "first_gain" not in found["low.agnostic"]
    assert found["low.more-active"]["l1_coefficient"] == pytest.approx(0.9 * 0.04)
    (study,) = json.loads((runs / "sweep.json").read_text())["studies"]
    assert next(run for run in study["runs"] if run["name"] == "low")["has_adapters"] is True
    assert "low" in posae("report", runs).out


def test_saelens_opens_it_once_it_is_registered(posae: Posae, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = posae("train", store, run, "--preset", "gained-low", "--ranges", 2, *SMALL)
    assert ended.code == 0, ended.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own dependencies, at import
        sae_lens: Any = pytest.importorskip("sae_lens", reason="sae-lens is not installed: see .ci/run")
    from posae.pipeline.interop.saelens import register_architectures

    register_architectures()
    theirs = sae_lens.SAE.load_from_disk(run)
    assert theirs.cfg.architecture() == "posae_gained"
    x, positions = torch.randn(3, 16, 16), torch.arange(16)
    assert torch.equal(theirs.encode(x, positions), load_autoencoder(run).encode(x, positions))


if __name__ == "__main__":
    ARCHITECTURES["gained"] = Gained
    main()
