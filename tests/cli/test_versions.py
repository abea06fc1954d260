"""What ``posae --version`` says, and that a shell's completion waits for nothing."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import posae as package

from .conftest import Posae

SITE = """Metadata-Version: 2.1
Name: torch
Version: 9.9
"""


def test_version_names_what_matters(posae: Posae) -> None:
    ended = posae("--version")
    first, *others = ended.out.splitlines()
    assert (ended.code, first) == (0, f"posae {package.__version__}")
    told = dict(line.split(maxsplit=1) for line in others)
    assert told["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert (told["torch"], told["zarr"], told["numpy"]) == (
        torch.__version__,
        version("zarr"),
        version("numpy"),
    )
    assert told.get("cuda") == torch.version.cuda


def test_version_finds_the_cuda_of_a_torch(
    posae: Posae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "torch-9.9.dist-info/METADATA": SITE,
        "torch/version.py": "__version__ = '9.9'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)  # pyright: ignore[reportUnknownMemberType]
    assert {("torch", "9.9"), ("cuda", "13.0")} <= {
        tuple(line.split()) for line in posae("--version").out.splitlines()
    }


@pytest.mark.parametrize(
    ("words", "completed"),
    [("posae tra", "train"), ("posae report --ou", "--out"), ("posae train --architecture jum", "jumprelu")],
)
def test_completion_knows_commands_options_and_values(words: str, completed: str) -> None:
    """Without torch, but for the options of train: they are declared beside its classes (decision 20)."""
    # As the script that --install-completion leaves asks for it.
    asked = {"_POSAE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    without = """if True:
        import os, sys

        sys.argv = ["posae"]
        if "train " not in os.environ["COMP_WORDS"]:
            sys.modules.update(torch=None, transformers=None)  # importing them fails
        from posae.cli.app import main

        main()
    """
    ended = subprocess.run(
        [sys.executable, "-c", without],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed in ended.stdout.split()
