"""Whether features fall into groups by where in their context they fire, and into how many.

A feature's profile is its firing rate in 16 parts of the context, as shares of their sum; of each share the
square root, so that chance spreads all of them alike (distances are then Hellinger's). k-means is run for
1 to 8 groups, and each is scored by the silhouette: 1 where groups are narrow and far apart, 0 where a
feature lies between two. The best number of groups counts only if its silhouette clearly exceeds two nulls:

    shuffled   each feature's firings fall on tokens at random: profiles that are all the same but for chance
    one cloud  a normal distribution of the profiles' mean and covariance: they differ, but not in groups

k-means cuts any cloud into halves with a silhouette well above 0, so the second is what tells groups from a
continuum; from one that is bent, as of features that each fire around a place of their own, it does not.
Where it does not exceed both there is one group.

Cost: k-means of at most 1,024 features, all nulls at once: about a second on a core.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .evaluation import ClusterScores
from .information import drawn_firings

N_PARTS = 16
MIN_FIRINGS = 10 * N_PARTS
"""Fewer than these leave a profile to chance."""
MAX_FEATURES = 1024
MAX_GROUPS = 8
N_NULLS = 9
"""Of each kind."""
MARGIN = 0.05
"""By how much a silhouette must exceed those of all nulls; a continuum of another shape may by less."""

_RESTARTS = 3
_ITERATIONS = 25


def clusters(firings: NDArray[np.int64], n_rows: NDArray[np.int64], seed: int = 0) -> ClusterScores | None:
    """Group features by where they fire; None if fewer than 32 fired often enough.

    Args:
        firings: how often each feature fired at each position; [positions, features].
        n_rows: rows of each position; [positions].
        seed: of the nulls, the first centres, and the choice of features where there are too many.
    """
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.flatnonzero(n_rows), min(N_PARTS, np.count_nonzero(n_rows)) or 1)
    rows = np.array([n_rows[part].sum() for part in parts])
    often = np.flatnonzero(firings.sum(axis=0) >= MIN_FIRINGS)
    if len(often) < 4 * MAX_GROUPS or len(parts) < 2:
        return None
    kept = np.sort(rng.choice(often, min(len(often), MAX_FEATURES), replace=False))
    counts = np.stack([firings[part][:, kept].sum(axis=0) for part in parts])
    profiles = _profiles(counts, rows)
    shuffled = _profiles(drawn_firings(counts.sum(axis=0), rows, N_NULLS, rng), rows)
    covariance = np.cov(profiles.T)
    cloud = rng.multivariate_normal(
        profiles.mean(axis=0), covariance, (N_NULLS, len(kept)), method="eigh", check_valid="ignore"
    )
    points = torch.as_tensor(np.concatenate([profiles[np.newaxis], shuffled, cloud]), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    null_scores: list[float] = []
    labels: dict[int, Tensor] = {1: torch.zeros(len(kept), dtype=torch.int64)}
    for n in range(2, MAX_GROUPS + 1):
        found, silhouettes = _grouped(points, n, generator)
        labels[n] = found[0]
        scores.append(float(silhouettes[0]))
        null_scores.append(float(silhouettes[1:].max()))
    place = int(np.argmax(scores))
    best = place + 2 if scores[place] > null_scores[place] + MARGIN else 1
    sizes, means = _described(counts / rows[:, np.newaxis], labels[best].numpy())
    by_chance = float(shuffled.var(axis=1).sum(axis=1).mean())
    return ClusterScores(
        best_n=best,
        score=scores[place],
        null_score=null_scores[place],
        scores=scores,
        null_scores=null_scores,
        sizes=sizes,
        profiles=means,
        spread=float(profiles.var(axis=0).sum()) / by_chance if by_chance > 0 else None,
        n_features=len(often),
    )


def _profiles(counts: NDArray[np.int64], n_rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Square roots of the shares of each part; [..., features, parts] from [..., parts, features]."""
    rates = counts / n_rows[:, np.newaxis]
    return np.sqrt(rates / rates.sum(axis=-2, keepdims=True)).swapaxes(-1, -2)


def _described(rates: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[list[int], list[list[float]]]:
    """Size and mean profile of each group, sorted by the middle of the profile."""
    relative = rates / rates.mean(axis=0)
    found = [(int((labels == g).sum()), relative[:, labels == g].mean(axis=1)) for g in np.unique(labels)]
    found.sort(key=lambda group: float(group[1] @ np.arange(len(rates))))
    return [size for size, _ in found], [profile.tolist() for _, profile in found]


def _grouped(points: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means of many sets at once, the best of some beginnings: labels [sets, points], silhouettes [sets].

    Args:
        points: [sets, points, dimensions].
        n: groups.
        generator: draws the first centres.
    """
    tried = points.repeat_interleave(_RESTARTS, dim=0)
    centres = _first_centres(tried, n, generator)
    before = torch.full(tried.shape[:2], -1)
    for _ in range(_ITERATIONS):
        labels = torch.cdist(tried, centres).argmin(dim=2)
        if torch.equal(labels, before):
            break
        before = labels
        member = torch.nn.functional.one_hot(labels, n).to(tried.dtype)
        sizes = member.sum(dim=1)[..., None]
        means = member.transpose(1, 2) @ tried / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    distances = torch.cdist(tried, centres)
    nearest, labels = distances.sort(dim=2)
    inertia = nearest[..., 0].square().sum(dim=1).reshape(-1, _RESTARTS)
    best = inertia.argmin(dim=1) + torch.arange(len(points)) * _RESTARTS
    own, other = nearest[best, :, 0], nearest[best, :, 1]
    return labels[best, :, 0], ((other - own) / other.clamp(min=1e-12)).mean(dim=1)


def _first_centres(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """k-means++: points drawn by their squared distance from those before; [sets, n, dimensions]."""
    n_sets, n_points, _ = points.shape
    sets = torch.arange(n_sets)
    centres = points[sets, torch.randint(n_points, (n_sets,), generator=generator)][:, None]
    while centres.shape[1] < n:
        squared = torch.cdist(points, centres).amin(dim=2).square() + 1e-12
        chosen = torch.multinomial(squared, 1, generator=generator)[:, 0]
        centres = torch.cat([centres, points[sets, chosen][:, None]], dim=1)
    return centres
