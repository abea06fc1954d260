"""Exploring autoencoders made by hand, on small stores, against what plain loops over the codes say."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import posae.pipeline.harvest.tokenizer as tokenizers
from posae.pipeline.errors import ModelError
from posae.pipeline.evaluate.scoring.profiles import choose_features, neighbours, turned
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.report.explore import N_EXCERPTS, explore_runs
from posae.pipeline.report.page.explored import Explored, ExploredFeature, Unexplored
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.hierarchical import Hierarchical
from posae.pipeline.sae.saving import save_autoencoder
from posae.pipeline.sae.standard import Standard
from posae.store import ActivationStore

if TYPE_CHECKING:
    from ...conftest import MakeStore

torch.set_num_threads(1)

LENGTH, D_MODEL, FEATURES, LAYER = 12, 16, 24, 1
HELD_OUT = (16, 56)


def new(kind: str, seed: int = 0, **settings: Any) -> Autoencoder:
    """A random autoencoder whose adapters are fully switched on."""
    common: dict[str, Any] = {
        "l1_coefficient": 0.0,
        "d_model": D_MODEL,
        "dictionary_size": FEATURES,
        "ranges": equal_ranges(LENGTH, 3),
        "generator": torch.Generator().manual_seed(seed),
    }
    made: Autoencoder = (
        Hierarchical(adapter_width=4, **common) if kind == "hierarchical" else Standard(**common, **settings)
    )
    with torch.no_grad():
        for name, weight in made.position_adapter.named_parameters():
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        made.b_enc.fill_(-1.0)
    made.alpha = 1.0
    return made.eval()


class MadeRun(NamedTuple):
    folder: Path
    store: ActivationStore
    autoencoder: Autoencoder

    def codes(self, alpha: float = 1.0) -> NDArray[np.float32]:
        """[contexts, positions, features] of the held-out part, 0 on special tokens."""
        x = torch.as_tensor(self.store.read(LAYER, slice(*HELD_OUT), dtype="float32"))
        self.autoencoder.alpha = alpha
        with torch.no_grad():
            code = self.autoencoder.encode(x, torch.arange(LENGTH)).numpy()
        self.autoencoder.alpha = 1.0
        return code * self.ordinary[..., None]

    @property
    def ordinary(self) -> NDArray[np.bool_]:
        tokens = self.store.tokens(slice(*HELD_OUT))
        return ~np.isin(tokens, self.store.manifest.special_token_ids)


@pytest.fixture(scope="module")
def store(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("explore") / "a.zarr"
    n_contexts, n_held_out = HELD_OUT[1], HELD_OUT[1] - HELD_OUT[0]
    make_store(root, n_contexts=n_contexts, context_length=LENGTH, d_model=D_MODEL, held_out=n_held_out)
    return ActivationStore.open(root)


def made_run(folder: Path, store: ActivationStore, autoencoder: Autoencoder, **told: Any) -> MadeRun:
    save_autoencoder(autoencoder, folder, {})
    about = {
        "path": str(store.root),
        "read": store.digests(LAYER),
        "d_model": D_MODEL,
        "training_contexts": HELD_OUT[0],
        "left_out_ids": list(store.manifest.special_token_ids),
    }
    config = {"settings": {"layer": LAYER}, "store": about | told}
    (folder / "config.json").write_text(json.dumps(config))
    return MadeRun(folder, store, autoencoder)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Which tokenizers were sought; there are none."""
    found: list[object] = []

    def load(name: str, _: object) -> None:
        found.append(name)
        raise ModelError(f"{name} cannot be had")

    monkeypatch.setattr(tokenizers, "load_tokenizer", load)
    return found


def explored(run: MadeRun, n_features: int = FEATURES, n_contexts: int = 1000) -> Explored:
    (found,) = explore_runs([("run", run.folder)], n_features=n_features, n_contexts=n_contexts)
    assert isinstance(found, Explored)
    return found


def why_not(folder: Path) -> str:
    (found,) = explore_runs([("run", folder)], n_features=2, n_contexts=8)
    assert isinstance(found, Unexplored)
    return found.reason


@pytest.mark.parametrize("kind", ["hierarchical", "standard"])
def test_features_are_what_their_codes_say(store: ActivationStore, tmp_path: Path, kind: str) -> None:
    run = made_run(tmp_path / "run", store, new(kind))
    found, codes = explored(run), run.codes()
    fires = np.abs(codes) > 1e-3
    n_rows = run.ordinary.sum()
    assert found.contexts == HELD_OUT
    assert (found.n_tokens, found.n_fired) == (n_rows, fires.any((0, 1)).sum())
    assert [feature.number for feature in found.features] == np.flatnonzero(fires.any((0, 1))).tolist()
    assert len(found.features) > FEATURES / 2
    for feature in found.features:
        code = codes[..., feature.number]
        assert feature.density == pytest.approx(fires[..., feature.number].sum() / n_rows)
        starts = [start for start, _ in found.ranges]
        rows = np.add.reduceat(run.ordinary.sum(0), starts)
        assert feature.mean_by_range == pytest.approx(np.add.reduceat(code.sum(0), starts) / rows, abs=1e-6)
        firings = np.add.reduceat(fires[..., feature.number].sum(0), starts)
        assert feature.density_by_range == pytest.approx(firings / rows)
        # No more bins than positions: here each position is one.
        by_position = fires[..., feature.number].sum(0) / np.maximum(1, run.ordinary.sum(0))
        assert feature.density_by_position == pytest.approx(by_position)
        check_excerpts(feature, code)


