"""Sweep files: which runs they give, and what they are refused for."""

import json
from pathlib import Path
from typing import Any

import pytest

from posae.pipeline.errors import RunError
from posae.pipeline.settings import TrainSettings
from posae.pipeline.train.sweep import Fitted, Plan, Study, read_sweep
from posae.store.errors import SettingsError


def fit(settings: TrainSettings) -> Fitted:
    """A store of d_model 16, without one: all that is left open has a value, and sizes are made up."""
    size = settings.dictionary_size or 16
    update = {"dictionary_size": size, "learning_rate": settings.learning_rate or 1e-3, "layer": 1}
    resolved = settings.model_copy(update=update)
    is_aware = settings.architecture == "hierarchical" or settings.position_mean != "none"
    return Fitted(resolved, 16 + 33 * size + 200 * is_aware)


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def plan(path: Path, options: dict[str, Any] | None = None, controls: bool | None = None) -> Plan:
    return Plan(read_sweep(path, options or {}, controls), fit)


def one(path: Path, options: dict[str, Any] | None = None) -> Study:
    (found,) = read_sweep(path, options or {})
    return found


TWO = """
study = "norm"
title = "With and without"
claim = "it is so"
seeds = [3, 1]
controls = false
[train]
steps = 50
batch_size = 64
[runs.with]
[runs.without]
layer_norm = "none"
batch_size = 32
"""


