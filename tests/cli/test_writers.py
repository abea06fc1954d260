"""Where two commands that write meet on one folder: refused with one line, or right."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import safetensors.torch
import torch

from posae.store import ActivationStore
from posae.store.shard_writer import ShardWriter

from .conftest import Posae

ROOT = Path(__file__).parents[2]
SMALL = ("--contexts", "40", "--context-length", "4")


def test_some_writers_after_some_killed_writers(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "writers.py"
    words = [sys.executable, str(script), str(tmp_path), "--sample", "40"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "40 pairs of" in done.stdout
    assert "0 wrong" in done.stdout


def test_a_layer_that_cannot_be_harvested_does_not_spoil_the_store_for_others(
    posae: Posae, tmp_path: Path
) -> None:
    model, store = tmp_path / "model", tmp_path / "a.zarr"
    shutil.copytree(ROOT / "pipeline" / "harvest" / "demo_model", model)
    tensors = cast(Any, safetensors.torch)  # its types are half there
    weights: dict[str, torch.Tensor] = tensors.load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    (model / "model.safetensors").write_bytes(tensors.save(weights, {"format": "pt"}))
    failed = posae("harvest", store, *SMALL, "--model", model, "--layers", "1,3")
    assert failed.code == 1
    assert (
        "layer 3 of model gives activations that are not finite, in contexts 0 to 39; leave that layer"
        in (failed.err.replace("\n", " "))
    )
    assert "(--layers 1)" in failed.err
    done = posae("harvest", store, *SMALL, "--model", model, "--layers", "1")
    assert (done.code, ActivationStore.open(store).layers) == (0, (1,))
    assert f"{store}: layer 3, begun earlier, will stay incomplete; the store will hold layer" in done.out


def test_a_harvest_resumed_with_fewer_layers_makes_no_further_ones(posae: Posae, tmp_path: Path) -> None:
    store, commit = tmp_path / "a.zarr", ShardWriter.commit

    def killed(writer: ShardWriter) -> None:
        if writer.spec.path == "layer_4":
            raise KeyboardInterrupt
        commit(writer)

    with patch.object(ShardWriter, "commit", killed):
        assert posae("harvest", store, *SMALL, "--layers", "1,2,4").code == 130
    assert not (store / "seal.json").exists()
    done = posae("harvest", store, *SMALL, "--layers", "1")
    assert done.code == 0
    held = ActivationStore.open(store).layers
    assert 4 not in held
    assert "layer 4, begun earlier, will stay incomplete; the store will hold layer" in done.out
    assert f"in layer{'s' * (len(held) > 1)} {', '.join(map(str, held))}, sealed as" in done.out
    assert list((store / "layer_4").glob("c.*")) == []
    assert posae("harvest", store, *SMALL, "--layers", "1,2,4").code == 0
    assert ActivationStore.open(store).layers == (1, 2, 4)


@pytest.mark.parametrize("first", ["harvest", "copy"])
def test_a_folder_of_something_else_is_left_as_it_is(posae: Posae, tmp_path: Path, first: str) -> None:
    notes, source = tmp_path / "notes", tmp_path / "source.zarr"
    notes.mkdir()
    (notes / "todo.txt").write_text("mine")
    assert posae("harvest", source, *SMALL, "--layers", "1").code == 0
    words = ("harvest", notes, *SMALL) if first == "harvest" else ("copy", source, notes)
    refused = posae(*words)
    assert refused.code == 1
    assert refused.err.count("error: ") == 1
    assert [file.name for file in notes.iterdir()] == ["todo.txt"]


@pytest.mark.parametrize("place", ["file", "file/x", "n" * 300])
def test_a_copy_to_what_can_be_no_folder_is_one_line(posae: Posae, tmp_path: Path, place: str) -> None:
    source = tmp_path / "source.zarr"
    (tmp_path / "file").write_text("mine")
    assert posae("harvest", source, *SMALL, "--layers", "1").code == 0
    refused = posae("copy", source, tmp_path / place)
    assert (refused.code, refused.err.count("error: ")) == (1, 1)
    assert "Traceback" not in refused.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_seal_that_names_files_of_mine_overwrites_none(posae: Posae, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine.zarr", tmp_path / "theirs.zarr"
    assert posae("harvest", mine, *SMALL, "--layers", "1").code == 0
    shutil.copytree(mine, theirs)
    for name in ("notes.txt", "README.md"):
        (mine / name).write_text("mine")
        (theirs / name).write_text("theirs")
        seal = json.loads((theirs / "seal.json").read_bytes())
        seal["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
        text = json.dumps(seal, sort_keys=True, separators=(",", ":"))
        (theirs / "seal.json").write_text(text)
        refused = posae("copy", theirs, mine)
        assert refused.code == 1
        assert (mine / name).read_text() == "mine"


def test_an_import_of_another_tensor_is_not_resumed(posae: Posae, tmp_path: Path) -> None:
    source, store = tmp_path / "acts.safetensors", tmp_path / "a.zarr"
    tensors = {name: torch.full((16, 4, 8), value) for name, value in (("a", 1.0), ("b", 2.0))}
    source.write_bytes(cast(Any, safetensors.torch).save(tensors))
    words = ("import", source, store, "--layer", "0", "--tensor")
    assert posae(*words, "a").code == 0
    refused = posae(*words, "b")
    assert refused.code == 1
    assert "dataset_column was 'a' and is now 'b'" in " ".join(refused.err.split())
    assert posae(*words, "a").code == 0
