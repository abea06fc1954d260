"""SAELens itself opens what posae saved, and computes the same, or refuses."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posae.pipeline.ranges import parse_ranges
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.registry import ARCHITECTURES, new_autoencoder
from posae.pipeline.sae.saving import load_autoencoder, save_autoencoder
from posae.store.errors import SettingsError

D_MODEL, FEATURES, LENGTH = 6, 12, 16
OWN: dict[str, dict[str, Any]] = {
    "topk": {"target_l0": 3},
    "batchtopk": {"target_l0": 3},
    "jumprelu": {"target_l0": 3},
    "hierarchical": {"l1_coefficient": 0.04, "adapter_width": 4},
}
METADATA = {"model_name": "demo", "hook_name": "blocks.2.hook_resid_post", "context_size": LENGTH}
OF_SAELENS = ("standard", "topk", "batchtopk", "jumprelu")


@pytest.fixture(scope="module")
def saelens() -> Any:
    """SAELens' class ``SAE``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own dependencies, at import
        module = pytest.importorskip("sae_lens", reason="sae-lens is not installed: see .ci/run")
    return module.SAE


@pytest.fixture(scope="module")
def with_posae(saelens: Any) -> Any:
    """The same, with posae's architectures; a test that wants it without comes before."""
    importlib.import_module("posae.pipeline.interop.saelens")
    return saelens


def made(architecture: str, **more: Any) -> Autoencoder:
    """Trained a little, so to speak: no weight is 0, and units are not those of activations."""
    generator = torch.Generator().manual_seed(0)
    autoencoder = new_autoencoder(
        architecture,
        d_model=D_MODEL,
        dictionary_size=FEATURES,
        ranges=parse_ranges("0:1,1:4,4:10,10:16", LENGTH),
        generator=generator,
        activation_scale=0.3,
        **OWN.get(architecture, {"l1_coefficient": 0.04}),
        **more,
    )
    noise = np.random.default_rng(0)
    for name, weight in autoencoder.state_dict().items():
        weight += 0.1 * torch.as_tensor(noise.standard_normal(tuple(weight.shape)))
        if name == "threshold":
            weight.abs_()
    sums = noise.standard_normal((LENGTH, D_MODEL))
    autoencoder.position_mean.fit(sums, np.ones(LENGTH, np.int64))
    autoencoder.alpha = 0.7
    return autoencoder.eval()


def rows() -> tuple[Tensor, Tensor]:
    """Activations [contexts, positions, d_model], and positions."""
    x = 4 * torch.randn(32, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1
    return x, torch.arange(LENGTH)


@pytest.mark.parametrize("architecture", OF_SAELENS)
def test_saelens_computes_what_posae_does(architecture: str, saelens: Any, tmp_path: Path) -> None:
    autoencoder = made(architecture)
    save_autoencoder(autoencoder, tmp_path, METADATA)
    theirs = saelens.load_from_disk(tmp_path)
    assert type(theirs).__module__.startswith("sae_lens.")
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    x, positions = rows()
    for mine in (autoencoder, load_autoencoder(tmp_path)):
        code = mine.encode(x, positions)
        assert 0 < (code != 0).float().mean() < 0.9
        torch.testing.assert_close(theirs.encode(x), code, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(x), mine.decode(code), rtol=1e-4, atol=1e-5)


def test_topk_of_a_decoder_that_is_not_of_unit_norm_keeps_the_same(saelens: Any, tmp_path: Path) -> None:
    autoencoder = made("topk")
    with torch.no_grad():
        autoencoder.W_dec.mul_(torch.linspace(0.1, 5, FEATURES)[:, None])
    save_autoencoder(autoencoder, tmp_path, METADATA)
    x, positions = rows()
    active = autoencoder.encode(x, positions) != 0
    assert torch.equal(saelens.load_from_disk(tmp_path).encode(x) != 0, active)


KNOWS_POSITIONS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ARCHITECTURES if name not in OF_SAELENS],
    *[(name, {"position_mean": "exact"}) for name in OF_SAELENS],
    ("standard", {"position_adapter": "bias+decoder:2"}),
    ("jumprelu", {"position_adapter": "gate"}),
]


