"""The paper's claims, and what runs say about each.

A claim is a quotation from the paper, what is measured for it, the study that measures it, and a function
from studies to a verdict. Functions recognise runs by their settings, never by their names. Verdicts follow
the rules of ``verdicts``: the whole interval must lie at or above the claimed size, or 1 % where the paper
names none.

Several figures of one claim are corrected for (Bonferroni), so that testing more of them makes no false claim
more likely to hold: their intervals hold jointly with 95 %. This also covers the claim that the method
improves on its controls, which holds if one of several runs of the method does: the best counts, and each is
judged as one of so many. Bonferroni rather than Holm, as its intervals can be printed beside the verdict that
follows from them. The table "did position help" has all of these runs, each judged alone.

Runs that are too short for a verdict are left out, except for what is counted. Where nothing else answers a
claim, their figures are shown without a verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..comparison import controlled, did_position_help
from ..measured import Study
from ..verdicts import Answer, Verdict, too_few_steps
from .feature_claims import (
    base_survives,
    decoder_is_stable,
    four_clusters,
    is_overcomplete,
    less_interpretable,
    position_tasks,
    probes_like_activations,
    retention_by_residual,
)
from .training_claims import (
    converges,
    dropout_helps,
    four_ranges_best,
    layer_norm_calms,
    masks_fail,
    overhead_is_15_percent,
    progressive_fails,
    sensitive_to_pacing,
    slower,
    small_steps_fail,
    warmup_helps,
)

PROBED = "has no probes yet; for each of its runs: posae evaluate RUN --probing offline"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        name: short, unique.
        says: quotation.
        measured: what is measured for it.
        study: the study that measures it; also the name of its file in examples/paper.
        judge: from all studies to a verdict; None where no run answers it.
        needs: what to say then of a study that was trained.
        is_counted: whether one short run answers it, as nothing is measured.
    """

    name: str
    says: str
    measured: str
    study: str
    judge: Callable[[Sequence[Study]], Verdict | None]
    needs: str = "has no runs or scores that answer this"
    is_counted: bool = False


def _position(studies: Sequence[Study]) -> Verdict | None:
    """The runs of the paper's architecture beside their controls; the best of them counts."""
    chosen = [
        (study, name)
        for study, name in controlled(studies)
        if any(run.architecture == "hierarchical" for run in study.series(name).values())
    ]
    judged_runs = [did_position_help(study, name, len(chosen)) for study, name in chosen]
    if not judged_runs:
        return None
    best = min(judged_runs, key=lambda finding: list(Answer).index(finding.answer))
    others = f"; the best of {len(chosen)} runs, with intervals widened for that" if len(chosen) > 1 else ""
    return Verdict(best.answer, f"{best.name}: {best.reason}{others}")


