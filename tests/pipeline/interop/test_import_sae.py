"""Autoencoders that SAELens saved, evaluated on a store of posae; and those that cannot be."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch

from posae.pipeline.errors import RunError, RunMismatchError, RunNotFoundError
from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.interop.import_sae import import_sae
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.foreign import read_foreign
from posae.pipeline.sae.hierarchical import Hierarchical
from posae.pipeline.sae.saving import load_autoencoder, save_autoencoder
from posae.pipeline.settings import EvaluateSettings, ImportSaeSettings
from posae.store import ActivationStore
from posae.store.errors import PosaeError, SettingsError, StoreIncompleteError

from ...conftest import tree

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

D_MODEL, FEATURES, LENGTH, LAYER = 16, 24, 6, 3
METADATA = {
    "sae_lens_version": "6.54.12",
    "model_name": "made-up",
    "hook_name": f"blocks.{LAYER}.hook_resid_post",
}


def write(folder: Path, architecture: str = "standard", drop: str = "", **keys: Any) -> Path:
    """An autoencoder as SAELens saves it, weights of no structure."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(D_MODEL, FEATURES, generator=generator),
        "b_enc": torch.randn(FEATURES, generator=generator),
        "W_dec": torch.randn(FEATURES, D_MODEL, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
    }
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(FEATURES, generator=generator)
    if architecture == "batchtopk":
        weights["topk_threshold"] = torch.tensor(1.5, dtype=torch.float64)
    weights.pop(drop, None)
    (folder / "sae_weights.safetensors").write_bytes(safetensors.torch.save(weights))
    cfg = {
        "architecture": architecture,
        "d_in": D_MODEL,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
    }
    cfg |= {"k": 4} if "topk" in architecture else {}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "metadata": METADATA} | keys))
    return folder


@pytest.fixture(scope="module")
def store(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    root = tmp_path_factory.mktemp("import") / "store.zarr"
    return make_store(root, n_contexts=48, context_length=LENGTH, layers=(1, LAYER), held_out=24)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("architecture", "keys"), VARIANTS)
def test_an_imported_autoencoder_computes_what_saelens_does(
    architecture: str, keys: dict[str, Any], store: "Made", tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saelens: Any = pytest.importorskip("sae_lens", reason="sae-lens is not installed: see .ci/run")
    folder = write(tmp_path / "theirs", architecture, **keys)
    theirs = saelens.SAE.load_from_disk(folder)
    opened = ActivationStore.open(store.root)
    import_sae(folder, tmp_path / "run", opened, ImportSaeSettings())
    mine = load_autoencoder(tmp_path / "run")
    x = torch.as_tensor(opened.read(LAYER, slice(0, 48), dtype="float32"))
    code = mine.encode(x, torch.arange(LENGTH))
    torch.testing.assert_close(code, theirs.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.decode(code), theirs(x), rtol=1e-4, atol=1e-3)
    # And back: the run is a folder that SAELens opens.
    again = saelens.SAE.load_from_disk(tmp_path / "run")
    torch.testing.assert_close(again.encode(x), code, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "batchtopk"])