def test_default_preset_shared_own_and_option_win_in_this_order(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", TWO + '[runs.plain]\npreset = "paper-baseline"\nl1_coefficient = 2\n')
    runs = one(path, {"steps": 7, "dropout": None}).runs
    assert list(runs) == ["with", "without", "plain"]
    assert {(run.steps, run.clip_norm) for run in runs.values()} == {(7, 1.0)}
    assert [run.batch_size for run in runs.values()] == [64, 32, 64]
    assert [run.model_dump().get("layer_norm") for run in runs.values()] == ["both", "none", None]
    assert (runs["plain"].architecture, runs["plain"].model_dump()["l1_coefficient"]) == ("standard", 2)
    assert one(path).runs["with"].steps == 50


@pytest.mark.parametrize("key", ["steps = 100", 'preset = "paper"'])
def test_a_setting_outside_of_a_table_is_told_its_place(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, "a.toml", key + TWO)
    name = key.split()[0]
    with pytest.raises(SettingsError, match=rf"a.toml: {name} is outside of a table; put it under \[train\]"):
        read_sweep(path, {})


def test_each_run_is_trained_once_a_seed_which_is_its_data_seed_too(tmp_path: Path) -> None:
    found = plan(write(tmp_path, "a.toml", TWO))
    assert [(t.folder, t.settings.seed, t.settings.data_seed) for t in found.trainings] == [
        ("with/seed-1", 1, 1),
        ("without/seed-1", 1, 1),
        ("with/seed-3", 3, 3),
        ("without/seed-3", 3, 3),
    ]
    assert found.studies == [
        {
            "study": "norm",
            "title": "With and without",
            "claim": "it is so",
            "runs": [
                {"name": name, "seed": seed, "folder": f"{name}/seed-{seed}", "control": None, "of": None}
                for name in ("with", "without")
                for seed in (3, 1)
            ],
        }
    ]


def test_a_seed_given_as_an_option_is_the_only_one(tmp_path: Path) -> None:
    found = plan(write(tmp_path, "a.toml", TWO), {"seed": 8})
    assert [t.folder for t in found.trainings] == ["with/seed-8", "without/seed-8"]
    with pytest.raises(SettingsError, match="leave out --data-seed"):
        plan(tmp_path / "a.toml", {"data_seed": 8})


def test_an_including_file_wins_over_the_included_ones_but_not_over_what_a_run_alone_has(
    tmp_path: Path,
) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", "norm.toml", TWO)
    write(tmp_path / "inner", "all.toml", 'include = ["norm.toml"]\n[train]\nsteps = 20\ndropout = 0.3\n')
    text = (
        'include = ["inner/all.toml"]\nseeds = [0]\ncontrols = true\n[train]\nsteps = 10\nbatch_size = 16\n'
    )
    study = one(write(tmp_path, "quick.toml", text + "dropout = 0.2\n[runs]\n"))
    assert [(run.steps, run.batch_size, run.model_dump()["dropout"]) for run in study.runs.values()] == [
        (10, 16, 0.2),
        (10, 32, 0.2),
    ]
    assert study.seeds == ((0, 0),)
    assert study.controls


def test_runs_of_equal_settings_are_one_training_in_several_studies(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", TWO)
    write(tmp_path, "b.toml", TWO.replace("norm", "other", 1).replace("without", "bare"))
    found = plan(write(tmp_path, "all.toml", 'include = ["a.toml", "b.toml"]'))
    assert len(found.trainings) == 4
    folders = [[run["folder"] for run in study["runs"]] for study in found.studies]
    assert folders[0] == folders[1]
    assert [run["name"] for run in found.studies[1]["runs"]] == ["with", "with", "bare", "bare"]


def test_position_aware_runs_are_set_beside_their_controls(tmp_path: Path) -> None:
    text = 'study = "s"\nseeds = [0, 1]\n[runs.paper]\npreset = "paper"\n[runs.plain]\npreset = "topk"\n'
    path = write(tmp_path, "a.toml", text)
    found = plan(path)
    (study,) = found.studies
    assert [(run["name"], run["control"], run["of"]) for run in study["runs"] if run["seed"] == 1] == [
        ("paper", None, None),
        ("paper.agnostic", "agnostic", "paper"),
        ("paper.shared", "shared", "paper"),
        ("paper.shuffled", "shuffled", "paper"),
        ("paper.more-active", "more-active", "paper"),
        ("plain", None, None),
    ]
    by_folder = {training.folder: training for training in found.trainings}
    assert len(by_folder) == 12
    agnostic, run = (by_folder[f"{name}/seed-1"] for name in ("paper.agnostic", "paper"))
    assert abs(agnostic.n_parameters - run.n_parameters) <= 16
    assert (agnostic.settings.seed, agnostic.settings.data_seed) == (1, 1)
    assert agnostic.settings.architecture == "standard"
    assert len(plan(path, controls=False).trainings) == 4
    write(tmp_path, "a.toml", 'controls = ["agnostic"]\n' + text)
    assert {t.name for t in plan(path).trainings} == {"paper", "paper.agnostic", "plain"}


def test_equal_controls_are_trained_once(tmp_path: Path) -> None:
    text = 'study = "s"\n[train]\nsteps = 100\n[runs.a]\n[runs.b]\nwarmup_steps = 50\n'
    found = plan(write(tmp_path, "a.toml", text))
    runs = {run["name"]: run["folder"] for run in found.studies[0]["runs"]}
    assert runs["b.agnostic"] == "a.agnostic/seed-0"
    assert runs["b.more-active"] == "a.more-active/seed-0"
    assert runs["b.shared"] == "b.shared/seed-0"
    assert len(found.trainings) == 8


WRONG = [
    ("", "has no runs"),
    ("[runs.a", "cannot be read as TOML"),
    ("[runs.a]", "no name for their study; add the key study"),
    ('sweep = "a"', "has no setting 'sweep'"),
    ('study = "a"\n[run.a]', "did you mean 'runs'"),
    ('study = "a/b"\n[runs.a]', "'a/b' is not a valid name"),
    ('study = "a"\n[runs.".."]', "'..' is not a valid name"),
    ('study = "a"\n[runs."b.agnostic"]', "'b.agnostic' is not a valid name"),
    ('study = "a"\n[runs."/etc"]', "'/etc' is not a valid name"),
    ('study = "a"\n[runs.""]', "'' is not a valid name"),
    ('study = "a"\n[runs.a]\nlerning_rate = 1', "run 'a': .* did you mean 'learning_rate'"),
    ('study = "a"\n[runs.a]\npreset = "papper"', "run 'a': .* did you mean 'paper'"),
    ('study = "a"\n[runs.a]\npreset = 3', "run 'a': there is no preset 3"),
    ('study = "a"\n[runs.a]\nsteps = 5\nwarmup_steps = 6', "run 'a': .*does not fit"),
    ('study = "a"\n[train]\npreset = "paper"\n[runs.a]\narchitecture = "topk"', "leave one of them out"),
    ('study = "a"\nseeds = []\n[runs.a]', "at least one"),
    ('study = "a"\nseeds = [1, 1]\n[runs.a]', "distinct"),
    ('study = "a"\nseeds = [-1]\n[runs.a]', "from 0"),
    ('study = "a"\nseeds = "0"\n[runs.a]', "seeds"),
    ('study = "a"\ncontrols = ["agnostik"]\n[runs.a]', "did you mean 'agnostic'"),
    ('study = "a"\n[runs.a]\nseed = 1', "seed is not a setting of a sweep"),
    ('study = "a"\n[train]\ndata_seed = 1\n[runs.a]', "data_seed is not a setting of a sweep"),
    ('include = ["a.toml"]', "includes itself: .*a.toml > .*a.toml"),
    ('include = ["b.toml"]', "includes itself: .*a.toml > .*b.toml > .*a.toml"),
    ('include = ["nowhere.toml"]', "there is no file"),
    ('include = ["norm.toml", "norm.toml"]', "study 'norm' occurs twice"),
    (
        'include = ["norm.toml"]\nstudy = "a"\n[runs.with]',
        "run 'with': another run of this name has a different",
    ),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[text.replace("\n", " ") for text, _ in WRONG])
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "b.toml", 'include = ["a.toml"]')
    write(tmp_path, "norm.toml", TWO.replace("[3, 1]", "[0]"))
    with pytest.raises(SettingsError, match=said) as error:
        plan(write(tmp_path, "a.toml", text))
    assert "\n" not in str(error.value)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no file"):
        plan(tmp_path / "nowhere.toml")


def test_sweep_json_keeps_other_studies_and_is_written_only_where_it_changes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = plan(write(tmp_path, "a.toml", TWO))
    second = plan(write(tmp_path, "b.toml", TWO.replace('"norm"', '"more"')))
    first.write(runs)
    second.write(runs)
    found = json.loads((runs / "sweep.json").read_text())
    assert [study["study"] for study in found["studies"]] == ["norm", "more"]
    before = (runs / "sweep.json").stat()
    first.write(runs)
    assert (runs / "sweep.json").stat().st_ino == before.st_ino
    smaller = plan(write(tmp_path, "a.toml", TWO.partition("[runs.without]")[0]))
    smaller.write(runs)
    found = json.loads((runs / "sweep.json").read_text())
    assert [len(study["runs"]) for study in found["studies"]] == [2, 4]


@pytest.mark.parametrize("text", ["{", "[]", '{"studies": 3}', '{"studies": [3]}'])
def test_another_sweep_json_is_not_written_over(tmp_path: Path, text: str) -> None:
    write(tmp_path, "sweep.json", text)
    with pytest.raises(RunError, match="remove it"):
        plan(write(tmp_path, "a.toml", TWO)).write(tmp_path)
    assert (tmp_path / "sweep.json").read_text() == text
