"""What people are told by real invocations when something is wrong, missing or interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from posae.cli.app import app
from posae.pipeline.train import Ongoing
from posae.store.seal import CORPUS_PATH
from posae.store.writer import ShardOfLayers

from .conftest import Posae, call

if TYPE_CHECKING:
    from ..conftest import MakeStore

DEMO_MODEL = Path(__file__).parents[2] / "pipeline" / "harvest" / "demo_model"
QUICK = ("--steps", "20", "--batch-size", "64", "--window-contexts", "8", "--dictionary-size", "8")
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
PARAMETERS = {name: command.get_params(typer.Context(command)) for name, command in COMMANDS.items()}
WITH_CONFIG = [name for name, parameters in PARAMETERS.items() if "config" in {p.name for p in parameters}]


@pytest.fixture(scope="module")
def store(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("messages") / "made.zarr"
    return make_store(root, n_contexts=40, context_length=16, layers=(1, 2), held_out=8).root


@pytest.fixture(scope="module")
def trained(store: Path) -> Path:
    run = store.parent / "run"
    assert call("train", store, run, *QUICK) == 0
    return run


def the_error(err: str) -> str:
    """The one line of an error."""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


# Settings


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_command_with_settings_reads_its_table(posae: Posae, tmp_path: Path, name: str) -> None:
    config = tmp_path / "f.toml"
    config.write_text(f"[{name}]\nno_such_setting = 1\n")
    needed = [word for p in PARAMETERS[name] if p.required for word in (*p.opts[-1:], "x")]
    words = [word for word in needed if word.startswith("-") or word == "x"]
    ended = posae(name, *words, "--config", config)
    assert (ended.code, f"{config}: [{name}] has no setting 'no_such_setting'" in ended.err) == (1, True)


def test_a_value_is_refused_in_plain_words_that_say_where_it_stands(posae: Posae, tmp_path: Path) -> None:
    assert the_error(posae("harvest", "x", "--contexts", 0).err) == "--contexts must be at least 1, not 0"
    refused = posae("copy", "x", "y", "--contexts", "5-7")
    assert the_error(refused.err) == "--contexts is written as 0:100000, not '5-7'"
    config = tmp_path / "f.toml"
    config.write_text("[harvest]\ncontexts = 0\n")
    refused = posae("harvest", "x", "--config", config)
    assert the_error(refused.err) == f"{config}: [harvest] contexts must be at least 1, not 0"
    config.write_text('study = "a"\n[runs.b]\nsteps = 0\n')
    refused = posae("train", "x", "y", "--sweep", config)
    assert the_error(refused.err) == f"{config}, run 'b': steps must be at least 1, not 0"
    refused = posae("train", "x", "y", "--sweep", config, "--steps", 0)
    assert the_error(refused.err) == f"{config}, run 'b': --steps must be at least 1, not 0"
    for words, said in (
        (("--codec", "zip"), "'zip' is not one of 'small', 'fast', 'raw'"),
        (("--contexts", "ten"), "must be a whole number, not 'ten'"),
    ):
        ended = posae("harvest", "x", *words)
        told = " ".join(re.sub("[│╭╮╰╯─]", "", ended.err).split())
        assert (ended.code, f"Invalid value for '{words[0]}': {said}" in told) == (2, True)


# Runs and stores that are there


def test_a_run_of_other_settings_is_told_by_what_was_typed(posae: Posae, store: Path, trained: Path) -> None:
    words = ("--layer", 1, "--seed", 3, "--dropout", 0, "--penalty", "base")
    told = the_error(posae("train", store, trained, *QUICK, *words).err)
    assert "dropout was 0.1 and is now 0.0; layer was 2 and is now 1; penalty was" in told
    assert told.count(" and is now ") == 3
    assert "; also seed; use the same options" in told
    assert not re.search("[0-9a-f]{17}|settings", told)


def test_a_store_of_other_settings_is_told_by_what_was_typed(posae: Posae, tmp_path: Path) -> None:
    out, text = tmp_path / "demo.zarr", tmp_path / "text.txt"
    text.write_text("some text\n" * 4000)
    small = ("--contexts", 16, "--context-length", 16, "--layers", 0)
    assert posae("harvest", out, *small).code == 0
    told = the_error(posae("harvest", out, *small, "--dataset", text, "--codec", "raw", "--seed", 3).err)
    assert "--dataset was 'stdlib' and is now 'text.txt'; " in told
    assert "--seed was 0 and is now 3; " in told
    assert "--codec was 'small' and is now 'raw'; also --dataset-revision" in told
    assert not re.search("[0-9a-f]{17}", told)


def test_an_import_onto_a_run_of_another_kind_says_only_that(
    posae: Posae, store: Path, trained: Path
) -> None:
    refused = posae("import-sae", trained, trained, "--store", store)
    assert the_error(refused.err) == f"{trained} is a run already; give another folder"


def test_a_run_whose_store_was_moved_is_told_how_to_name_it(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    old, new, run = tmp_path / "old.zarr", tmp_path / "new.zarr", tmp_path / "run"
    shutil.copytree(store, old)
    assert posae("train", old, run, *QUICK).code == 0
    old.rename(new)
    refused = posae("evaluate", run)
    told = f"there is no store at {old}; if it was moved, name it with --store"
    assert (refused.code, the_error(refused.err)) == (1, told)
    page = tmp_path / "page.html"
    said = posae("report", run, "--out", page, "--features", 2).err
    remedy = f"posae evaluate {run} --store STORE"
    assert f"there is no store at {old}; if it was moved, name it with {remedy}" in " ".join(said.split())
    assert posae("evaluate", run, "--store", new).code == 0
    words = ("--out", page, "--features", 2, "--tokenizer", DEMO_MODEL)
    assert "no explorer" not in posae("report", run, *words).err
    assert "make one with: posae harvest" in posae("evaluate", run, "--store", old).err


def test_a_folder_that_holds_runs_is_said_to_before_anything_else(
    posae: Posae, store: Path, trained: Path
) -> None:
    refused = posae("train", store, trained.parent, *QUICK)
    assert the_error(refused.err).endswith(
        "is no run, and it holds runs: add --controls or --sweep, or give another folder"
    )
    assert "position explains" not in refused.err


@pytest.mark.parametrize("words", [(), ("--out", "tables.md")])
def test_features_without_a_page_are_refused(posae: Posae, trained: Path, words: tuple[str, ...]) -> None:
    refused = posae("report", trained, "--features", 5, *words)
    assert (refused.code, "add --out page.html" in the_error(refused.err)) == (1, True)


def test_a_store_of_few_things_is_told_without_plurals_and_gaps(
    posae: Posae, make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=9, held_out=1, layers=(0,), seal=False)
    corpus = made.root / CORPUS_PATH
    text = re.sub(r'("special_tokens": )\{.*?\}', r"\1{}", corpus.read_text(), flags=re.DOTALL)
    corpus.write_text(text.replace('"documents": 9', '"documents": 1'))
    told = " ".join(posae("inspect-store", made.root).out.split())
    assert "documents 1, 0 of them left out; 0 contexts repeat another " in told
    assert "; training leaves them out by default documents " in told
    refused = posae("inspect-store", made.root, "--context", 300)
    assert the_error(refused.err) == "context 300 is out of range: the store has 9"


# Interrupts


@pytest.mark.usefixtures("in_a_terminal")
def test_an_interrupted_training_says_what_is_there(
    posae: Posae, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take = tmp_path / "run", Ongoing.take

    def interrupted(self: Ongoing, *given: Any) -> str:
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
        return take(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Ongoing, "take", interrupted)
        ended = posae("train", store, run, *QUICK)
    assert (ended.code, ended.err.splitlines()[-1]) == (
        130,
        "interrupted: checkpoint saved at step 7; run the same command again to resume",
    )
    assert posae("train", store, run, *QUICK).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("posae.cli.trainings.evaluate", interrupt)
        (run / "evaluation.json").unlink()
        ended = posae("train", store, run, *QUICK)
    assert ended.err.splitlines()[-1] == (
        "interrupted: training is finished; run the same command again to score it"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Ongoing, "take", interrupt)
        ended = posae("train", store, tmp_path / "other", *QUICK)
        assert ended.err.splitlines()[-1].startswith(
            "interrupted: no checkpoint yet; the same command starts"
        )
        ended = posae("train", store, tmp_path / "all", *QUICK, "--controls")
    assert re.search(r"interrupted: 0 of \d runs are finished; run the same command again .*\n$", ended.err)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_harvest_says_how_many_shards_are_there(
    posae: Posae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("harvest", tmp_path / "a.zarr", "--contexts", 16, "--context-length", 16, "--layers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(ShardOfLayers, "commit", interrupt)
        ended = posae(*words)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == (
        "interrupted: 0 of 1 shard written; run the same command again to resume"
    )
    assert posae(*words).code == 0


def test_any_other_command_that_is_interrupted_says_so_in_one_line(
    posae: Posae, store: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.pipeline.evaluate.evaluate.evaluate", interrupt)
    ended = posae("evaluate", trained)
    assert (ended.code, ended.out, ended.err) == (130, "", "interrupted\n")
    monkeypatch.setattr("posae.pipeline.stores.copy.copy", interrupt)
    ended = posae("copy", store, tmp_path / "copied.zarr")
    assert ended.err == "interrupted: progress is saved; run the same command again to resume\n"


_INTERRUPTED_AT_ONCE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
signal.raise_signal(signal.SIGINT)
"""


def test_an_interrupt_while_modules_are_loaded_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(_INTERRUPTED_AT_ONCE)
    ended = subprocess.run(
        [sys.executable, "-m", "posae", "--version"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