def check_excerpts(feature: ExploredFeature, code: NDArray[np.float32]) -> None:
    """The contexts of the largest activations, as they are."""
    peaks = np.abs(code).max(1)
    expected = np.sort(peaks[peaks > 1e-3])[::-1][:N_EXCERPTS]
    assert [abs(excerpt.peak) for excerpt in feature.excerpts] == pytest.approx(expected, rel=1e-5)
    assert len({excerpt.context for excerpt in feature.excerpts}) == len(feature.excerpts)
    for excerpt in feature.excerpts:
        row = code[excerpt.context - HELD_OUT[0]]
        assert row[excerpt.position] == pytest.approx(excerpt.peak, rel=1e-5)
        assert excerpt.levels / 127 * expected[0] == pytest.approx(row, abs=float(expected[0]) / 127)
        assert ((excerpt.levels != 0) == (row != 0)).all()


def test_what_adapters_do_is_the_code_with_them_less_the_code_without(
    store: ActivationStore, tmp_path: Path
) -> None:
    runs = {
        "hierarchical": new("hierarchical"),
        "bias": new("standard", position_adapter="bias"),
        "decoder": new("standard", position_adapter="decoder:2"),
    }
    for name, autoencoder in runs.items():
        run = made_run(tmp_path / name, store, autoencoder)
        base = run.codes(alpha=0.0)
        for feature in explored(run).features:
            assert feature.base_by_range is not None
            rows = run.ordinary[:, 4:8].sum()
            mean = base[:, 4:8, feature.number].sum() / rows
            assert feature.base_by_range[1] == pytest.approx(mean, abs=1e-6)
            assert (feature.decoder_by_range is not None) == (name == "decoder")
    plain = explored(made_run(tmp_path / "plain", store, new("standard")))
    assert all(feature.base_by_range is None for feature in plain.features)


@pytest.mark.parametrize("shared", [False, True])
def test_turned_directions_are_those_of_the_decoder_with_its_adapter(
    store: ActivationStore, tmp_path: Path, shared: bool
) -> None:
    autoencoder = new("standard", position_adapter="decoder:2", shared_adapters=shared)
    adapter = autoencoder.position_adapter
    assert adapter.decoder_in is not None
    assert adapter.decoder_out is not None
    found = explored(made_run(tmp_path / "run", store, autoencoder))
    for feature in found.features:
        assert feature.decoder_by_range is not None
        for r, cosine in enumerate(feature.decoder_by_range):
            place = 0 if shared else r
            plain = autoencoder.W_dec[feature.number].detach()
            moved = plain + (adapter.decoder_in[place, feature.number] @ adapter.decoder_out[place]).detach()
            assert cosine == pytest.approx(float(torch.cosine_similarity(plain, moved, dim=0)), abs=1e-5)


def test_neighbours_are_the_nearest_directions_but_oneself(store: ActivationStore, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", store, new("standard"))
    directions = run.autoencoder.W_dec.detach().numpy()
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -2)
    for feature in explored(run, n_features=5).features:
        nearest = np.argsort(-cosines[feature.number])[:6]
        assert [number for number, _ in feature.neighbours] == nearest.tolist()
        assert [x for _, x in feature.neighbours] == pytest.approx(cosines[feature.number, nearest], abs=1e-5)


def test_neighbours_are_the_same_of_many_at_once() -> None:
    decoder = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    which, cosines = neighbours(decoder, np.arange(700), 3)
    alone, cosine = neighbours(decoder, np.array([613]), 3)
    assert which[613].tolist() == alone[0].tolist()
    assert cosines[613] == pytest.approx(cosine[0], abs=1e-6)
    assert neighbours(decoder[:1], np.array([0]), 3)[0].shape == (1, 0)


def test_a_direction_that_is_not_changed_keeps_a_cosine_of_1() -> None:
    decoder = torch.eye(3)
    cosines = turned(decoder, torch.zeros(2, 3, 1), torch.ones(2, 1, 3), 1.0)
    assert cosines == pytest.approx(np.ones((2, 3)))