def test_it_is_scored_on_the_held_out_part(architecture: str, store: "Made", tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", architecture)
    opened = ActivationStore.open(store.root)
    done = import_sae(folder, tmp_path / "run", opened, ImportSaeSettings(ranges="2"))
    assert done == import_sae(folder, tmp_path / "run", opened, ImportSaeSettings(ranges="2"))._replace(
        run=done.run
    )
    assert (done.architecture, done.layer, done.model_name) == (architecture, LAYER, "made-up")
    found = evaluate(tmp_path / "run", EvaluateSettings())
    assert found["contexts"] == [24, 48]
    assert found["ranges"] == ["0:3", "3:6"]
    assert found["store"]["trained_from"] is None
    assert found["training_seconds"] is None
    assert found["architecture"] == architecture

    weights = {
        k: np.float64(v)
        for k, v in safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes()).items()
    }
    rows = opened.read(LAYER, slice(24, 48), dtype="float32").astype(np.float64)
    rows = rows[~np.isin(store.tokens[24:], store.manifest.special_token_ids)]
    before = np.maximum((rows - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"], 0)
    code = before
    if architecture == "topk":
        code = before * (before >= np.sort(before, axis=1)[:, -4, None])
    if "threshold" in weights:
        code = before * (before > weights["threshold"])
    if architecture == "batchtopk":
        code = before * (before > 1.5)
    error = np.square(rows - code @ weights["W_dec"] - weights["b_dec"]).sum()
    assert found["l0"] == pytest.approx((code > 0).sum(1).mean())
    assert found["fvu"] == pytest.approx(error / np.square(rows - rows.mean(0)).sum(), rel=1e-3)


def test_a_run_of_posae_is_imported_with_its_positions(store: "Made", tmp_path: Path) -> None:
    autoencoder = Hierarchical(
        l1_coefficient=0.04,
        adapter_width=4,
        d_model=D_MODEL,
        dictionary_size=FEATURES,
        ranges=equal_ranges(LENGTH, 3),
        generator=torch.Generator().manual_seed(0),
    )
    autoencoder.alpha = 1.0
    save_autoencoder(autoencoder, tmp_path / "shared", {"hook_name": f"blocks.{LAYER}.hook_resid_post"})
    opened = ActivationStore.open(store.root)
    import_sae(tmp_path / "shared", tmp_path / "run", opened, ImportSaeSettings())
    found = evaluate(tmp_path / "run", EvaluateSettings())
    assert (found["architecture"], found["ranges"]) == ("hierarchical", ["0:2", "2:4", "4:6"])
    with pytest.raises(SettingsError, match="leave out --ranges"):
        import_sae(tmp_path / "shared", tmp_path / "other", opened, ImportSaeSettings(ranges="2"))


def test_another_autoencoder_in_a_folder_of_the_same_name_is_not_taken_for_it(
    store: "Made", tmp_path: Path
) -> None:
    opened = ActivationStore.open(store.root)
    folder = write(tmp_path / "one" / "theirs", "topk")
    import_sae(folder, tmp_path / "run", opened, ImportSaeSettings())
    before = tree(tmp_path / "run")
    others = write(tmp_path / "two" / "theirs", "topk"), write(tmp_path / "three" / "theirs", "topk", k=5)
    weights = safetensors.torch.load((others[0] / "sae_weights.safetensors").read_bytes())
    weights["b_dec"] += 1
    (others[0] / "sae_weights.safetensors").write_bytes(safetensors.torch.save(weights))
    for other in others:
        with pytest.raises(RunMismatchError, match=r"imported_digest was 'sha256:.*' and is now 'sha256:"):
            import_sae(other, tmp_path / "run", opened, ImportSaeSettings())
    import_sae(folder, tmp_path / "run", opened, ImportSaeSettings())
    assert tree(tmp_path / "run") == before


REFUSED: list[tuple[dict[str, Any], type[PosaeError], str]] = [
    ({"architecture": "gated"}, RunError, "architecture is 'gated'"),
    ({"architecture": "jumprelu", "drop": "threshold"}, RunError, "threshold is missing"),
    ({"drop": "b_enc"}, RunError, "b_enc is missing"),
    ({"normalize_activations": "layer_norm"}, RunError, "normalize_activations is 'layer_norm'"),
    ({"reshape_activations": "hook_z"}, RunError, "reshape_activations is 'hook_z'"),
    ({"d_sae": FEATURES + 1}, RunError, "not of"),
    ({"d_sae": 2**70}, RunError, "d_sae is"),
    ({"architecture": "topk", "k": None}, RunError, "k is missing"),
    ({"metadata": {"sae_lens_version": "5.3.0"}}, RunError, "SAELens 6 or later"),
    ({"metadata": {}}, RunError, "SAELens 6 or later"),
    ({"metadata": METADATA | {"hook_name": "blocks.3.hook_mlp_out"}}, SettingsError, "hook_mlp_out"),
    ({"metadata": METADATA | {"hook_name": None}}, SettingsError, "give it with --layer"),
    ({"metadata": METADATA | {"hook_name": "blocks.2.hook_resid_post"}}, StoreIncompleteError, "layer 2"),
]


@pytest.mark.parametrize(("keys", "kind", "said"), REFUSED)
def test_what_cannot_be_imported_is_refused(
    keys: dict[str, Any], kind: type[PosaeError], said: str, store: "Made", tmp_path: Path
) -> None:
    folder = write(tmp_path / "theirs", **keys)
    with pytest.raises(kind, match=said):
        import_sae(folder, tmp_path / "run", ActivationStore.open(store.root), ImportSaeSettings())
    assert not (tmp_path / "run").exists()


def test_the_layer_is_the_one_that_it_names(store: "Made", make_store: "MakeStore", tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs")
    opened = ActivationStore.open(store.root)
    with pytest.raises(SettingsError, match="which is layer 3"):
        import_sae(folder, tmp_path / "run", opened, ImportSaeSettings(layer=1))
    other = make_store(tmp_path / "other.zarr", d_model=8, layers=(LAYER,))
    with pytest.raises(RunMismatchError, match="16 numbers"):
        import_sae(folder, tmp_path / "run", ActivationStore.open(other.root), ImportSaeSettings())
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"no cfg\.json"):
        read_foreign(tmp_path, equal_ranges(LENGTH, 2))
    folder = write(tmp_path / "theirs")
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(RunError, match="cannot be read"):
        read_foreign(folder, equal_ranges(LENGTH, 2))
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(RunNotFoundError, match="sae_weights"):
        read_foreign(folder, equal_ranges(LENGTH, 2))
    for content in (b"[]", b"{", b"\xff"):
        (folder / "cfg.json").write_bytes(content)
        with pytest.raises(RunError):
            read_foreign(folder, equal_ranges(LENGTH, 2))
