"""``evaluation.json``: every score, declared once. ``docs/evaluation.md`` defines them.

Numbers that the rows cannot tell (of a range without rows, or where nothing varies) are null. Keys that
an older version did not write are null too; ``posae evaluate`` writes all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import RunError

Number = float | None
"""Null where it cannot be determined."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class NormOutliers(_Part):
    """Tokens of a far larger norm than others, such as attention sinks."""

    threshold: float
    """A norm above this is an outlier: 10 times the median norm of the layer's tokens."""
    n_rows: int
    """Scored tokens above it."""


class DensityHistogram(_Part):
    """How often features fire."""

    edges: list[float]
    """Edges of the bins: log10 of the share of tokens that a feature fires on; always the same."""
    counts: list[int]
    """Features in each bin."""
    never: int
    """Features that never fired."""


class Drift(_Part):
    """How the decoder moved since the warm-up."""

    cosine_mean: float
    """Mean cosine of a feature's direction with what it was at the end of the warm-up."""
    kept_share: float
    """Share of features whose cosine is above .9."""


class PositionFeatures(_Part):
    """Features that stand for a position."""

    features: int
    """Features whose activation exact position explains with an adjusted R2 above .1."""
    slots: float
    """How many of a token's active features these are, on average."""


class SpecificityCurve(_Part):
    """Interpretability against specialisation: features in ten groups of equal size, by specialisation."""

    specialisation: list[float]
    """Mean bits that a firing tells of the range, less what chance would; by group."""
    interpretability: list[float]
    """Mean purity of the tokens of the largest activations; by group."""
    features: list[int]
    """Features of each group."""
    rank_correlation: Number
    """Spearman's rank correlation of the two over single features."""


class SpecificityHistogram(_Part):
    """Mutual information of firing and range, feature by feature."""

    edges: list[float]
    """Edges of the bins, in bits; always the same."""
    counts: list[int]
    """Features in each bin, of those that fired."""


class Specificity(_Part):
    """Mutual information of firing and position range."""

    ranges: list[str]
    """The ranges: the run's, or four equal ones where the run has but one."""
    mean: Number
    """Mean over features that fired, in bits."""
    null_mean: Number
    """The same with positions permuted among tokens."""
    above_null_share: Number
    """Share of these features above 99 of 100 permutations; .01 by chance if tokens were independent."""
    above_null_share_turned: Number
    """The same share with each context turned by a random number of positions: what bursts alone give."""
    histogram: SpecificityHistogram
    """How many features have how much."""
    curve: SpecificityCurve
    """What specialisation costs in interpretability."""


class ClusterScores(_Part):
    """Groups of features by where in the context they fire."""

    best_n: int
    """How many groups there are; 1 where no grouping exceeds chance and a single cloud."""
    score: float
    """Best silhouette over 2 to 8 groups."""
    null_score: float
    """The greatest silhouette of as many groups where there are none: profiles shuffled, or one cloud."""
    scores: list[float]
    """Silhouette of 2, 3, … 8 groups."""
    null_scores: list[float]
    """The greatest of the nulls for 2, 3, … 8 groups."""
    sizes: list[int]
    """Features of each group."""
    profiles: list[list[float]]
    """Mean profile of each group: firing rate by part of the context, relative to its mean."""
    spread: Number
    """Variance of profiles over that of shuffled ones; 1 where position means nothing."""
    n_features: int
    """Features that fired often enough to have a profile."""


class CeLoss(_Part):
    """What the language model loses with reconstructions in the activations' place; CE and KL in nats."""

    model: str
    """The language model."""
    contexts: int
    """Held-out contexts that it ran on."""
    n_rows: int
    """Predictions that are counted."""
    clean: Number
    """CE of the model as it is."""
    spliced: Number
    """CE with reconstructions."""
    zero: Number
    """CE with zeros."""
    mean: Number
    """CE with the mean activation."""
    recovered: Number
    """(zero - spliced) / (zero - clean)."""
    recovered_of_mean: Number
    """(mean - spliced) / (mean - clean)."""
    kl: Number
    """KL of the model's predictions as it is to those with reconstructions."""
    kl_zero: Number
    """The same to those with zeros."""
    clean_by_range: list[Number]
    """By range of the token that predicts, as are the next."""
    spliced_by_range: list[Number]
    """CE with reconstructions."""
    recovered_by_range: list[Number]
    """CE loss recovered."""
    kl_by_range: list[Number]
    """KL with reconstructions."""


