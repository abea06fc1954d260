"""``posae train --sweep`` and ``--controls`` by real invocations, on a store made without a model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from posae.pipeline.runs import Run

from .conftest import Posae

if TYPE_CHECKING:
    from ..conftest import MakeStore

EXAMPLES = Path(__file__).parents[2] / "examples" / "paper"

SWEEP = """
study = "norm"
title = "With and without"
seeds = [0, 1]
controls = ["agnostic"]

[train]
steps = {steps}
batch_size = 64
window_contexts = 8
log_steps = 10
checkpoint_steps = 20

[runs.paper]

[runs.baseline]
preset = "paper-baseline"
"""


@pytest.fixture(scope="session")
def store(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contexts of 16 positions, 16 numbers to an activation."""
    root = tmp_path_factory.mktemp("sweeps") / "made.zarr"
    return make_store(root, n_contexts=40, context_length=16, layers=(1, 2, 4), held_out=8).root


def sweep_file(folder: Path, steps: int = 40) -> Path:
    path = folder / "sweep.toml"
    path.write_text(SWEEP.format(steps=steps))
    return path


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.parent.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("sae_weights.safetensors"))
    }


FOLDERS = {f"{name}/seed-{seed}" for name in ("baseline", "paper", "paper.agnostic") for seed in (0, 1)}


