"""How much each feature keeps to some positions, and what that costs in interpretability.

*Specificity* is the mutual information of firing and position range, in bits, beside what it would be if
the same firings had fallen on tokens at random. *Specialisation* is the same per firing, so that rare and
frequent features compare. *Purity* stands for interpretability, without a judge: how much less the tokens of
a feature's largest activations vary than random tokens do. The curve sets purity against specialisation.

Cost: of the null ``N_DRAWS`` numbers to each feature and range, some features at a time; of purity one
sort of ``N_TOP`` tokens to a feature. A second for a thousand features and four ranges.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .evaluation import Specificity, SpecificityCurve, SpecificityHistogram
from .features import N_TOP, FeatureSums
from .information import (
    Counts,
    Floats,
    drawn_firings,
    entropies,
    mutual_information,
    rank_correlation,
    specialisation,
)

N_DRAWS = 199
"""With 199 draws a feature without specificity exceeds their second largest with probability 2/200."""
EDGES = [0.0, *(10 ** (step / 4) for step in range(-24, 1))]
"""Of the histogram, in bits; firing or not is at most one bit."""
N_GROUPS = 10

_NUMBERS_AT_ONCE = 2**20
"""Numbers of the null that are drawn together."""


def specificity(sums: FeatureSums, ranges: Sequence[tuple[int, int]], token_counts: Counts) -> Specificity:
    """The scores of all features that fired.

    Args:
        sums: of all rows.
        ranges: position ranges, from position 0 to the last.
        token_counts: how often each token id occurs among the rows; [vocabulary].
    """
    starts = [start for start, _ in ranges]
    alive = sums.n_firings > 0

    def of(firings: Counts, n_rows: Counts) -> FeatureSpecificity:
        by_range = np.add.reduceat(firings[:, alive], starts, axis=0)
        return feature_specificity(by_range, np.add.reduceat(n_rows, starts))

    def mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
        return float(values.mean()) if len(values) else None

    real, turned = of(sums.firings, sums.n_rows), of(sums.turned_firings, sums.turned_rows)
    often = sums.n_firings[alive] >= N_TOP
    counts = np.histogram(np.clip(real.information, 0, 1), EDGES)[0]
    return Specificity(
        ranges=[f"{start}:{stop}" for start, stop in ranges],
        mean=mean(real.information),
        null_mean=mean(real.null_mean),
        above_null_share=mean(real.is_above),
        above_null_share_turned=mean(turned.is_above),
        histogram=SpecificityHistogram(edges=EDGES, counts=counts.tolist()),
        curve=curve(real.specialisation[often], purity(sums.top_tokens[alive][often], token_counts)),
    )


class FeatureSpecificity(NamedTuple):
    """Of each feature; [features]."""

    information: Floats
    """Mutual information of firing and range, in bits."""
    null_mean: Floats
    """The same on average where positions are permuted."""
    is_above: NDArray[np.bool_]
    """Whether it exceeds 99 of 100 such permutations."""
    specialisation: Floats
    """Bits per firing, less the mean of the same with positions permuted."""


def feature_specificity(firings: Counts, n_rows: Counts, seed: int = 0) -> FeatureSpecificity:
    """Of each feature, against its own null.

    Args:
        firings: [ranges, features].
        n_rows: [ranges].
        seed: of the null's draws.
    """
    rng = np.random.default_rng(seed)
    information = mutual_information(firings, n_rows)
    null_mean, threshold, null_specialisation = (np.zeros(firings.shape[1]) for _ in range(3))
    n_firings = firings.sum(axis=0)
    size = max(1, _NUMBERS_AT_ONCE // (N_DRAWS * len(n_rows)))
    for start in range(0, firings.shape[1], size):
        part = slice(start, start + size)
        drawn = drawn_firings(n_firings[part], n_rows, N_DRAWS, rng)
        null = mutual_information(drawn, n_rows)
        null_mean[part] = null.mean(axis=0)
        threshold[part] = np.partition(null, -2, axis=0)[-2]
        null_specialisation[part] = specialisation(drawn, n_rows).mean(axis=0)
    # Sums of the same counts in another order may differ in their last bits.
    is_above = information > threshold + 1e-12
    return FeatureSpecificity(
        information, null_mean, is_above, specialisation(firings, n_rows) - null_specialisation
    )


def purity(top_tokens: Counts, token_counts: Counts, seed: int = 0) -> Floats:
    """How far each feature's largest activations are on one token; [features].

    1 - H / H_random: H is the entropy of the tokens of its largest activations, H_random that of as many
    tokens drawn from all rows. 1: always the same token; 0: as mixed as the text; NaN where the text is
    one token.

    Args:
        top_tokens: ids; [features, top].
        token_counts: how often each id occurs among all rows; [vocabulary].
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    share = token_counts / token_counts.sum()
    drawn = rng.choice(len(share), (N_DRAWS, top_tokens.shape[1]), p=share)
    expected = float(entropies(drawn).mean())
    return 1 - entropies(top_tokens) / (expected if expected > 0 else np.nan)


def curve(specialised: Floats, interpretable: Floats) -> SpecificityCurve:
    """Features sorted by specialisation, in groups of equal size; [features] each."""
    there = np.isfinite(specialised) & np.isfinite(interpretable)
    x, y = specialised[there], interpretable[there]
    groups = np.array_split(np.argsort(x, kind="stable"), min(N_GROUPS, len(x))) if len(x) else []
    return SpecificityCurve(
        specialisation=[float(x[group].mean()) for group in groups],
        interpretability=[float(y[group].mean()) for group in groups],
        features=[len(group) for group in groups],
        rank_correlation=rank_correlation(x, y),
    )
