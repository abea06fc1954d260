"""The examples run, whole, on a small store."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .cli.conftest import call

if TYPE_CHECKING:
    from .conftest import MakeStore

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_exploring_a_store(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=80, context_length=8, layers=(1, 4), held_out=16)
    words = [sys.executable, "-W", "error", EXAMPLES / "explore_store.py", made.root]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "layers [1, 4], 80 contexts of 8, sealed" in ended.stdout
    assert "16 contexts are held out" in ended.stdout
    assert "xarray: {'context': 8, 'feature': 16} uint16" in ended.stdout


def test_training_elsewhere(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=80, context_length=32, held_out=16)
    environment = dict(os.environ)
    if find_spec("nnsight") is None:
        # dictionary_learning imports it for its own harvesting, which is not used here.
        (tmp_path / "nnsight.py").write_text("class LanguageModel: ...\n")
        environment["PYTHONPATH"] = str(tmp_path)
    words = [sys.executable, EXAMPLES / "train_elsewhere.py", made.root]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    plain, theirs = ended.stdout.splitlines()[:1], ended.stdout.splitlines()[-1:]
    assert "plain PyTorch, 60 steps" in plain[0]
    if find_spec("dictionary_learning") is None:
        assert "not installed" in theirs[0]
    else:
        assert "dictionary_learning, 60 steps of TopK" in theirs[0]


def test_features_on_a_text_of_ones_own(tmp_path: Path) -> None:
    store, run = tmp_path / "demo.zarr", tmp_path / "run"
    assert call("harvest", store, "--contexts", "24", "--context-length", "16", "--layers", "2") == 0
    assert call("train", store, run, "--steps", "20", "--batch-size", "64", "--window-contexts", "8") == 0
    words = [
        sys.executable,
        "-W",
        "error",
        EXAMPLES / "own_text.py",
        run,
        "demo",
        "for name in sorted(names):",
    ]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    *rows, last = ended.stdout.splitlines()
    assert [row.split()[:2] for row in rows[:2]] == [["0", "'<bos>'"], ["1", "'for'"]]
    assert last.startswith("most likely next: ")
    assert "; without feature " in last
