"""The paper's claims, and what runs say of each: it holds, it does not hold, or it cannot be told.

A claim is the paper's words, what is measured for it, the study that measures it, and a function from runs to
a verdict. Functions know runs by their settings, never by their names. What a claim leaves open is filled by
the rules of ``verdicts``: an effect must be beyond seed noise, and at least as large as is claimed, or 1 %
where no size is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..comparison import Finding, findings
from ..measured import Study
from ..verdicts import Answer, Verdict
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

PROBED = "has no probes yet; for each run of it: posae evaluate RUN --probing offline"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        name: short, unique.
        says: the paper's words.
        measured: what is measured for it.
        study: the study that measures it; also the name of its file in examples/paper.
        judge: from all studies to a verdict; None where no run could tell.
        needs: what then is said of a study that was trained.
    """

    name: str
    says: str
    measured: str
    study: str
    judge: Callable[[Sequence[Study]], Verdict | None]
    needs: str = "has no runs, or scores, that tell it"


def _position(studies: Sequence[Study]) -> Verdict | None:
    """The paper's own architecture beside its controls."""
    found = [
        finding
        for finding in findings(studies)
        if any(
            run.architecture == "hierarchical"
            for study in studies
            if study.study == finding.study
            for run in study.series(finding.name).values()
        )
    ]
    return _first_told(found)


def _first_told(found: Iterable[Finding]) -> Verdict | None:
    """Of several runs of the method the one that position helped, if there is one."""
    ordered = sorted(found, key=lambda finding: list(Answer).index(finding.answer))
    if not ordered:
        return None
    best = ordered[0]
    return Verdict(best.answer, f"{best.name}: {best.words}")


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
        "FVU of each other number of ranges over that of four",
        "ranges",
        four_ranges_best,
    ),
    Claim(
        "warm-up",
        "1,000 warmup steps followed by gradual feature introduction",
        "FVU without warm-up over that with a tenth of the steps",
        "warmup",
        warmup_helps,
    ),
    Claim(
        "pacing",
        "High sensitivity to curriculum pacing",
        "FVU of each other warm-up over that of a tenth of the steps; high from 10 % on",
        "warmup",
        sensitive_to_pacing,
    ),
    Claim(
        "dropout",
        "dropout (0.1)",
        "FVU without dropout over that with",
        "dropout",
        dropout_helps,
    ),
    Claim(
        "overhead",
        "15% parameter overhead",
        "parameters over those of the base, at the width that the paper states",
        "overhead",
        overhead_is_15_percent,
    ),
    Claim(
        "stability",
        "this approach maintains training stability",
        "whether every loss is finite, and the loss falls",
        "position",
        converges,
    ),
    Claim(
        "longer convergence",
        "longer convergence time",
        "tokens, and CPU-seconds, until the FVU is what both the method and its agnostic control end with",
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
        "the same of the masked runs with this learning rate",
        "masks",
        small_steps_fail,
    ),
    Claim(
        "progressive",
        "Progressive training: Failed with mask scheduling and specialized encoders",
        "the same of the runs whose mask has a schedule, and of those with an encoder for each range",
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
        "k-means of firing rates by position: the best number of clusters, beside shuffled ones",
        "position",
        four_clusters,
    ),
    Claim(
        "overcomplete",
        "k > d ensures overcomplete representation",
        "features, and width of the model, at the paper's setting k = d",
        "position",
        is_overcomplete,
    ),
    Claim(
        "probing",
        "achieving 93.9% accuracy on sparse probing tasks",
        "accuracy of probes on all features, beside raw activations, whose 93.9, 68.4 and 77.5 are",
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
        claim: which.
        verdict: what runs say of it.
        is_asked: whether its study has runs, or others answer it all the same.
    """

    claim: Claim
    verdict: Verdict
    is_asked: bool = True


def judged(studies: Sequence[Study]) -> list[Judged]:
    """Every claim with its verdict; one that no run could tell says which training would."""
    asked = {study.study for study in studies if study.runs}
    found: list[Judged] = []
    for claim in CLAIMS:
        verdict = claim.judge(studies) or _untrained(claim, studies)
        is_asked = claim.study in asked or verdict.answer is not Answer.CANNOT_BE_TOLD
        found.append(Judged(claim, verdict, is_asked))
    return found


def _untrained(claim: Claim, studies: Sequence[Study]) -> Verdict:
    sweep = f"examples/paper/{claim.study}.toml"
    runs = [run for study in studies if study.study == claim.study for run in study.runs]
    if any(run.run.missing for run in runs):
        return Verdict(
            Answer.CANNOT_BE_TOLD,
            f"runs of study {claim.study} have no scores yet; go on: posae train STORE RUNS --sweep {sweep}",
        )
    if runs:
        return Verdict(Answer.CANNOT_BE_TOLD, f"study {claim.study} {claim.needs}")
    return Verdict(
        Answer.CANNOT_BE_TOLD,
        f"no run of study {claim.study}; train it: posae train STORE RUNS --sweep {sweep}",
    )
