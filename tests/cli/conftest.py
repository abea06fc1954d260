"""The command line run in this process: what it ends with, and what it prints."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from posae.cli.app import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Posae = Callable[..., Ended]


def call(*words: object) -> int:
    """Run the command line in this process: what it ends with."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["posae", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture
def posae(capsys: pytest.CaptureFixture[str]) -> Posae:
    """Run the command line: its exit code, and what it printed since."""

    def run(*words: object) -> Ended:
        capsys.readouterr()
        code = call(*words)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run