def test_features_that_are_shown_are_the_specific_and_a_spread_of_densities() -> None:
    n_firings = np.array([0, *range(1, 101)])
    specificity = np.zeros(101)
    specificity[[7, 50, 93]] = 1.0
    chosen = choose_features(n_firings, specificity, 6)
    assert {7, 50, 93, 1, 100} <= set(chosen.tolist())
    assert len(chosen) == 6
    assert choose_features(n_firings, specificity, 1000).tolist() == list(range(1, 101))


def test_only_as_many_contexts_are_looked_through_as_are_asked_for(
    store: ActivationStore, tmp_path: Path
) -> None:
    run = made_run(tmp_path / "run", store, new("standard"))
    found = explored(run, n_features=4, n_contexts=9)
    assert found.contexts == (16, 25)
    assert len(found.features) == 4
    shown = {excerpt.context for feature in found.features for excerpt in feature.excerpts}
    assert shown == found.tokens.keys()
    assert shown <= set(range(16, 25))
    for context, row in found.tokens.items():
        assert (row == store.tokens([context])[0]).all()


def test_contexts_that_a_run_was_trained_on_are_not_looked_through(
    store: ActivationStore, tmp_path: Path
) -> None:
    run = made_run(tmp_path / "run", store, new("standard"), training_contexts=40)
    assert explored(run).contexts == (40, 56)


def test_without_the_stores_tokenizer_there_are_ids(
    store: ActivationStore, tmp_path: Path, asked: list[object]
) -> None:
    run = made_run(tmp_path / "run", store, new("standard")).folder
    for found in explore_runs([("a", run), ("b", run)], n_features=2, n_contexts=8):
        assert isinstance(found, Explored)
        assert found.texts is None
        assert found.note == "made-up cannot be had"
    assert asked == ["made-up"]


def test_a_store_cannot_name_a_place_on_this_machine(
    make_store: "MakeStore", tmp_path: Path, asked: list[object]
) -> None:
    held_out = HELD_OUT[1] - HELD_OUT[0]
    made = make_store(
        tmp_path / "a.zarr",
        n_contexts=HELD_OUT[1],
        context_length=LENGTH,
        d_model=D_MODEL,
        held_out=held_out,
        model=str(tmp_path),
    )
    found = explored(made_run(tmp_path / "run", ActivationStore.open(made.root), new("standard")))
    assert "name its folder with --tokenizer" in (found.note or "")
    assert asked == []


def test_a_part_of_a_character_is_named_as_in_the_vocabulary(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "\ufffd" if ids[0] % 2 else f" {ids[0]}"

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<{token}>"

    def load(_name: str, _revision: object) -> Tokenizer:
        return Tokenizer()

    def hashed(_: object) -> str:
        return store.manifest.tokenizer_hash

    monkeypatch.setattr(tokenizers, "load_tokenizer", load)
    monkeypatch.setattr(tokenizers, "tokenizer_hash", hashed)
    found = explored(made_run(tmp_path / "run", store, new("standard")))
    assert found.note is None
    assert found.texts
    assert all(text == (f"<{token}>" if token % 2 else f" {token}") for token, text in found.texts.items())


def test_a_run_that_cannot_be_explored_does_not_stop_the_others(
    store: ActivationStore, tmp_path: Path
) -> None:
    good = made_run(tmp_path / "good", store, new("standard"))
    gone = made_run(tmp_path / "gone", store, new("standard"), path=str(tmp_path / "nowhere.zarr"))
    other = made_run(tmp_path / "other", store, new("standard"), read={"tokens": "0"})
    broken = made_run(tmp_path / "broken", store, new("standard"))
    (broken.folder / "config.json").write_text('{"settings": {}}')
    diverged = new("standard")
    with torch.no_grad():
        diverged.b_enc[3] = torch.nan
    mad = made_run(tmp_path / "mad", store, diverged)
    runs = [(run.folder.name, run.folder) for run in (gone, other, broken, mad, good)]
    found = explore_runs(runs, n_features=3, n_contexts=8)
    reasons = [run.reason for run in found if isinstance(run, Unexplored)]
    assert len(reasons) == 4
    assert "nowhere.zarr" in reasons[0]
    assert "is not the store that" in reasons[1]
    assert "does not say which store" in reasons[2]
    assert "not finite" in reasons[3]
    assert isinstance(found[4], Explored)
    assert "there is no run at" in why_not(tmp_path / "none")


def test_a_store_that_moved_is_found_where_the_run_was_scored(store: ActivationStore, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", store, new("standard"), path=str(tmp_path / "nowhere.zarr"))
    scored: dict[str, Any] = {"path": str(store.root), "trained_from": True}
    (run.folder / "evaluation.json").write_text(json.dumps({"store": scored}))
    assert explored(run, n_features=2).features
    # Another store of the same shape is not looked through.
    (run.folder / "evaluation.json").write_text(json.dumps({"store": scored | {"trained_from": False}}))
    assert "nowhere.zarr" in why_not(run.folder)