class Evaluation(_Part):
    """The keys of ``evaluation.json``."""

    architecture: str
    """Name of the architecture."""
    layer: int
    """Layer that it was trained and scored on."""
    dictionary_size: int
    """Features."""
    n_parameters: int
    """Numbers learned, or taken from the store's means."""
    n_base_parameters: int
    """How many of them an autoencoder that ignores positions would have too."""
    ranges: list[str]
    """Position ranges, as `32:64`; those of every key ending in `_by_range`."""
    l0: float
    """Numbers of a code that are not 0, mean over tokens."""
    l0_above: float
    """Numbers of a code larger than .001 in size, mean over tokens."""
    l0_by_range: list[Number]
    """`l0` over the tokens of each range."""
    l0_by_position: list[Number] | None = None
    """`l0` over the tokens at each position."""
    fvu: Number
    """Fraction of variance unexplained, special tokens left out as in training."""
    fvu_by_range: list[Number]
    """Both sums over the tokens of one range, around the same mean over all tokens."""
    fvu_by_position: list[Number] | None = None
    """The same of each position."""
    fvu_base: Number
    """`fvu` of what the base code alone decodes to; null without a base code."""
    fvu_with_special: Number = None
    """`fvu` over all tokens, BOS and other special ones too, around their mean."""
    fvu_without_outliers: Number = None
    """`fvu` over the tokens that are neither special nor norm outliers, around their mean."""
    norm_outliers: NormOutliers | None = None
    """What counts as one, and how many there are."""
    dead_fraction: float
    """Share of features that are 0 on every token."""
    density_histogram: DensityHistogram | None = None
    """How often features fire."""
    retention: Number = None
    """Share of a token's largest base features that stay among its largest; null without a base code."""
    drift: Drift | None = None
    """How the decoder moved since the warm-up; null where the run kept no decoder of that time."""
    position_features: PositionFeatures | None = None
    """Features that stand for a position."""
    specificity: Specificity | None = None
    """Mutual information of firing and position range."""
    clusters: ClusterScores | None = None
    """Groups of features by where they fire; null where too few features fired often enough."""
    training_seconds: Number = None
    """Wall-clock seconds of its training steps; null where the run kept none."""
    training_cpu_seconds: Number = None
    """CPU seconds of the process in these steps; null where the run kept none."""
    ce_loss: CeLoss | None = None
    """What the language model loses; null until `posae evaluate RUN --ce-loss`."""
    probing: dict[str, Any] | None = None
    """Sparse probing; null until it is asked for."""
    n_rows: int
    """Tokens scored, special ones left out as in training."""
    contexts: tuple[int, int]
    """Contexts scored: the first, and one past the last."""
    store: dict[str, Any]
    """Where the store lay, its identity, the digests of what was read; and of what the run was trained from:
    whether it is this store (`trained_from`) or one of the same model (`same_model`), and how many of the
    contexts scored are in it (`seen_contexts`). Null where nobody can tell."""


def parse_evaluation(content: Mapping[str, Any], folder: Path) -> Evaluation:
    """The scores of the run in ``folder``, from what its ``evaluation.json`` says.

    Raises:
        RunError: a score is missing, or is none.
    """
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"{folder / 'evaluation.json'}: {place}: {first['msg']}; evaluate the run again: "
            f"posae evaluate {folder}"
        ) from None


def json_schema() -> str:
    """The JSON schema of ``evaluation.json``, as in ``docs/evaluation.schema.json``."""
    return json.dumps(Evaluation.model_json_schema(), indent=2) + "\n"
