"""What other programs left, by the real commands."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors.torch
import torch

from posae.pipeline.settings import ImportSettings
from posae.pipeline.stores.import_activations import Import

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
    assert (
        "standard with 16 features, layer 3, trained on some-model; the store holds activations of made-up"
        in ended.out
    )
    found = json.loads(posae("evaluate", run, "--json").out)
    assert 0.4 < found["fvu"] < 0.6  # the negative half is lost
    assert "standard" in posae("report", run).out
    # It is no training that could go on.
    ended = posae("train", store, run, "--layer", 3, "--preset", "paper-baseline")
    assert ended.code == 1
    assert "is a run already; give another folder" in ended.err


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations without contexts, as another program left them."""
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, np.random.default_rng(0).standard_normal((1003, 16)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def without_positions(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of them."""
    store = tmp_path_factory.mktemp("store") / "s.zarr"
    Import(rows, store, ImportSettings(layer=3, context_length=10)).run()
    return store


def test_rows_are_imported_inspected_trained_on_and_scored(
    rows: Path, posae: "Posae", tmp_path: Path
) -> None:
    store, run = tmp_path / "store.zarr", tmp_path / "run"
    words = ("import", rows, store, "--layer", 3, "--context-length", 10, "--held-out", 0.1)
    ended = posae(*words)
    assert ended.code == 0, ended.err
    assert "100 contexts of 10 tokens in layer 3" in ended.out
    assert "not known: documents, model, positions, special tokens, tokens" in ended.out
    assert "3 rows at the end do not fill a context" in ended.out
    assert "already finished" in posae(*words).out
    ended = posae(*words[:-1], 0.2)
    assert (ended.code, "held_out was" in ended.err) == (1, True)

    shown = posae("inspect-store", store, "--verify")
    assert shown.code == 0
    assert "from npy of float32; not known: documents, model, positions" in " ".join(shown.out.split())
    found = json.loads(posae("inspect-store", store, "--json").out)
    assert "positions" in found["manifest"]["imported"]["unknown"]
    ended = posae("inspect-store", store, "--context", 0)
    assert (ended.code, "without token ids" in ended.err) == (1, True)

    small = ("--steps", 4, "--batch-size", 64)
    ended = posae("train", store, run, "--architecture", "batchtopk", "--target-l0", 4, *small)
    assert ended.code == 0, ended.err
    assert json.loads((run / "evaluation.json").read_text())["contexts"] == [88, 100]
    for further in (("--ce-loss",), ("--probing", "offline")):
        ended = posae("evaluate", run, *further)
        assert (ended.code, "was imported" in ended.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "hierarchical depends"),
        (("--preset", "posae"), "batchtopk with a position mean depends"),
        (("--architecture", "topk", "--position-adapter", "bias"), "topk with a position adapter depends"),
        (("--architecture", "separate"), "separate depends"),
    ],
)
def test_what_depends_on_positions_is_refused_in_one_line(
    words: tuple[str, ...], what: str, without_positions: Path, posae: "Posae", tmp_path: Path
) -> None:
    ended = posae("train", without_positions, tmp_path / "run", *words)
    assert ended.code == 1
    told = " ".join(ended.err.split())
    assert f"was imported without positions, and {what}" in told
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_a_store_that_knows_positions_trains_what_depends_on_them(posae: "Posae", tmp_path: Path) -> None:
    x = torch.randn(48, 10, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 9, (48, 10), generator=torch.Generator().manual_seed(1))
    torch.save({"activations": x, "token_ids": ids}, tmp_path / "a.pt")
    ended = posae(
        "import", tmp_path / "a.pt", tmp_path / "s.zarr", "--layer", 3, "--special-token-ids", "0,1"
    )
    assert "not known: documents, model\n" in ended.out, ended.err
    ended = posae("train", tmp_path / "s.zarr", tmp_path / "run", "--steps", 4, "--batch-size", 64)
    assert ended.code == 0, ended.err
    ended = posae("inspect-store", tmp_path / "s.zarr", "--context", 0)
    assert (ended.code, "--tokenizer" in ended.err) == (1, True)