CLAIMS = (
    Claim(
        "layer norm",
        "layer normalization (3.2x reduction in gradient variance)",
        "variance of the gradient's norm after the first tenth of the steps, without over with",
        "layer-norm",
        layer_norm_calms,
    ),
    Claim(
        "gated residual",
        "gated residual connections (15% improvement in feature retention)",
        "share of a token's 32 largest base features that the adapted code keeps, with over without",
        "residual",
        retention_by_residual,
    ),
    Claim(
        "four ranges",
        "four-range position division (optimal balance between granularity and stability)",
        "FVU of each other number of ranges over that of four, at equal L0",
        "ranges",
        four_ranges_best,
    ),
    Claim(
        "warm-up",
        "1,000 warmup steps followed by gradual feature introduction",
        "FVU without warm-up over that with a tenth of the steps, at equal L0",
        "warmup",
        warmup_helps,
    ),
    Claim(
        "pacing",
        "High sensitivity to curriculum pacing",
        "FVU of each other warm-up over that of a tenth of the steps, at equal L0; high from 10 % on",
        "warmup",
        sensitive_to_pacing,
    ),
    Claim(
        "dropout",
        "dropout (0.1)",
        "FVU without dropout over that with, at equal L0",
        "dropout",
        dropout_helps,
    ),
    Claim(
        "overhead",
        "15% parameter overhead",
        "parameters over those of the base, at the width that the paper states",
        "overhead",
        overhead_is_15_percent,
        is_counted=True,
    ),
    Claim(
        "stability",
        "this approach maintains training stability",
        "whether every loss is finite, the loss falls, and the FVU is below 1",
        "position",
        converges,
    ),
    Claim(
        "longer convergence",
        "longer convergence time",
        "tokens, and CPU-seconds, until the FVU that both the method and its agnostic control reach",
        "position",
        slower,
    ),
    Claim(
        "masks",
        "Failed to converge with both hard binary and soft Gaussian masks",
        "whether every loss is finite, the loss falls, and the FVU is below 1",
        "masks",
        masks_fail,
    ),
    Claim(
        "small steps",
        "Unstable despite clipping (norm=1.0) and reduced learning rates (3x10⁻⁵)",
        "the same, for the masked runs with this learning rate",
        "masks",
        small_steps_fail,
    ),
    Claim(
        "progressive",
        "Progressive training: Failed with mask scheduling and specialized encoders",
        "the same, for runs whose mask has a schedule and for those with an encoder for each range",
        "masks",
        progressive_fails,
    ),
    Claim(
        "stable base",
        "first learns stable position-agnostic features",
        "share of decoder directions with a cosine above 0.9 to those after the base phase; stable: most",
        "position",
        decoder_is_stable,
    ),
    Claim(
        "base kept",
        "Position-specific adaptation layers that modify these base features",
        "FVU of the base code at the end, over that at the end of the base phase; kept: no larger",
        "position",
        base_survives,
    ),
    Claim(
        "four clusters",
        "Position-dependent features cluster into four distinct ranges",
        "k-means of firing rates by position: the best number of clusters, against shuffled ones",
        "position",
        four_clusters,
    ),
    Claim(
        "overcomplete",
        "k > d ensures overcomplete representation",
        "features, and width of the model, at the paper's setting k = d",
        "position",
        is_overcomplete,
        is_counted=True,
    ),
    Claim(
        "probing",
        "achieving 93.9% accuracy on sparse probing tasks",
        "accuracy of probes on all features, and on raw activations, which the paper's figures are of",
        "probing",
        probes_like_activations,
        PROBED,
    ),
    Claim(
        "position tasks",
        "improved performance on position-sensitive tasks",
        "accuracy of five-feature probes for bracket depth, indentation, place in the line and first use",
        "probing",
        position_tasks,
        PROBED,
    ),
    Claim(
        "interpretability",
        "Reduced feature interpretability compared to baseline",
        "accuracy of one-feature and five-feature probes, beside those on the agnostic control",
        "probing",
        less_interpretable,
        PROBED,
    ),
    Claim(
        "position",
        "Quantitative evaluation showing improved performance",
        "FVU beside the controls, at equal L0 and size",
        "position",
        _position,
    ),
)


@dataclass(frozen=True)
class Judged:
    """A claim and its verdict.

    Attributes:
        claim: the claim.
        verdict: what runs say of it.
        is_asked: whether its study has runs, or other studies answer it.
    """

    claim: Claim
    verdict: Verdict
    is_asked: bool = True


def judged(studies: Sequence[Study]) -> list[Judged]:
    """Every claim with its verdict; where no run answers it, the reason says what to train."""
    asked = {study.study for study in studies if study.runs}
    verdicts = {claim.name: _verdict(claim, studies) or _untrained(claim, studies) for claim in CLAIMS}
    return [
        Judged(claim, verdict, claim.study in asked or verdict.answer is not Answer.NOT_ENOUGH_DATA)
        for claim in CLAIMS
        for verdict in (verdicts[claim.name],)
    ]


def _verdict(claim: Claim, studies: Sequence[Study]) -> Verdict | None:
    """From runs that are long enough; else the figures of the others, and that these give no verdict."""
    if claim.is_counted:
        return claim.judge(studies)
    long_enough = [
        replace(study, runs=[r for r in study.runs if not r.run.has_too_few_steps]) for study in studies
    ]
    short = [r.run.n_steps for study in studies for r in study.runs if r.run.has_too_few_steps]
    verdict = claim.judge(long_enough)
    if verdict or not short or not (without := claim.judge(studies)):
        return verdict
    reason = without.reason
    if "not enough steps" not in reason:
        reason = f"{too_few_steps(max(short))}: {reason}"
    return Verdict(Answer.NOT_ENOUGH_DATA, reason)


def _untrained(claim: Claim, studies: Sequence[Study]) -> Verdict:
    command = f"posae train STORE RUNS --sweep examples/paper/{claim.study}.toml"
    runs = [run for study in studies if study.study == claim.study for run in study.runs]
    if any(run.run.missing for run in runs):
        reason = f"runs of study {claim.study} have no scores yet; resume: {command}"
    elif runs:
        reason = f"study {claim.study} {claim.needs}"
    else:
        reason = f"no run of study {claim.study}; train it: {command}"
    return Verdict(Answer.NOT_ENOUGH_DATA, reason)
