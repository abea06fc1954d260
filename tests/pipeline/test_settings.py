"""Settings: one declaration, many sources, and refusals that help."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic.fields import FieldInfo

from posae.pipeline.sae.registry import ARCHITECTURES
from posae.pipeline.sae.run_settings import (
    all_options,
    resolve_train_settings,
    train_presets,
    train_settings,
)
from posae.pipeline.sae.words import train_words
from posae.pipeline.settings import (
    HARVEST_PRESETS,
    CopySettings,
    HarvestSettings,
    TrainSettings,
    build,
    nearest,
)
from posae.pipeline.settings.declared import group_of
from posae.pipeline.train import resolve
from posae.store import ActivationStore
from posae.store.errors import SettingsError

if TYPE_CHECKING:
    from ..conftest import Made


def train(options: dict[str, Any], preset: str | None = None, config: Path | None = None) -> TrainSettings:
    return resolve_train_settings(preset=preset, config=config, options=options)


def test_later_sources_win(tmp_path: Path) -> None:
    config = tmp_path / "posae.toml"
    config.write_text("[train]\nl1_coefficient = 0.5\nsteps = 77\n[harvest]\nseed = 3\n")
    found = train({"steps": 88, "seed": None}, preset="paper", config=config)
    values = found.model_dump()
    assert [values[name] for name in ("l1_coefficient", "steps", "seed", "learning_rate")] == [
        0.5,
        88,
        0,
        3e-4,
    ]


def test_neither_preset_nor_architecture_is_the_paper() -> None:
    assert train({}) == train({}, preset="paper")
    assert train({}).architecture == "hierarchical"


def test_an_architecture_alone_has_its_own_best_practice() -> None:
    assert train({"architecture": "standard"}) == train({}, preset="paper-baseline")
    assert train({"architecture": "hierarchical"}) == train({}, preset="paper")


def test_a_preset_in_the_file_counts_unless_one_is_given(tmp_path: Path) -> None:
    config = tmp_path / "posae.toml"
    config.write_text('[train]\npreset = "paper-baseline"\n')
    assert train({}, config=config).architecture == "standard"
    assert train({}, preset="paper", config=config).architecture == "hierarchical"


@pytest.mark.parametrize("fields", [HarvestSettings.model_fields, all_options()], ids=["harvest", "train"])
def test_every_setting_has_a_description(fields: dict[str, FieldInfo]) -> None:
    assert [name for name, field in fields.items() if not field.description] == []


def test_every_setting_of_a_run_has_a_group() -> None:
    assert [name for name, field in all_options().items() if group_of(field) is None] == []


def test_every_preset_is_described_and_the_first_of_each_architecture_is_its_own() -> None:
    for name, kind in ARCHITECTURES.items():
        assert all(preset.about.endswith(".") for preset in kind.presets.values())
        assert train({"architecture": name}) == train({}, preset=next(iter(kind.presets)))


@pytest.mark.parametrize("presets", [HARVEST_PRESETS, train_presets()], ids=["harvest", "train"])
def test_every_preset_resolves(presets: dict[str, dict[str, Any]]) -> None:
    for values in presets.values():
        build(HarvestSettings, values, "") if presets is HARVEST_PRESETS else train_settings(values)


def test_gemma_presets_are_the_two_models_and_the_pile() -> None:
    assert HARVEST_PRESETS["gemma-2-2b"]["layers"] == (5, 12, 19)
    assert HARVEST_PRESETS["gemma-2b"]["layers"] == (3, 8, 13)
    assert {preset["dataset"] for preset in HARVEST_PRESETS.values()} == {"monology/pile-uncopyrighted"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lerning_rate": 1}, "did you mean 'learning_rate'"),
        ({"steps": 0}, "steps"),
        ({"steps": 10, "warmup_steps": 11}, "does not fit"),
        ({"steps": 10, "warmup_steps": 5, "ramp_steps": 6}, "do not fit"),
        ({"steps": 10, "ramp_steps": 11}, "does not fit"),
        ({"ramp_steps": 5, "ramp_share": 0.5}, "ramp_steps and ramp_share contradict"),
        ({"ramp_share": 0.95}, "a warm-up of 0.1 of the steps and a ramp_share of 0.95 exceed 1"),
        ({"steps": 10, "warmup_steps": 6, "ramp_share": 0.5}, "a warm-up of 0.6"),
        ({"curriculum": "step", "ramp_share": 0.5}, "step has no ramp"),
        ({"dropout": 1.0}, "dropout"),
        ({"window_contexts": 12}, "window_contexts"),
        ({"architecture": "transcoder"}, "architecture"),
        ({"curriculum": "step", "ramp_steps": 10}, "has no ramp"),
        (
            {"architecture": "topk", "sparsity_warmup": 0.1},
            "sparsity_warmup is a setting of hierarchical, standard, jumprelu, masked, separate, and means "
            "nothing to topk; leave it out",
        ),
        (
            {"architecture": "topk", "adapter_width": 8},
            "adapter_width is a setting of hierarchical, ",
        ),
        ({"adapter_width": 4, "adapter_share": 0.15}, "contradict"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        train_settings(values, "[train]")


def test_settings_of_another_architecture_are_dropped_where_they_are_its_defaults() -> None:
    found = train({"adapter_gain": 1.0, "mask": "hard", "bandwidth": 0.03, "architecture": "topk"})
    assert found == train({"architecture": "topk"})
    assert not found.model_dump().keys() & {"adapter_gain", "mask", "bandwidth"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nsteps = 1", r"posae.toml has a table \[trian\]; did you mean 'train'"),
        ("[foo]", r"posae.toml has a table \[foo\]; there are copy, evaluate, harvest, import, import-sae, "),
        ("steps = 1", r"posae.toml: steps stands outside of a table; put it under \[train\]"),
        ("[train", "cannot be read as TOML"),
        ("train = 3", r"write \[train\] and settings below it"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "posae.toml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=said):
        train({}, config=config)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"clip_norm": 0}, "clip_norm must be above 0, not 0"),
        ({"warmup_share": 1.5}, "warmup_share must be at most 1, not 1.5"),
        ({"dropout": 1}, "dropout must be below 1, not 1"),
        ({"window_contexts": 12}, "window_contexts must be a multiple of 8, not 12"),
        ({"precision": "float16"}, "precision must be 'float32', 'tf32' or 'bfloat16', not 'float16'"),
        ({"steps": "ten"}, "steps must be a whole number, not 'ten'"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"dropout": "x" * 64}, "dropout must be a number, not 'xxxxxxxxxxxxxxx…"),
        ({"residual": "maybe"}, "residual must be true or false, not 'maybe'"),
        ({"ranges": 4}, "ranges must be text, not 4"),
    ],
)
def test_an_impossible_value_is_refused_in_plain_words_that_say_where_it_stands(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    (name,) = values
    with pytest.raises(SettingsError, match=f"^--{name.replace('_', '-')}{re.escape(said[len(name) :])}$"):
        train(values)
    config = tmp_path / "posae.toml"
    config.write_text(f"[train]\n{name} = {json.dumps(values[name])}\n")
    with pytest.raises(SettingsError, match=rf"^{config}: \[train\] {re.escape(said)}$"):
        train({}, config=config)


def test_an_entry_of_a_list_and_a_form_of_its_own_are_told_too() -> None:
    with pytest.raises(SettingsError, match=r"^layers has an entry that must be a whole number, not 'a'$"):
        build(HarvestSettings, {"layers": [1, "a"]}, "")
    with pytest.raises(SettingsError, match=r"^--contexts is written as 0:100000, not '5-7'$"):
        build(CopySettings, {"contexts": "5-7"}, "", ["contexts"])


def test_tokens_are_rounded_up_to_whole_contexts() -> None:
    assert build(HarvestSettings, {"tokens": 129}, "").n_contexts == 2
    assert build(HarvestSettings, {}, "").n_contexts == 4096


def test_what_is_nothing_like_a_word_gets_the_whole_list() -> None:
    assert nearest("zzz", ["b", "a"]) == "there are a, b"


def as_options(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Preset and options of words on the command line."""
    options: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, value = word.removeprefix("--").replace("-", "_"), True
            if name.startswith("no_"):
                name, value = name.removeprefix("no_"), False
            options[name] = value
        else:
            options[list(options)[-1]] = word
    return options.pop("preset"), options


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        *((preset, {}) for preset in train_presets()),
        ("paper", {"steps": 77, "seed": 4, "residual": False, "ranges": "0:1,1:6", "dropout": 0.0}),
        ("paper", {"steps": 100, "warmup_steps": 0}),
        ("paper", {"steps": 100, "ramp_steps": 20}),
        ("paper", {"steps": 100, "warmup_steps": 10, "ramp_share": 0.5}),
        ("paper", {"curriculum": "step", "warmup_share": 0.5}),
        ("paper", {"curriculum": "plateau"}),
        ("paper", {"adapter_width": 3}),
        ("batchtopk", {"dictionary_size": 40, "learning_rate": 1e-5, "position_adapter": "bias+decoder:2"}),
    ],
    ids=str,
)
def test_the_words_of_a_trainings_settings_give_them_again(
    good_store: "Made", preset: str, options: dict[str, Any]
) -> None:
    store = ActivationStore.open(good_store.root)
    trained = resolve(store, train(options, preset)).model_dump(mode="json")
    words = train_words(trained, store.d_model)
    assert words is not None
    again_preset, again = as_options(words)
    assert resolve(store, train(again, again_preset)).model_dump(mode="json") == trained
    if not options and preset != "paper-15pct":
        assert again_preset == preset


def test_settings_that_no_words_give_have_none() -> None:
    trained = train({}).model_dump(mode="json")
    assert train_words({**trained, "of the future": 1}, 16) is None
    assert train_words({**trained, "architecture": "other"}, 16) is None
