"""A run knows its store by digests: added layers and copied parts are the same, other bytes are not."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from posae.pipeline.errors import RunMismatchError
from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.report.report import collect
from posae.pipeline.sae.run_settings import train_settings
from posae.pipeline.settings import EvaluateSettings
from posae.pipeline.stores.assembling import copy_part
from posae.pipeline.train import Training
from posae.store import ActivationStore

from ...conftest import tree

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

LAYER, N_CONTEXTS, HELD_OUT, LENGTH = 0, 48, 16, 4
ONES = np.full((N_CONTEXTS, LENGTH, 16), 0x3F80, np.uint16)

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "statistics": ("statistics", {"byte_counts": False}),
    "activations": ("activations, statistics", {"bits": ONES}),
    "codec": ("activations, statistics", {"codec": "raw"}),
    "everything": ("tokens, activations, statistics", {"seed": 1}),
}


class Trained(NamedTuple):
    """A store, and a run that was trained from it and scored."""

    store: "Made"
    run: Path
    make: "MakeStore"

    def another(self, root: Path, **changed: Any) -> "Made":
        """The store, made again with something changed."""
        return made_store(self.make, root, **changed)


def made_store(make_store: "MakeStore", root: Path, **changed: Any) -> "Made":
    words: dict[str, Any] = {
        "n_contexts": N_CONTEXTS,
        "context_length": LENGTH,
        "held_out": HELD_OUT,
        "layers": (LAYER, 3),
    }
    return make_store(root, **words | changed)


def train(store: Path, run: Path, **changed: Any) -> None:
    words: dict[str, Any] = {
        "layer": LAYER,
        "architecture": "standard",
        "steps": 4,
        "batch_size": 32,
        "window_contexts": 8,
        "ranges": "2",
    }
    Training(ActivationStore.open(store), run, train_settings(words | changed, "[train]")).train()


@pytest.fixture
def trained(make_store: "MakeStore", tmp_path: Path) -> Trained:
    made = made_store(make_store, tmp_path / "a.zarr", layers=(LAYER,))
    train(made.root, tmp_path / "run")
    evaluate(tmp_path / "run", EvaluateSettings())
    return Trained(made, tmp_path / "run", make_store)


def put(made: "Made", root: Path) -> None:
    """Put ``made`` in the place of the store at ``root``."""
    shutil.rmtree(root)
    made.root.rename(root)


def test_digests_are_kept_from_the_first_step_on(trained: Trained) -> None:
    store = ActivationStore.open(trained.store.root)
    config = json.loads((trained.run / "config.json").read_text())
    assert config["store"]["read"] == store.digests(LAYER)
    assert config["store"]["read"].keys() == {"tokens", "layer_0", "stats"}
    scored = json.loads((trained.run / "evaluation.json").read_text())["store"]
    assert scored == {
        "path": str(trained.store.root),
        "identity": store.identity,
        "read": store.digests(LAYER),
        "trained_from": True,
        "same_model": None,
        "seen_contexts": 0,
    }
    assert config["store"]["model_revision"] is None  # so nobody can tell


@pytest.mark.parametrize("is_moved", [False, True])
def test_another_layer_beside_its_own_changes_nothing(
    trained: Trained, tmp_path: Path, *, is_moved: bool
) -> None:
    before = ActivationStore.open(trained.store.root).identity
    more = trained.another(tmp_path / "more.zarr")
    if not is_moved:
        put(more, trained.store.root)
    store = more.root if is_moved else trained.store.root
    assert ActivationStore.open(store).identity != before
    train(store, trained.run)
    found = evaluate(trained.run, EvaluateSettings(store=str(store) if is_moved else None))
    assert (found["store"]["trained_from"], found["contexts"]) == (True, [32, 48])


@pytest.mark.parametrize("name", OTHERS)
def test_other_bytes_in_the_stores_place_are_refused_and_it_is_said_which(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    differ, changed = OTHERS[name]
    put(trained.another(tmp_path / "other.zarr", **changed), trained.store.root)
    before = tree(trained.run)
    said = f"is not the store that .*run was trained from: other {differ}; "
    with pytest.raises(RunMismatchError, match=said + "give that one to resume"):
        train(trained.store.root, trained.run)
    with pytest.raises(RunMismatchError, match=said + "name the right one with --store"):
        evaluate(trained.run, EvaluateSettings())
    assert tree(trained.run) == before


def test_a_training_that_was_cut_short_does_not_go_on_from_other_bytes(
    trained: Trained, tmp_path: Path
) -> None:
    for name in ("sae_weights.safetensors", "cfg.json"):
        (trained.run / name).unlink()
    other = trained.another(tmp_path / "other.zarr", bits=ONES)
    with pytest.raises(RunMismatchError, match="other activations, statistics; give that one to resume"):
        train(other.root, trained.run)
    train(trained.store.root, trained.run)


def test_another_layer_to_train_on_is_told_as_the_setting_that_it_is(
    trained: Trained, tmp_path: Path
) -> None:
    more = trained.another(tmp_path / "more.zarr")
    with pytest.raises(RunMismatchError, match=r"layer was 0 and is now 3; use") as told:
        train(more.root, trained.run, layer=3)
    assert "read" not in str(told.value)


@pytest.mark.parametrize("name", OTHERS)
def test_another_store_that_is_named_is_scored_and_the_scores_say_so(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    _, changed = OTHERS[name]
    other = ActivationStore.open(trained.another(tmp_path / "other.zarr", **changed).root)
    found = evaluate(trained.run, EvaluateSettings(store=str(other.root)))
    assert found == json.loads((trained.run / "evaluation.json").read_text())
    assert found["store"] == {
        "path": str(other.root),
        "identity": other.identity,
        "read": other.digests(LAYER),
        "trained_from": False,
        "same_model": None,
        "seen_contexts": 0,
    }
    (table, *_) = collect([trained.run]).measurements()
    assert table.rows[0][0] == "run, on another store"


def test_of_equal_tokens_those_that_were_trained_on_are_not_scored(trained: Trained, tmp_path: Path) -> None:
    same = trained.another(tmp_path / "same.zarr", held_out=40, bits=ONES)
    assert evaluate(trained.run, EvaluateSettings(store=str(same.root)))["contexts"] == [32, 48]
    other = trained.another(tmp_path / "other.zarr", held_out=40, seed=1)
    assert evaluate(trained.run, EvaluateSettings(store=str(other.root)))["contexts"] == [8, 48]


def test_a_store_of_another_size_is_refused(trained: Trained, tmp_path: Path) -> None:
    for name, size in (("d_model", 8), ("context_length", 5)):
        other = trained.another(tmp_path / f"{name}.zarr", **{name: size})
        with pytest.raises(RunMismatchError, match=f"has {name} {size}, and the run "):
            evaluate(trained.run, EvaluateSettings(store=str(other.root)))


def test_what_was_measured_on_another_store_is_kept_for_that_store(trained: Trained, tmp_path: Path) -> None:
    path = trained.run / "evaluation.json"
    probed = json.loads(path.read_text()) | {"probing": {"source": "made up"}}
    path.write_text(json.dumps(probed))
    assert evaluate(trained.run, EvaluateSettings())["probing"] == {"source": "made up"}
    other = trained.another(tmp_path / "other.zarr", seed=1)
    assert evaluate(trained.run, EvaluateSettings(store=str(other.root)))["probing"] is None
    # Set aside, and there again for the store that it is of, which has grown meanwhile.
    put(trained.another(tmp_path / "more.zarr"), trained.store.root)
    assert evaluate(trained.run, EvaluateSettings())["probing"] == {"source": "made up"}


def test_a_run_of_an_unfinished_harvest_goes_on_when_that_is_finished(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = made_store(make_store, tmp_path / "a.zarr", seal=False)
    train(made.root, tmp_path / "run")
    made.write((LAYER, 3))
    train(made.root, tmp_path / "run")
    found = evaluate(tmp_path / "run", EvaluateSettings())
    assert found["store"]["trained_from"] is None
    assert found["store"]["identity"] == ActivationStore.open(made.root).identity


def test_a_run_of_an_unfinished_harvest_does_not_go_on_from_another_of_the_same_names(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = made_store(make_store, tmp_path / "a.zarr", seal=False)
    train(made.root, tmp_path / "run")
    for seal in (False, True):
        other = made_store(make_store, tmp_path / f"{seal}.zarr", seal=seal, dataset_revision="sha256:0")
        before = tree(tmp_path / "run")
        said = r"is not the store that .*run was trained from: other text, model or settings; give that one"
        with pytest.raises(RunMismatchError, match=said):
            train(other.root, tmp_path / "run")
        assert tree(tmp_path / "run") == before
        scored = evaluate(tmp_path / "run", EvaluateSettings(store=str(other.root)))
        assert scored["store"]["trained_from"] is False
    put(other, made.root)
    with pytest.raises(RunMismatchError, match="other text, model or settings; name the right one"):
        evaluate(tmp_path / "run", EvaluateSettings())


def test_contexts_that_were_trained_on_are_counted_wherever_they_lie(
    trained: Trained, tmp_path: Path
) -> None:
    store = ActivationStore.open(trained.store.root)
    part = copy_part(store, tmp_path / "part.zarr", contexts=(0, 24)).store
    assert part.held_out_part(LAYER) == (16, 24)
    found = evaluate(trained.run, EvaluateSettings(store=str(part.root)))["store"]
    assert (found["trained_from"], found["seen_contexts"]) == (False, 8)
    # Where the run's own store is gone, or another, nobody can tell.
    trained.store.root.rename(tmp_path / "moved")
    assert evaluate(trained.run, EvaluateSettings(store=str(part.root)))["store"]["seen_contexts"] is None
    trained.another(trained.store.root, seed=3)
    assert evaluate(trained.run, EvaluateSettings(store=str(part.root)))["store"]["seen_contexts"] is None


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        ("sha256:0", "sha256:0", True),
        ("sha256:0", "sha256:1", False),
        ("c5ebcd4", "3be9033", False),
        ("sha256:0", "c5ebcd4", None),
        ("sha256:0", None, None),
    ],
)
def test_scores_say_whether_the_other_store_is_of_the_same_model(
    before: str, now: str | None, is_same: bool | None, make_store: "MakeStore", tmp_path: Path
) -> None:
    made = made_store(make_store, tmp_path / "a.zarr", model_revision=before)
    train(made.root, tmp_path / "run")
    other = made_store(make_store, tmp_path / "b.zarr", model_revision=now, seed=1)
    found = evaluate(tmp_path / "run", EvaluateSettings(store=str(other.root)))["store"]
    assert (found["trained_from"], found["same_model"]) == (False, is_same)
