"""What has the name of another thing is not taken for it, and what has its digest is, wherever it lies."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from posae.store import ActivationStore

from ..conftest import tree
from .conftest import Posae

DEMO_MODEL = Path(__file__).parents[2] / "pipeline" / "harvest" / "demo_model"
SMALL = ("--contexts", "24", "--context-length", "16")
QUICK = ("--steps", "5", "--batch-size", "32", "--window-contexts", "8", "--layer", "1")
Words = tuple[object, ...]


def write_text(path: Path, word: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{word} {i} " * 40}) + "\n" for i in range(60)))
    return path


def copy_model(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, folder))


def tuned(folder: Path) -> Path:
    """The same architecture and tokenizer, with one weight changed by little."""
    file = copy_model(folder) / "model.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    name = next(name for name in sorted(weights) if "layers.0" in name)
    weights[name] = (weights[name].float() * 1.01).to(weights[name].dtype)
    file.write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
    return folder


def is_refused(posae: Posae, *words: object) -> str:
    """The one line that says why."""
    ended = posae(*words)
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert (ended.code, len(lines)) == (1, 1), ended.err
    return lines[0]


def changes_nothing(posae: Posae, store: Path, words: Words) -> None:
    before = tree(store)
    assert "already finished" in posae("harvest", store, *words).out
    assert tree(store) == before


@pytest.mark.parametrize("is_folder", [False, True])
def test_other_text_of_the_same_name_is_refused(posae: Posae, tmp_path: Path, *, is_folder: bool) -> None:
    english, german = (write_text(tmp_path / name / "data" / "train.jsonl", name) for name in ("en", "de"))
    text, other = (english.parent, german.parent) if is_folder else (english, german)
    store = tmp_path / "s.zarr"
    layers: Words = (*SMALL, "--layers", 1)
    assert posae("harvest", store, "--dataset", text, *layers).code == 0
    before = tree(store)
    for words in (layers, (*SMALL, "--layers", "0,1")):
        told = is_refused(posae, "harvest", store, "--dataset", other, *words)
        assert "was 'sha256:" in told
        assert told.count("sha256:") == 2
    assert tree(store) == before
    shutil.copy(german, english)
    assert "--dataset-revision" in is_refused(posae, "harvest", store, "--dataset", text, *layers)
    assert tree(store) == before


def test_the_same_text_is_the_same_wherever_it_lies_and_its_name_is_enough_once_it_is_gone(
    posae: Posae, tmp_path: Path
) -> None:
    text, store = write_text(tmp_path / "a" / "train.jsonl", "word"), tmp_path / "s.zarr"
    words: Words = (*SMALL, "--layers", 1)
    assert posae("harvest", store, "--dataset", text, *words).code == 0
    moved = Path(shutil.copy(text, tmp_path / "renamed.jsonl"))
    changes_nothing(posae, store, ("--dataset", moved, *words))
    text.unlink()
    changes_nothing(posae, store, ("--dataset", text, *words))
    assert posae("harvest", store, "--dataset", text, *SMALL, "--layers", "0,1").code == 0
    other = text.with_name("other.jsonl")
    assert "no such file" in is_refused(posae, "harvest", store, "--dataset", other, *words)


def test_only_the_first_of_many_processes_reads_the_text_again(
    posae: Posae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, store = write_text(tmp_path / "train.jsonl", "word"), tmp_path / "s.zarr"
    words: Words = ("--dataset", text, *SMALL, "--layers", 1)
    assert posae("harvest", store, *words).code == 0
    write_text(text, "other")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert posae("harvest", store, *words).code == 0
    monkeypatch.setenv("RANK", "0")
    assert "--dataset-revision" in is_refused(posae, "harvest", store, *words)


def test_other_weights_in_a_folder_of_the_same_name_are_refused(posae: Posae, tmp_path: Path) -> None:
    model, other = copy_model(tmp_path / "a" / "tiny"), tuned(tmp_path / "b" / "tiny")
    store = tmp_path / "s.zarr"
    words: Words = (*SMALL, "--layers", 1)
    assert posae("harvest", store, "--model", model, *words).code == 0
    before = tree(store)
    for layers in (1, "0,1"):
        told = is_refused(posae, "harvest", store, "--model", other, *SMALL, "--layers", layers)
        assert "begun with other settings: --model-revision was 'sha256:" in told
    assert tree(store) == before
    changes_nothing(posae, store, ("--model", copy_model(tmp_path / "moved"), *words))
    # A layer more from another place: the manifest names the model as it did.
    assert posae("harvest", store, "--model", tmp_path / "moved", *SMALL, "--layers", "0,1").code == 0
    assert (ActivationStore.open(store).manifest.model, ActivationStore.open(store).layers) == (
        "tiny",
        (0, 1),
    )


def test_a_run_is_scored_with_the_weights_of_its_store_alone(posae: Posae, tmp_path: Path) -> None:
    model, store, run = copy_model(tmp_path / "tiny"), tmp_path / "s.zarr", tmp_path / "run"
    assert posae("harvest", store, "--model", model, *SMALL, "--layers", 1).code == 0
    assert posae("train", store, run, *QUICK).code == 0
    other = tuned(tmp_path / "elsewhere" / "tiny")
    before = tree(run)
    for words in (("--ce-loss",), ("--probing", "saebench")):
        told = is_refused(posae, "evaluate", run, *words, "--model", other)
        assert "is not tiny, the model that" in told
        assert "its weights and tokenizer are sha256:" in told
        assert tree(run) == before
    moved = copy_model(tmp_path / "under-another-name")
    assert posae("evaluate", run, "--ce-loss", "--ce-contexts", 2, "--model", moved).code == 0


def test_scores_on_a_part_of_what_was_trained_on_say_so(posae: Posae, tmp_path: Path) -> None:
    store, half, run = tmp_path / "s.zarr", tmp_path / "half.zarr", tmp_path / "run"
    assert posae("harvest", store, "--contexts", 64, "--context-length", 16, "--layers", 1).code == 0
    assert posae("train", store, run, *QUICK).code == 0
    assert posae("copy", store, half, "--contexts", "0:32").code == 0
    told = " ".join(posae("evaluate", run, "--store", half).out.split())
    assert "not trained from; but it was trained on 8 of the 8 contexts scored: not held-out scores" in told
    assert "scores on contexts that were trained on, layer 1" in told
    assert "held-out part" not in told
    notes = json.loads(posae("evaluate", run, "--store", half, "--json").out)["notes"]
    assert any(f"{run} was trained on 8 of the 8 contexts that it is scored on" in note for note in notes)
    model = tuned(tmp_path / "tuned")
    other = tmp_path / "other.zarr"
    assert posae("harvest", other, "--model", model, "--skip-contexts", 64, *SMALL, "--layers", 1).code == 0
    told = " ".join(posae("evaluate", run, "--store", other).out.split())
    assert "not trained from; made with another model" in told
    assert "held-out scores" not in told


def test_activations_of_the_same_name_and_size_are_not_taken_for_those_imported(
    posae: Posae, tmp_path: Path
) -> None:
    folder, store = tmp_path / "acts", tmp_path / "s.zarr"
    folder.mkdir()

    def write(seed: int) -> None:
        values = torch.randn(24, 4, 16, generator=torch.Generator().manual_seed(seed))
        (folder / "part.safetensors").write_bytes(safetensors.torch.save({"activations": values}))

    write(0)
    words: Words = ("import", folder, store, "--layer", 1)
    assert posae(*words).code == 0
    assert "already finished" in posae(*words).out
    size = (folder / "part.safetensors").stat().st_size
    write(1)
    assert (folder / "part.safetensors").stat().st_size == size
    assert "was 'sha256:" in is_refused(posae, *words)
