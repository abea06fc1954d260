"""Controls: the same but for one thing, and of the nearest size."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posae.pipeline.ranges import parse_ranges
from posae.pipeline.sae.registry import new_autoencoder
from posae.pipeline.sae.run_settings import settings_class, train_presets, train_settings
from posae.pipeline.train.controls import CONTROLS, controls_of, is_position_aware, nearest_size

D_MODEL, LENGTH = 32, 16


def settings(preset: str, **more: Any) -> dict[str, Any]:
    """Of a preset, as they are once resolved: nothing in them is left open."""
    resolved: dict[str, Any] = {"dictionary_size": 48, "learning_rate": 3e-4}
    values = {**train_presets()[preset], **resolved, "steps": 100, "warmup_steps": 10, "ramp_steps": 90}
    if values["architecture"] == "hierarchical":
        values |= {"adapter_share": None, "adapter_width": 16}
    if "target_l0" in settings_class(values).model_fields:
        values["target_l0"] = 8
    return train_settings({**values, **more}, "").model_dump()


def n_parameters(values: Mapping[str, Any]) -> int:
    """Counted on weights that have only shapes."""
    found = settings_class(values).model_construct(**values).model_dump()
    common = {name: found[name] for name in ("position_mean", "position_adapter", "shared_adapters")}
    own = {
        "hierarchical": ("l1_coefficient", "adapter_width", "layer_norm", "decoder_bias"),
        "masked": ("l1_coefficient", "mask"),
        "separate": ("l1_coefficient",),
        "standard": ("l1_coefficient",),
        "batchtopk": ("target_l0",),
        "jumprelu": ("target_l0",),
    }[found["architecture"]]
    return new_autoencoder(
        found["architecture"],
        d_model=D_MODEL,
        dictionary_size=found["dictionary_size"],
        ranges=parse_ranges(found["ranges"], LENGTH),
        generator=None,
        **common,
        **{name: found[name] for name in own},
    ).n_parameters()


AWARE = [
    settings("paper"),
    settings("paper", layer_norm="none", ranges="0:1,1:4,4:16"),
    settings("paper-15pct", adapter_width=3),
    settings("posae", position_mean="lowrank:4"),
    settings("batchtopk", position_adapter="bias+decoder:2"),
    settings("jumprelu", position_adapter="decoder:4", position_mean="exact"),
    settings("hard-mask"),
    settings("separate-encoders", ranges="8"),
]
IDS = [f"{number} {values['architecture']}" for number, values in enumerate(AWARE)]


@pytest.mark.parametrize("run", AWARE, ids=IDS)
def test_the_agnostic_control_is_as_large_within_half_a_feature_and_knows_no_position(
    run: dict[str, Any],
) -> None:
    agnostic = controls_of(run, n_parameters)["agnostic"]
    assert is_position_aware(run)
    assert not is_position_aware(agnostic)
    one_more = {**agnostic, "dictionary_size": agnostic["dictionary_size"] + 1}
    each = n_parameters(one_more) - n_parameters(agnostic)
    assert 2 * abs(n_parameters(agnostic) - n_parameters(run)) <= each


@pytest.mark.parametrize("run", AWARE, ids=IDS)
def test_controls_see_the_same_tokens_and_differ_from_the_run_in_what_they_are_of(
    run: dict[str, Any],
) -> None:
    found = controls_of(run, n_parameters)
    assert list(found) == list(CONTROLS)
    for name in (
        "steps",
        "batch_size",
        "window_contexts",
        "ranges",
        "learning_rate",
        "layer",
        *(["l1_coefficient"] if "l1_coefficient" in run else ["target_l0"]),
    ):
        assert found["agnostic"][name] == run[name]
    assert found["shuffled"] == {**run, "shuffle_positions": True}
    has_adapters = run["architecture"] != "batchtopk" or run["position_adapter"] != "none"
    changed = "shared_adapters" if has_adapters else "shuffle_positions"
    assert found["shared"] == {**run, changed: True}
    for name in ("shared", "shuffled"):
        assert not is_position_aware(found[name]), "a control would get controls"


@pytest.mark.parametrize(("preset", "kind"), [("paper", "standard"), ("posae", "batchtopk")])
def test_more_active_is_the_agnostic_one_with_one_more_or_a_smaller_penalty(preset: str, kind: str) -> None:
    found = controls_of(settings(preset, position_adapter="bias"), n_parameters)
    agnostic, more = found["agnostic"], found["more-active"]
    assert agnostic["architecture"] == kind
    differ = {name for name in more if more[name] != agnostic[name]}
    assert differ == {"l1_coefficient" if kind == "standard" else "target_l0"}
    if kind == "batchtopk":
        assert more["target_l0"] == agnostic["target_l0"] + 1
    else:
        assert more["l1_coefficient"] == pytest.approx(0.9 * agnostic["l1_coefficient"])


def test_shared_adapters_are_fewer_parameters_and_means_alone_are_shared_by_shuffling() -> None:
    adapted = settings("paper")
    assert n_parameters(controls_of(adapted, n_parameters)["shared"]) < n_parameters(adapted)
    means = controls_of(settings("posae"), n_parameters)
    assert means["shared"] == means["shuffled"]


@pytest.mark.parametrize("preset", ["paper-baseline", "topk", "batchtopk", "jumprelu"])
def test_what_knows_no_position_gets_no_controls(preset: str) -> None:
    assert not is_position_aware(settings(preset))


@given(
    st.integers(1, 10**12),
    st.integers(1, 10**5),
    st.integers(-(10**6), 10**6),
    st.integers(1, 10**5),
)
def test_the_nearest_size_is_the_nearest(wanted: int, size: int, fixed: int, each: int) -> None:
    def count(features: int) -> int:
        return fixed + each * features

    found = nearest_size(wanted, size, count)
    assert found >= 1
    for other in (found - 1, found + 1):
        assert other < 1 or abs(count(found) - wanted) <= abs(count(other) - wanted)
