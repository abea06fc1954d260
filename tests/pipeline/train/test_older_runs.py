"""Runs of before architectures declared their settings: ``config.json`` held those of all architectures."""

import json
from pathlib import Path
from typing import Any

import pytest

from posae.pipeline.errors import RunMismatchError
from posae.pipeline.report.measured import Measured
from posae.pipeline.runs import Run
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.sae.words import train_words
from posae.pipeline.train import Training
from posae.store import ActivationStore

from ...conftest import Made
from ..impatient import Impatient

FLAT: dict[str, Any] = {
    "l1_coefficient": 0.04,
    "sparsity_warmup": 0.0,
    "target_l0": 32,
    "auxiliary_coefficient": 1 / 32,
    "l0_coefficient": 1.0,
    "bandwidth": 0.03,
    "adapter_width": 8,  # filled in for all: half of d_model
    "adapter_share": None,
    "adapter_gain": 1.0,
    "dropout": 0.1,
    "layer_norm": "both",
    "layer_norm_affine": True,
    "adapter_norm": "after",
    "residual": True,
    "rectify": False,
    "penalty": "text",
    "base_loss_coefficient": 0.0,
    "decoder_bias": False,
    "mask": "hard",
    "mask_schedule": "fixed",
}
"""What only some architectures have, as it stood in every file."""

PRESETS = ("paper-baseline", "topk", "batchtopk", "jumprelu", "hard-mask", "separate-encoders")


def training(store: Made, folder: Path, preset: str, **more: Any) -> Training:
    values = {**train_presets()[preset], "ranges": "2", "steps": 20, "batch_size": 32, "window_contexts": 16}
    if values["architecture"] in ("topk", "batchtopk", "jumprelu"):
        values["target_l0"] = 4
    values |= {"checkpoint_steps": 5, **more}
    return Training(ActivationStore.open(store.root), folder, train_settings(values))


def make_older(run: Path) -> dict[str, Any]:
    """Write the configuration as posae did; its settings."""
    config = json.loads((run / "config.json").read_text())
    config["settings"] = {**FLAT, **config["settings"]}
    (run / "config.json").write_text(json.dumps(config))
    return config["settings"]


@pytest.mark.parametrize("preset", PRESETS)
def test_an_older_run_resumes_and_is_equal_to_a_new_one(
    preset: str, good_store: Made, tmp_path: Path
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    training(good_store, new, preset).train()
    with pytest.raises(KeyboardInterrupt):
        training(good_store, old, preset).train(Impatient(12))
    settings = make_older(old)
    assert training(good_store, old, preset).train().steps_done == 10
    weights = [(run / "sae_weights.safetensors").read_bytes() for run in (old, new)]
    assert weights[0] == weights[1]
    assert Run(old).config["settings"] == settings, "the file of a run does not change"
    of_new = Run(new).config["settings"]
    assert Measured(str(old), {"settings": settings}).settings == of_new
    assert train_words(settings, 16) == train_words(of_new, 16)


def test_what_differs_from_an_older_run_is_named_and_nothing_else(good_store: Made, tmp_path: Path) -> None:
    training(good_store, tmp_path, "topk").train()
    make_older(tmp_path)
    with pytest.raises(RunMismatchError, match="begun differently: target_l0 was 4 and is now 5; use"):
        training(good_store, tmp_path, "topk", target_l0=5).train()
    with pytest.raises(RunMismatchError, match="architecture was 'topk' and is now 'batchtopk'; use"):
        training(good_store, tmp_path, "batchtopk").train()


def test_a_setting_that_came_later_had_its_default(good_store: Made, tmp_path: Path) -> None:
    training(good_store, tmp_path, "topk").train()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["auxiliary_coefficient"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert training(good_store, tmp_path, "topk").train().steps_done == 0
    with pytest.raises(RunMismatchError, match="auxiliary_coefficient"):
        training(good_store, tmp_path, "topk", auxiliary_coefficient=0.5).train()
