"""What other programs left, by the real commands."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

if TYPE_CHECKING:
    from ..conftest import MakeStore
    from .conftest import Posae


def test_an_autoencoder_of_saelens_is_imported_scored_and_reported(
    make_store: "MakeStore", posae: "Posae", tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store.zarr", n_contexts=48, layers=(3,), held_out=24).root
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    theirs.mkdir()
    weights = {
        "W_enc": torch.eye(16),
        "b_enc": torch.zeros(16),
        "W_dec": torch.eye(16),
        "b_dec": torch.zeros(16),
    }
    (theirs / "sae_weights.safetensors").write_bytes(safetensors.torch.save(weights))
    metadata = {"sae_lens_version": "6.0.0", "model_name": "some-model"}
    cfg = {"architecture": "standard", "d_in": 16, "d_sae": 16, "dtype": "float32", "metadata": metadata}
    (theirs / "cfg.json").write_text(json.dumps(cfg))

    ended = posae("import-sae", theirs, run, "--store", store)
    assert ended.code == 1
    assert "--layer" in ended.err
    ended = posae("import-sae", theirs, run, "--store", store, "--layer", 3)
    assert ended.code == 0, ended.err
    assert "standard of 16 features, layer 3, trained on some-model; the store is of made-up" in ended.out
    found = json.loads(posae("evaluate", run, "--json").out)
    assert 0.4 < found["fvu"] < 0.6  # the negative half is lost
    assert "standard" in posae("report", run).out
    # It is no training that could go on.
    ended = posae("train", store, run, "--layer", 3, "--preset", "paper-baseline")
    assert ended.code == 1
    assert "was begun otherwise" in ended.err
