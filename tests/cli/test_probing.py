"""``posae evaluate --probing`` by real invocations: what is probed, and which tokenizer is trusted."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets  # pyright: ignore[reportMissingTypeStubs]
import pytest

from posae.pipeline.evaluate.probing import hub
from posae.pipeline.evaluate.probing.protocol import Sizes

from .conftest import Posae

DEMO_MODEL = Path(__file__).parents[2] / "pipeline" / "harvest" / "demo_model"


def trained(posae: Posae, folder: Path, *words: object) -> Path:
    """A run on a store of one layer and 256 contexts of 32 tokens."""
    store, run = folder / "made.zarr", folder / "run"
    size = ("--contexts", 256, "--context-length", 32, "--layers", 0)
    assert posae("harvest", store, *size, *words).code == 0
    quick = ("--steps", 5, "--window-contexts", 8, "--batch-size", 64)
    assert posae("train", store, run, "--preset", "paper-baseline", *quick).code == 0
    return run


def test_a_run_is_probed_from_its_store_alone(posae: Posae, tmp_path: Path) -> None:
    run = trained(posae, tmp_path)
    assert json.loads((run / "evaluation.json").read_text())["probing"] is None
    ended = posae("evaluate", run, "--probing", "offline")
    assert ended.code == 0
    assert "sparse probing (offline)" in ended.out
    assert "rows include contexts that the run was trained on" in " ".join(ended.out.split())
    assert "token class" in ended.out
    found = json.loads((run / "evaluation.json").read_text())["probing"]
    assert found["data"]["text"] == "documents"
    runs = found["data"]["alignment"]
    assert runs["missing"] == 0
    assert runs["found"] > 0.9 * runs["runs"]
    token_class = found["tasks"]["token class"]["mean"]["activations"]
    assert token_class["all"]["accuracy"] > 0.7
    assert token_class["1"]["accuracy"] < token_class["all"]["accuracy"]
    # What was measured before stays.
    assert json.loads(posae("evaluate", run, "--json").out)["probing"] == found


def test_a_local_model_is_named_and_its_tokenizer_must_be_the_stores(posae: Posae, tmp_path: Path) -> None:
    model, text = tmp_path / "my-model", tmp_path / "my-text.txt"
    shutil.copytree(DEMO_MODEL, model)
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(2000)))
    run = trained(posae, tmp_path, "--model", model, "--dataset", text)
    asked = ("evaluate", run, "--probing", "offline")
    ended = posae(*asked, "--model", model)
    assert ended.code == 0
    found = json.loads((run / "evaluation.json").read_text())["probing"]
    assert (found["data"]["text"], found["data"]["split"]) == ("decoded contexts", "contexts")
    assert found["tasks"]["distance to line start"]["classes"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        ended = posae(*asked)
        assert ended.code == 1
        assert "made with a local model, my-model; name its folder with --model" in " ".join(
            ended.err.split()
        )
    tokenizer: dict[str, Any] = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = posae(*asked, "--model", model)
    assert ended.code == 1
    assert "is not the one that" in " ".join(ended.err.split())


def test_saebench_runs_the_language_model_of_the_store(posae: Posae, tmp_path: Path) -> None:
    def texts(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[hub.Texts, hub.Texts]:
        rng = random.Random(seed)
        words = {"code": ["import", "return", "self.x", "(a, b)"], "prose": ["The", "house", "is", "white."]}

        def some(n: int) -> hub.Texts:
            return {name: [" ".join(rng.choices(words[name], k=6)) for _ in range(n)] for name in classes}

        return some(60), some(20)

    run = trained(posae, tmp_path)
    with patch.dict(hub.TASKS, {"made-up": hub.HubTask(("code", "prose"), texts)}, clear=True):
        ended = posae("evaluate", run, "--probing", "saebench", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)["probing"]
    assert found["source"] == "saebench"
    assert found["data"] == {"context_length": 32, "texts_without_tokens": 0}
    assert found["tasks"]["made-up"]["classes"]["code"]["n_test"] == 40
    assert found["mean"]["activations"]["all"]["accuracy"] > 0.95


def test_saebench_without_the_network_ends_in_one_line(
    posae: Posae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_words: object, **_options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    run = trained(posae, tmp_path)
    ended = posae("evaluate", run, "--probing", "saebench")
    assert ended.code == 1
    said = " ".join(ended.err.split())
    assert "LabHC/bias_in_bios" in said
    assert "no route to host" in said
    assert "--probing offline" in said