@pytest.mark.parametrize(("architecture", "more"), KNOWS_POSITIONS)
def test_saelens_alone_refuses_what_depends_on_positions(
    architecture: str, more: dict[str, Any], saelens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Any = importlib.import_module("sae_lens.registry")
    without: dict[str, Any] = {
        k: v for k, v in registry.SAE_CLASS_REGISTRY.items() if not k.startswith("posae")
    }
    monkeypatch.setattr(registry, "SAE_CLASS_REGISTRY", without)
    save_autoencoder(made(architecture, **more), tmp_path, METADATA)
    with pytest.raises(KeyError, match=f"posae_{architecture}"):
        saelens.load_from_disk(tmp_path)


@pytest.mark.parametrize(("architecture", "more"), KNOWS_POSITIONS)
def test_with_posae_saelens_opens_it_and_wants_positions(
    architecture: str, more: dict[str, Any], with_posae: Any, tmp_path: Path
) -> None:
    autoencoder = made(architecture, **more)
    save_autoencoder(autoencoder, tmp_path, METADATA)
    theirs = with_posae.load_from_disk(tmp_path).train()
    x, positions = rows()
    for call in (theirs, theirs.encode):
        with pytest.raises(SettingsError, match=f"posae_{architecture} needs the position"):
            call(x)
    code = autoencoder.encode(x, positions)
    given = theirs.encode(x, positions=positions)
    torch.testing.assert_close(given, code, rtol=1e-4, atol=1e-5)
    reconstruction = autoencoder.decode(code, positions)
    torch.testing.assert_close(theirs.decode(given, positions), reconstruction, rtol=1e-4, atol=1e-5)
    with theirs.at(positions):
        torch.testing.assert_close(theirs(x), reconstruction, rtol=1e-4, atol=1e-5)
        with pytest.raises(SettingsError, match="positions lie between"), theirs.at(positions + 1):
            theirs(x)
    with pytest.raises(SettingsError, match="needs the position"):
        theirs(x)
    other = theirs.encode(x, positions.flip(0))
    assert not torch.allclose(other, code, rtol=1e-4, atol=1e-5)


def test_hooks_see_input_code_and_reconstruction(with_posae: Any, tmp_path: Path) -> None:
    save_autoencoder(made("hierarchical"), tmp_path, METADATA)
    theirs = with_posae.load_from_disk(tmp_path)
    x, positions = rows()
    with theirs.at(positions):
        out, cache = theirs.run_with_cache(x)
        assert torch.equal(cache["hook_sae_acts_post"], theirs.encode(x))
    assert torch.equal(cache["hook_sae_input"], x)
    assert torch.equal(cache["hook_sae_recons"], out)


def test_saved_again_by_saelens_it_is_a_run_of_posae(with_posae: Any, tmp_path: Path) -> None:
    save_autoencoder(made("hierarchical", decoder_bias=True), tmp_path / "run", METADATA)
    theirs = with_posae.load_from_disk(tmp_path / "run")
    theirs.save_model(tmp_path / "again")
    x, positions = rows()
    again = load_autoencoder(tmp_path / "again")
    assert torch.equal(again.encode(x, positions), theirs.encode(x, positions))
    for fold in (theirs.fold_W_dec_norm, lambda: theirs.fold_activation_norm_scaling_factor(2.0)):
        with pytest.raises(NotImplementedError, match="posae_hierarchical"):
            fold()


def test_in_half_precision(with_posae: Any, tmp_path: Path) -> None:
    autoencoder = made("separate")
    save_autoencoder(autoencoder, tmp_path, METADATA)
    theirs = with_posae.load_from_disk(tmp_path, dtype="bfloat16")
    x, positions = rows()
    code = theirs.encode(x, positions)
    assert code.dtype == torch.bfloat16
    torch.testing.assert_close(code.float(), autoencoder.encode(x, positions), rtol=0.1, atol=0.1)


def test_a_run_from_before_saelens_names_still_opens(tmp_path: Path) -> None:
    """Then JumpReLU and BatchTopK were saved in their own units, under names of ours."""
    for architecture in ("jumprelu", "batchtopk", "topk"):
        autoencoder = made(architecture)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(autoencoder), "saelens_architecture", None)
            save_autoencoder(autoencoder, tmp_path, METADATA)
        assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == f"posae_{architecture}"
        x, positions = rows()
        code = load_autoencoder(tmp_path).encode(x, positions)
        torch.testing.assert_close(code, autoencoder.encode(x, positions), rtol=1e-4, atol=1e-5)
