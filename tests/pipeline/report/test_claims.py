"""The paper's claims on made-up runs: each answer that a claim can have."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pytest

from posae.pipeline.report.comparison import findings
from posae.pipeline.report.measured import Measured, Study, StudyRun
from posae.pipeline.report.paper.claims import CLAIMS, judged
from posae.pipeline.report.verdicts import Answer, Verdict

if TYPE_CHECKING:
    from ..conftest import MadeRuns

HOLDS, SMALLER, CONTRADICTED = Answer.HOLDS, Answer.SMALLER, Answer.CONTRADICTED
NONE, UNTOLD = Answer.NO_DIFFERENCE, Answer.NOT_ENOUGH_DATA
JUDGES = {claim.name: claim.judge for claim in CLAIMS}

BROKEN: list[dict[str, Any]] = [{"step": step, "loss": float("nan")} for step in range(20)]
RISING: list[dict[str, Any]] = [{"step": step, "loss": 1.0 + step} for step in range(20)]

Values = Sequence[float | None]
"""Of a score, by seed."""


def judge(name: str, *studies: Study) -> Verdict:
    found = JUDGES[name](studies)
    assert found is not None
    return found


class Trial:
    """Makes studies of the runs of some settings, three seeds each."""

    def __init__(self, made: "type[MadeRuns]") -> None:
        self.made = made

    def runs(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        lines: Callable[[int], list[dict[str, Any]]] | None = None,
        n: int = 3,
        **scores: Any,
    ) -> list[Measured]:
        """A list as a score is one value a seed."""

        def of_seed(value: Any, seed: int) -> Any:
            return cast("Values", value)[seed] if isinstance(value, tuple) else value

        return [
            self.made.run(
                {**(settings or {}), "seed": seed},
                lines(seed) if lines else None,
                **{name: of_seed(value, seed) for name, value in scores.items()},
            )
            for seed in range(n)
        ]

    def study(self, name: str, *runs: list[Measured], agnostic: list[Measured] | None = None) -> Study:
        named = {f"run-{number}": some for number, some in enumerate(runs)}
        if agnostic is None:
            return self.made.study(name, named)
        return self.made.study(name, named | {"agnostic": agnostic}, {"agnostic": ("agnostic", "run-0")})


@pytest.fixture
def trial(made: "type[MadeRuns]") -> Trial:
    return Trial(made)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_without_its_study_a_claim_says_what_to_train(claim: Any, trial: Trial) -> None:
    other = trial.study("other", trial.runs({"architecture": "topk"}))
    verdict = next(one.verdict for one in judged([other]) if one.claim is claim)
    assert verdict.answer is UNTOLD
    assert verdict.reason.startswith(
        f"no run of study {claim.study}; train it: posae train STORE RUNS --sweep "
    )
    assert verdict.reason.endswith(f"/{claim.study}.toml")


def test_a_study_without_scores_is_named() -> None:
    waiting = StudyRun("a", 0, Measured("a", missing="has no scores yet"))
    found = judged([Study("layer-norm", "LayerNorm", (waiting,))])
    verdict = next(one.verdict for one in found if one.claim.name == "layer norm")
    assert verdict.answer is UNTOLD
    assert verdict.reason.startswith("runs of study layer-norm have no scores yet; resume: ")


@pytest.mark.parametrize(
    ("without", "n", "answer"), [(2.0, 3, HOLDS), (1.1, 3, SMALLER), (0.5, 3, CONTRADICTED), (2.0, 1, UNTOLD)]
)
def test_layer_norm_must_lower_the_variance_as_claimed(
    trial: Trial, without: float, n: int, answer: Answer
) -> None:
    """The variance is the square of the spread: twice the spread is 4 times, above 3.2."""
    metrics = trial.made.metrics
    with_it = trial.runs(lines=lambda _: metrics(spread=1.0), n=n)
    none = trial.runs({"layer_norm": "none"}, lines=lambda seed: metrics(spread=without + 0.01 * seed), n=n)
    verdict = judge("layer norm", trial.study("layer-norm", with_it, none))
    assert verdict.answer is answer
    assert "scale rms: " in verdict.reason


def test_layer_norm_falls_where_one_scale_of_activations_falls(trial: Trial) -> None:
    metrics = trial.made.metrics
    runs = [
        trial.runs(
            {"activation_scale": scale, "layer_norm": norm},
            lines=lambda _, spread=spread: metrics(spread=spread),
        )
        for scale, norm, spread in (
            ("rms", "both", 1),
            ("rms", "none", 2),
            ("none", "both", 1),
            ("none", "none", 1),
        )
    ]
    verdict = judge("layer norm", trial.study("layer-norm", *runs))
    assert verdict.answer is NONE
    assert "scale rms: 4 " in verdict.reason
    assert "scale none: 1 " in verdict.reason


@pytest.mark.parametrize(
    ("without", "answer"),
    [
        ((0.7, 0.71, 0.7), HOLDS),
        ((0.85, 0.86, 0.85), SMALLER),
        ((0.5, 0.9, 0.8), UNTOLD),
        ((0.7, None, None), UNTOLD),
    ],
)
def test_the_residual_must_retain_15_percent_more(trial: Trial, without: Values, answer: Answer) -> None:
    runs = trial.runs(retention=0.9), trial.runs({"residual": False}, retention=without)
    assert judge("gated residual", trial.study("residual", *runs)).answer is answer


@pytest.mark.parametrize(
    ("eight", "answer"),
    [((0.11, 0.11, 0.111), HOLDS), ((0.095, 0.096, 0.095), CONTRADICTED), ((0.09, 0.12, 0.1), UNTOLD)],
)
def test_four_ranges_must_beat_every_other_number(trial: Trial, eight: Values, answer: Answer) -> None:
    four = trial.runs(fvu=0.1)
    two = trial.runs({"ranges": "2"}, fvu=(0.12, 0.121, 0.12), ranges=["0:64", "64:128"])
    more = trial.runs({"ranges": "8"}, fvu=eight, ranges=[str(r) for r in range(8)])
    verdict = judge("four ranges", trial.study("ranges", four, two, more))
    assert verdict.answer is answer
    assert "2 ranges +20.3 %" in verdict.reason


def warmups(trial: Trial, none: Values, half: Values, n: int = 3) -> Study:
    return trial.study(
        "warmup",
        trial.runs(fvu=0.1, n=n),
        trial.runs({"warmup_steps": 0, "ramp_steps": 1000}, fvu=none, n=n),
        trial.runs({"warmup_steps": 500, "ramp_steps": 500}, fvu=half, n=n),
    )


CALM, NOISY = (0.101, 0.1, 0.1005), (0.08, 0.13, 0.1)


@pytest.mark.parametrize(
    ("none", "answer"), [((0.12, 0.121, 0.12), HOLDS), ((0.1, 0.1, 0.1), NONE), (NOISY, UNTOLD)]
)
def test_warm_up_must_help(trial: Trial, none: Values, answer: Answer) -> None:
    assert judge("warm-up", warmups(trial, none, CALM)).answer is answer


@pytest.mark.parametrize(
    ("half", "answer"),
    [((0.12, 0.121, 0.12), HOLDS), ((0.08, 0.081, 0.08), HOLDS), (CALM, SMALLER), (NOISY, UNTOLD)],
)
def test_pacing_is_sensitive_where_the_fvu_moves_by_a_tenth(
    trial: Trial, half: Values, answer: Answer
) -> None:
    verdict = judge("pacing", warmups(trial, CALM, half))
    assert verdict.answer is answer
    assert "50 % of the steps" in verdict.reason


def test_one_seed_never_tells_of_pacing(trial: Trial) -> None:
    verdict = judge("pacing", warmups(trial, (0.5,), (0.5,), n=1))
    assert verdict.answer is UNTOLD
    assert verdict.reason.endswith("; 1 of the 3 seeds that a verdict needs")


@pytest.mark.parametrize(
    ("none", "answer"), [((0.12, 0.121, 0.12), HOLDS), ((0.1, 0.1, 0.1), NONE), (NOISY, UNTOLD)]
)
def test_dropout_must_help(trial: Trial, none: Values, answer: Answer) -> None:
    study = trial.study("dropout", trial.runs(fvu=0.1), trial.runs({"dropout": 0.0}, fvu=none, fvu_base=0.5))
    assert judge("dropout", study).answer is answer


@pytest.mark.parametrize(
    ("n_parameters", "answer"), [(38_000, HOLDS), (99_000, CONTRADICTED), (None, UNTOLD)]
)
def test_overhead_is_counted(trial: Trial, n_parameters: int | None, answer: Answer) -> None:
    stated = trial.runs(n_parameters=n_parameters, n=1)
    narrow = trial.runs({"adapter_width": 5}, n_parameters=37_950, n=1)
    found = JUDGES["overhead"]([trial.study("overhead", stated, narrow)])
    assert (found.answer if found else UNTOLD) is answer
    if answer is CONTRADICTED:
        assert found is not None
        assert found.reason == "adapters of the stated width, d/2 = 64, add 200.0 %; a width of 5 adds 15.0 %"


@pytest.mark.parametrize(("lines", "answer"), [(None, HOLDS), (BROKEN, CONTRADICTED), (RISING, CONTRADICTED)])
def test_training_is_stable_where_every_loss_is_finite_and_falls(
    trial: Trial, lines: list[dict[str, Any]] | None, answer: Answer
) -> None:
    runs = trial.runs(lines=(lambda _: lines) if lines else None)
    assert judge("stability", trial.study("position", runs)).answer is answer


def test_a_training_of_few_lines_tells_no_stability(trial: Trial) -> None:
    runs = trial.runs(lines=lambda _: trial.made.metrics(2))
    assert JUDGES["stability"]([trial.study("position", runs)]) is None


@pytest.mark.parametrize(
    ("speed", "answer"), [((2.0, 2.1, 2.0), CONTRADICTED), ((1.0, 1.0, 1.0), NONE), ((0.6, 0.62, 0.6), HOLDS)]
)
def test_convergence_is_longer_where_more_tokens_reach_the_same_fvu(
    trial: Trial, speed: Sequence[float], answer: Answer
) -> None:
    def lines(rate: float) -> list[dict[str, Any]]:
        return trial.made.metrics(100, loss=lambda share: 2.0 ** (-4 * rate * share))

    ours = trial.runs(lines=lambda seed: lines(speed[seed]))
    theirs = trial.runs({"architecture": "standard"}, lines=lambda _: lines(1.0))
    verdict = judge("longer convergence", trial.study("position", ours, agnostic=theirs))
    assert verdict.answer is answer
    assert "CPU-seconds" in verdict.reason


def test_convergence_of_one_seed_is_noise(trial: Trial) -> None:
    ours, theirs = trial.runs(n=1), trial.runs({"architecture": "standard"}, n=1)
    verdict = judge("longer convergence", trial.study("position", ours, agnostic=theirs))
    assert verdict.answer is UNTOLD


MASKS = {
    "masks": {"mask_schedule": "fixed"},
    "small steps": {"mask_schedule": "fixed", "learning_rate": 3e-5},
    "progressive": {"mask_schedule": "curriculum"},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("broken", "answer"), [((1, 1, 1), HOLDS), ((0, 0, 0), CONTRADICTED), ((1, 0, 0), UNTOLD)]
)
def test_masks_fail_where_no_training_converges(
    trial: Trial, name: str, broken: Sequence[int], answer: Answer
) -> None:
    good = trial.made.metrics()

    def lines(seed: int) -> list[dict[str, Any]]:
        return BROKEN if broken[seed] else good

    settings = {"architecture": "masked", **MASKS[name]}
    hard = trial.runs({**settings, "mask": "hard"}, lines=lines)
    gaussian = trial.runs({**settings, "mask": "gaussian"}, lines=lambda _: BROKEN)
    bare = trial.runs({"architecture": "standard"}, fvu=0.05)
    study = trial.study("masks", hard, gaussian, agnostic=bare)
    verdict = judge(name, study)
    assert verdict.answer is answer
    assert f"{3 - sum(broken)} of 3 converged, to an FVU of 0.1" in verdict.reason
    assert "(without: 3 of 3, 0.05)" in verdict.reason
    for other in MASKS.keys() - {name}:
        assert JUDGES[other]([study]) is None


def test_what_fails_without_masks_too_is_not_failed_by_them(trial: Trial) -> None:
    hard = trial.runs({"architecture": "masked", "mask": "hard"}, lines=lambda _: RISING)
    bare = trial.runs({"architecture": "standard"}, lines=lambda _: RISING)
    verdict = judge("masks", trial.study("masks", hard, agnostic=bare))
    assert verdict.answer is UNTOLD
    assert verdict.reason.endswith("training fails without masks too")


def test_encoders_of_their_own_are_of_the_progressive_runs(trial: Trial) -> None:
    runs = trial.runs({"architecture": "separate"})
    verdict = judge("progressive", trial.study("masks", runs))
    assert verdict.answer is CONTRADICTED
    assert verdict.reason.startswith("separate encoders: 3 of 3 converged")


@pytest.mark.parametrize(
    ("kept", "answer"),
    [
        ((0.8, 0.81, 0.8), HOLDS),
        ((0.01, 0.02, 0.01), CONTRADICTED),
        ((0.2, 0.9, 0.5), UNTOLD),
        ((0.9, None, None), UNTOLD),
    ],
)
def test_the_base_is_stable_where_most_directions_are_kept(
    trial: Trial, kept: Values, answer: Answer
) -> None:
    drift = tuple(share and {"cosine_mean": 0.5, "kept_share": share} for share in kept)
    assert judge("stable base", trial.study("position", trial.runs(drift=drift))).answer is answer


@pytest.mark.parametrize(
    ("end", "answer"), [((0.5, 0.51, 0.5), HOLDS), ((2.0, 2.1, 2.0), CONTRADICTED), ((0.1, 3.0, 1.0), UNTOLD)]
)
def test_the_base_is_kept_where_it_explains_no_less(
    trial: Trial, end: Sequence[float], answer: Answer
) -> None:
    def lines(seed: int) -> list[dict[str, Any]]:
        found = trial.made.metrics()
        for line in found:
            line["fvu_base"] = 1.0 if line["alpha"] == 0 else end[seed]
        return found

    assert judge("base kept", trial.study("position", trial.runs(lines=lines))).answer is answer


@pytest.mark.parametrize(
    ("best", "n", "answer"),
    [((4, 4, 4), 3, HOLDS), ((1, 2, 1), 3, CONTRADICTED), ((4, 2, 4), 3, UNTOLD), ((4,), 1, UNTOLD)],
)
def test_clusters_are_four_in_every_seed(trial: Trial, best: Sequence[int], n: int, answer: Answer) -> None:
    clusters = tuple({"best_n": number, "score": 0.5, "null_score": 0.3} for number in best)
    assert (
        judge("four clusters", trial.study("position", trial.runs(clusters=clusters, n=n))).answer is answer
    )


def test_clusters_no_better_than_chance_are_none(trial: Trial) -> None:
    clusters = {"best_n": 4, "score": 0.3, "null_score": 0.31}
    assert (
        judge("four clusters", trial.study("position", trial.runs(clusters=clusters))).answer is CONTRADICTED
    )


@pytest.mark.parametrize(("size", "answer"), [(512, HOLDS), (128, CONTRADICTED), (None, UNTOLD)])
def test_overcomplete_is_more_features_than_numbers(trial: Trial, size: int | None, answer: Answer) -> None:
    found = JUDGES["overcomplete"]([trial.study("position", trial.runs(dictionary_size=size))])
    assert (found.answer if found else UNTOLD) is answer


def probing(codes: float, task: str = "indentation") -> dict[str, Any]:
    """``probing`` of ``evaluation.json``: all codes are told apart as well, activations at .93."""

    def scores(accuracy: float) -> dict[str, Any]:
        return {k: {"accuracy": accuracy, "standard_error": 0.01} for k in ("1", "2", "5", "all")}

    mean = {"activations": scores(0.93), "codes": scores(codes)}
    return {"source": "offline", "mean": mean, "tasks": {task: {"mean": mean}}}


@pytest.mark.parametrize(
    ("codes", "answer"),
    [((0.93, 0.931, 0.93), HOLDS), ((0.8, 0.81, 0.8), CONTRADICTED), ((0.7, 0.99, 0.93), UNTOLD)],
)
def test_probes_of_codes_are_set_beside_those_of_activations(
    trial: Trial, codes: Sequence[float], answer: Answer
) -> None:
    runs = trial.runs(probing=tuple(map(probing, codes)))
    verdict = judge("probing", trial.study("position", runs))
    assert verdict.answer is answer
    assert "offline tasks: activations 93.0 % / 93.0 % / 93.0 %, codes " in verdict.reason


@pytest.mark.parametrize(
    ("codes", "less", "better"),
    [
        ((0.8, 0.81, 0.8), HOLDS, CONTRADICTED),
        ((0.95, 0.96, 0.95), CONTRADICTED, HOLDS),
        ((0.9, 0.9, 0.9), NONE, NONE),
        ((0.7, 0.99, 0.93), UNTOLD, UNTOLD),
    ],
)
def test_interpretability_is_set_beside_the_agnostic_control(
    trial: Trial, codes: Sequence[float], less: Answer, better: Answer
) -> None:
    ours = trial.runs(probing=tuple(map(probing, codes)))
    theirs = trial.runs({"architecture": "standard"}, probing=probing(0.9))
    study = trial.study("position", ours, agnostic=theirs)
    assert judge("interpretability", study).answer is less
    assert judge("position tasks", study).answer is better


def test_tasks_that_position_does_not_tell_do_not_count(trial: Trial) -> None:
    ours = trial.runs(probing=probing(0.95, "package"))
    theirs = trial.runs({"architecture": "standard"}, probing=probing(0.9, "package"))
    assert JUDGES["position tasks"]([trial.study("position", ours, agnostic=theirs)]) is None


@pytest.mark.parametrize(
    ("fvu", "l0", "answer"), [(0.05, 16.0, HOLDS), (0.2, 16.0, CONTRADICTED), (0.05, 128.0, UNTOLD)]
)
def test_position_is_judged_by_its_controls(trial: Trial, fvu: float, l0: float, answer: Answer) -> None:
    runs = {
        "paper": trial.runs(fvu=fvu, l0=l0),
        "agnostic": trial.runs({"architecture": "standard"}, fvu=(0.1, 0.101, 0.1)),
        "shared": trial.runs({"shared_adapters": True}, fvu=(0.1, 0.101, 0.1)),
        "shuffled": trial.runs({"shuffle_positions": True}, fvu=(0.1, 0.101, 0.1)),
    }
    controls = {role: (role, "paper") for role in runs if role != "paper"}
    verdict = judge("position", trial.made.study("position", runs, controls))
    assert verdict.answer is answer
    assert verdict.reason.startswith("paper: ")


def test_of_several_runs_the_best_is_judged_as_one_of_so_many(trial: Trial) -> None:
    """A gain of 1.2 to 2.8 % holds of one run, but not as the best of four."""

    def study(n_runs: int) -> Study:
        runs: dict[str, list[Measured]] = {}
        controls: dict[str, tuple[str, str]] = {}
        for number in range(n_runs):
            name = f"run-{number}"
            width = {"adapter_width": 60 + number}
            runs[name] = trial.runs(width, fvu=(0.098, 0.0977, 0.0983))
            for role in ("agnostic", "shared", "shuffled"):
                runs[f"{name}.{role}"] = trial.runs({**width, "control": role}, fvu=0.1)
                controls[f"{name}.{role}"] = (role, name)
        return trial.made.study("position", runs, controls)

    assert judge("position", study(1)).answer is HOLDS
    verdict = judge("position", study(4))
    assert verdict.answer is Answer.SIZE_UNCLEAR
    assert "2.0 % less unexplained at equal L0 (16.0)" in verdict.reason
    assert "(98.75 % interval " in verdict.reason
    assert verdict.reason.endswith("; the best of 4 runs, with intervals widened for that")
    assert {finding.answer for finding in findings([study(4)])} == {HOLDS}


def test_runs_of_few_steps_show_figures_and_get_no_verdict(trial: Trial) -> None:
    few = {"steps": 100, "warmup_steps": 10, "ramp_steps": 90}
    runs = trial.runs(few, fvu=0.1, dictionary_size=512), trial.runs({**few, "dropout": 0.0}, fvu=0.12)
    verdicts = {one.claim.name: one.verdict for one in judged([trial.study("dropout", *runs)])}
    dropout = verdicts["dropout"]
    assert dropout.answer is UNTOLD
    assert dropout.reason.startswith("not enough steps for a verdict (100 of at least 500): ")
    assert "without dropout +20.0 %" in dropout.reason
    assert verdicts["stability"].answer is UNTOLD
    assert "3 of 3 runs" in verdicts["stability"].reason
    assert verdicts["overcomplete"].answer is HOLDS  # counted


def test_runs_of_few_steps_do_not_spoil_longer_ones(trial: Trial) -> None:
    few = {"steps": 100, "warmup_steps": 10, "ramp_steps": 90}
    long = trial.runs(fvu=0.1), trial.runs({"dropout": 0.0}, fvu=0.12)
    short = trial.runs(few, fvu=0.1), trial.runs({**few, "dropout": 0.0}, fvu=0.05)
    verdicts = {one.claim.name: one.verdict for one in judged([trial.study("dropout", *long, *short)])}
    assert verdicts["dropout"].answer is HOLDS
    assert "without dropout +20.0 %" in verdicts["dropout"].reason


@pytest.mark.parametrize(("l0", "answer"), [(16.1, HOLDS), (16.3, UNTOLD)])
def test_an_ablation_is_compared_at_equal_l0_alone(trial: Trial, l0: float, answer: Answer) -> None:
    study = trial.study("dropout", trial.runs(fvu=0.1), trial.runs({"dropout": 0.0}, fvu=0.12, l0=l0))
    verdict = judge("dropout", study)
    assert verdict.answer is answer
    assert ("not comparable at equal L0: without dropout" in verdict.reason) == (answer is UNTOLD)
    assert ("%" in verdict.reason) == (answer is HOLDS)


def test_only_runs_as_the_paper_says_stand_for_it(trial: Trial) -> None:
    others = (
        {"adapter_width": 5},
        {"layer_norm": "none"},
        {"warmup_steps": 500},
        {"residual": False},
        {"activation_scale": "none"},
        {"penalty": "code"},
        {"ramp_steps": 400},
        {"sparsity_warmup": 0.1},
    )
    runs = [trial.runs(settings, dictionary_size=512) for settings in others]
    assert JUDGES["overcomplete"]([trial.study("position", *runs)]) is None


def test_the_setting_with_the_most_seeds_stands_for_the_paper(trial: Trial) -> None:
    longer = {"steps": 2000, "warmup_steps": 200, "ramp_steps": 1800}
    runs = trial.runs(longer, n=1, dictionary_size=512), trial.runs(n=2, dictionary_size=128)
    assert judge("overcomplete", trial.study("position", *runs)).answer is CONTRADICTED