def test_a_sweep_trains_and_scores_each_run_and_control_once_a_seed(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = ("train", store, runs, "--sweep", sweep_file(tmp_path))
    ended = posae(*words)
    assert ended.code == 0, ended.err
    assert weights(runs).keys() == FOLDERS
    scores = {folder: Run(runs / folder).evaluation for folder in FOLDERS}
    paper, agnostic = scores["paper/seed-0"], scores["paper.agnostic/seed-0"]
    assert abs(paper["n_parameters"] - agnostic["n_parameters"]) <= (2 * 16 + 1) / 2
    assert (paper["architecture"], agnostic["architecture"]) == ("hierarchical", "standard")
    assert paper["ranges"] == agnostic["ranges"]
    assert len(set(weights(runs).values())) == 6
    (study,) = json.loads((runs / "sweep.json").read_text())["studies"]
    assert sorted(run["folder"] for run in study["runs"]) == sorted(FOLDERS)
    assert "6/6 " in ended.err
    assert "left for the others" in ended.err
    assert f"compare them with: posae report {runs}" in ended.out
    before = tree(runs)
    again = posae(*words)
    assert (again.code, again.out) == (0, f"{runs}: already finished\n")
    assert tree(runs) == before


def test_a_run_of_a_sweep_is_the_run_that_the_same_settings_make_alone(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    runs, alone = tmp_path / "runs", tmp_path / "alone"
    words = ("--steps", 12, "--no-controls", "--seed", 1)
    assert posae("train", store, runs, "--sweep", sweep_file(tmp_path), *words).code == 0
    assert weights(runs).keys() == {"baseline/seed-1", "paper/seed-1"}
    common = ("--steps", 12, "--batch-size", 64, "--window-contexts", 8, "--seed", 1, "--data-seed", 1)
    assert posae("train", store, alone, *common).code == 0
    assert weights(alone)["."] == weights(runs)["paper/seed-1"]


def test_the_time_left_is_that_of_groups_not_trained_yet_and_of_scoring(
    posae: Posae, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group trains for 1000 seconds, and a run of it is scored in 1."""
    from posae.cli import trainings

    now = [0.0]

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*given: Any) -> Any:
            now[0] += seconds
            return work(*given)

        return done

    monkeypatch.setattr(trainings, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(trainings, "train_together", takes(1000, trainings.train_together))
    monkeypatch.setattr(trainings, "evaluate", takes(1, trainings.evaluate))
    ended = posae("train", store, tmp_path / "runs", "--sweep", sweep_file(tmp_path, steps=4))
    assert ended.code == 0, ended.err
    left = re.findall(r"^(\d)/6 .*?(?:; about (.*) left for the others)?$", ended.err, re.MULTILINE)
    told = dict(entry for entry in left if entry[1])
    # One group of three is trained, and one as large is left, with two, one and no scorings before it.
    assert told == {"1": "16 min 45 s", "2": "16 min 44 s", "3": "16 min 43 s", "4": "2 s", "5": "1 s"}


def test_the_overview_keeps_names_whole_at_80_columns(
    posae: Posae, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.cli.trainings.console.width", 80)
    path = sweep_file(tmp_path, steps=1)
    path.write_text(path.read_text().replace("[runs.paper]", "[runs.layer-norm-adapter-and-so-on]"))
    path.write_text(path.read_text().replace("[0, 1]", "[0, 1, 2, 3]"))
    ended = posae("train", store, tmp_path / "runs", "--sweep", path)
    assert ended.code == 0, ended.err
    assert any(
        line.strip().startswith("layer-norm-adapter-and-so-on.agnostic ") for line in ended.out.splitlines()
    )


def test_a_killed_sweep_goes_on_to_the_same_weights_and_one_bad_run_does_not_stop_the_others(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    path = sweep_file(tmp_path, steps=200)
    checkpoint = killed / "paper" / "seed-0" / "checkpoint" / "state.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "posae", "train", store, killed, "--sweep", path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert weights(killed) == {}
    kept = checkpoint.read_bytes()
    checkpoint.write_bytes(b"no checkpoint")
    words = ("train", store, killed, "--sweep", path)
    ended = posae(*words)
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: 1 of 6 runs failed: paper/seed-0: ")
    assert "the same command tries these again" in last
    assert weights(killed).keys() == FOLDERS - {"paper/seed-0"}
    checkpoint.write_bytes(kept)
    ended = posae(*words)
    assert ended.code == 0
    assert "6 runs, 5 of them already finished" in ended.err
    assert posae("train", store, whole, "--sweep", path).code == 0
    assert weights(killed) == weights(whole)


def test_processes_share_a_sweep_and_what_one_of_them_leaves_is_finished(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    path = sweep_file(tmp_path, steps=150)
    words = [sys.executable, "-m", "posae", "train", store, shared, "--sweep", path, "--together", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, env=env, text=True) for _ in range(3)]
    while all(process.poll() is None for process in processes) and not any(shared.rglob("state.safetensors")):
        time.sleep(0.001)
    processes[0].kill()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0, 0], said
    assert posae("train", store, whole, "--sweep", path).code == 0
    assert weights(shared) == weights(whole)
    # Nobody trained what another had: what all say together is each run once, and the killed one's again.
    told = [line.split(":")[0].split()[-1] for text in said for line in text.splitlines() if "FVU" in line]
    assert {name for name in told if "/seed-" in name} == FOLDERS


def test_a_run_that_is_being_trained_is_left_alone(posae: Posae, store: Path, tmp_path: Path) -> None:
    with Run(tmp_path / "run").locked():
        ended = posae("train", store, tmp_path / "run", "--steps", 4)
    assert (ended.code, "is being trained by another process" in " ".join(ended.err.split())) == (1, True)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_that_diverges_is_a_result_and_the_others_are_trained(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    runs, path = tmp_path / "runs", sweep_file(tmp_path)
    with path.open("a") as file:
        file.write("[runs.diverged]\nlearning_rate = 1e30\n")
    ended = posae("train", store, runs, "--sweep", path, "--seed", 0, "--no-controls", "--steps", 20)
    assert ended.code == 0, ended.err
    assert "diverged/seed-0: FVU -" in ended.err
    found = {name: Run(runs / name / "seed-0").evaluation["fvu"] for name in ("paper", "diverged")}
    assert found["diverged"] is None
    assert found["paper"] > 0


def test_nothing_is_trained_where_a_run_does_not_fit_or_was_begun_otherwise(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    runs, path = tmp_path / "runs", sweep_file(tmp_path)
    with path.open("a") as file:
        file.write('[runs.too-many]\nranges = "17"\n')
    ended = posae("train", store, runs, "--sweep", path)
    assert ended.code == 1
    assert f"{path}, run 'too-many': 17 position ranges do not fit 16 positions" in " ".join(
        ended.err.split()
    )
    assert not runs.exists()
    path = sweep_file(tmp_path)
    words = ("train", store, runs, "--sweep", path)
    assert posae(*words, "--seed", 1, "--no-controls").code == 0
    before = tree(runs)
    ended = posae(*words, "--steps", 41)
    assert ended.code == 1
    assert "paper/seed-1 was begun differently" in ended.err
    assert tree(runs) == before


@pytest.mark.parametrize("place", ["", "paper"])
def test_a_sweep_does_not_go_into_a_single_run(posae: Posae, store: Path, tmp_path: Path, place: str) -> None:
    Run(tmp_path / "runs" / place).begin({"settings": {}})
    before = tree(tmp_path)
    ended = posae("train", store, tmp_path / "runs", "--preset", "paper", "--controls")
    assert ended.code == 1
    assert "is a single run; give the sweep another folder" in ended.err
    assert tree(tmp_path) == before


def test_controls_of_a_single_run_are_a_sweep_of_one(posae: Posae, store: Path, tmp_path: Path) -> None:
    words = ("--preset", "posae", "--steps", 30, "--batch-size", 64, "--window-contexts", 8)
    sizes = ("--position-mean", "lowrank:2", "--target-l0", 4, "--dictionary-size", 32, "--data-seed", 5)
    ended = posae("train", store, tmp_path / "runs", *words, *sizes, "--controls")
    assert ended.code == 0, ended.err
    names = ("posae", "posae.agnostic", "posae.more-active", "posae.shared")
    assert weights(tmp_path / "runs").keys() == {f"{name}/seed-0" for name in names}
    (study,) = json.loads((tmp_path / "runs" / "sweep.json").read_text())["studies"]
    assert [(run["control"], run["folder"]) for run in study["runs"]] == [
        (None, "posae/seed-0"),
        ("agnostic", "posae.agnostic/seed-0"),
        ("shared", "posae.shared/seed-0"),
        ("shuffled", "posae.shared/seed-0"),
        ("more-active", "posae.more-active/seed-0"),
    ]
    run = Run(tmp_path / "runs" / "posae" / "seed-0")
    assert (run.config["settings"]["seed"], run.config["settings"]["data_seed"]) == (0, 5)
    alone = posae("train", store, tmp_path / "alone", *words, *sizes)
    assert "has no controls" in alone.out
    baseline = posae("train", store, tmp_path / "baseline", "--preset", "topk", "--steps", 2)
    assert "no controls" not in baseline.out
    assert "note: FVU above 1, worse than the mean of all" in " ".join(baseline.out.split())
    assert "FVU above 1" not in alone.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset", "paper"), "leave out --preset and --config"),
        (("--config", "{path}"), "leave out --preset and --config"),
        (("--data-seed", "1"), "leave out --data-seed"),
        (("--layer", "3"), "has no layer 3"),
    ],
)
def test_what_contradicts_a_sweep_is_refused(
    posae: Posae, store: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    path = sweep_file(tmp_path)
    given = [word.format(path=path) for word in words]
    ended = posae("train", store, tmp_path / "runs", "--sweep", path, *given)
    assert ended.code == 1
    assert said in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_sweep_of_the_paper_fits_a_small_store(store: Path, path: Path) -> None:
    from posae.cli.trainings import fit_to
    from posae.pipeline.train.sweep import Plan, read_sweep
    from posae.store import ActivationStore

    plan = Plan(read_sweep(path, {"dictionary_size": 64}), fit_to(ActivationStore.open(store), path))
    assert plan.trainings
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert comments, f"{path} does not say what it measures"
    for study in plan.studies:
        assert any(run["control"] is None for run in study["runs"])


def test_all_of_the_paper_includes_every_study_and_quick_includes_all() -> None:
    from posae.pipeline.train.sweep import read_sweep

    files = {path.name for path in EXAMPLES.glob("*.toml")}
    studies = {Path(study.source).name for study in read_sweep(EXAMPLES / "all.toml", {})}
    assert studies == files - {"all.toml", "quick.toml"}
    quick = read_sweep(EXAMPLES / "quick.toml", {})
    assert {Path(study.source).name for study in quick} == studies
    assert {settings.steps for study in quick for settings in study.runs.values()} == {100}


def test_shares_of_the_steps_become_steps(store: Path) -> None:
    from posae.cli.trainings import fit_to
    from posae.pipeline.train.sweep import Plan, read_sweep
    from posae.store import ActivationStore

    found: dict[str, tuple[int | None, int | None]] = {}
    for name in ("warmup.toml", "curricula.toml"):
        studies = read_sweep(EXAMPLES / name, {"steps": 2000}, controls=False)
        for training in Plan(studies, fit_to(ActivationStore.open(store), EXAMPLES)).trainings:
            found[training.name] = training.settings.warmup_steps, training.settings.ramp_steps
    assert {name: steps for name, steps in found.items() if name.startswith(("paper", "warmup"))} == {
        "paper": (200, 1800),
        "warmup-0": (0, 2000),
        "warmup-500": (100, 1900),
        "warmup-2000": (400, 1600),
        "warmup-5000": (1000, 1000),
    }
    assert found["curriculum-hold"] == (200, 1000)
