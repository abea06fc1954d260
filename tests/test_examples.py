"""The examples run, whole, on a small store."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
