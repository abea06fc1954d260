"""SAEBench's sparse probing: rows drawn one class against the rest, features chosen, probes trained.

As in ``sae_bench`` 0.6.0, ``evals/sparse_probing``: half the rows of a probe are of its class, the
others spread evenly over the other classes; the k features (or raw activations) whose means differ most
between the two halves of the training rows are given to scikit-learn's logistic regression; one probe
gets all of them. With the same rows, labels and seed the accuracies are the same. Two differences: the
rows of a class are drawn once and not anew for each k, and numbers are float32 where SAEBench has the
language model's type.

SAEBench's probe on all features is the best epoch *by accuracy on the test rows*, which is optimistic.
``Choice.TEST`` is that, for comparison with published figures; ``Choice.TRAINING`` keeps a fifth of the
training rows to choose the epoch with.

Cost: memory for the rows of one class at a time, at most 5,000 x features float32, and half as much again
while features are ranked; on one core half a second a class for 1,000 features, mostly the full probe.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Rows = NDArray[np.int64]
"""Indices of rows; [rows]."""

RowsByClass = Mapping[str, Rows]
"""The rows of each class of a task."""

Fetch = Callable[[Rows], NDArray[np.float32]]
"""The numbers of rows; [rows] to [rows, features]."""

SEED = 42
"""SAEBench's."""

K = (1, 2, 5)
"""How many features a sparse probe sees."""

_BATCH_ROWS, _EPOCHS, _PATIENCE, _LEARNING_RATE = 250, 100, 10, 1e-2
_MAX_ITERATIONS = 1000


class Sizes(NamedTuple):
    """Rows of one probe, half of which are of its class."""

    train: int = 4000
    test: int = 1000


SIZES = Sizes()
"""SAEBench's."""

LEAST = Sizes(200, 50)
"""Below this a class is left out: its accuracies would be noise."""


class Choice(Enum):
    """What the epoch of the probe on all features is chosen by."""

    TEST = "best epoch on the test rows, as in SAEBench: optimistic"
    TRAINING = "best epoch on a fifth of the training rows"


class Drawn(NamedTuple):
    """Rows of one class and as many others, shuffled."""

    rows: Rows
    labels: NDArray[np.int64]
    """1 for the class, 0 for the others; [rows]."""


class ClassScores(NamedTuple):
    """Accuracies of the probes of one class."""

    n_train: int
    n_test: int
    accuracies: dict[str, dict[str, float]]
    """By name of what was probed, then by k, the last ``all``."""


def draw(rows: RowsByClass, positive: str, generator: torch.Generator) -> Drawn:
    """All rows of a class, and as many of the others, evenly over their classes.

    Where the others have too few, fewer of the class are taken: the halves are always equal.

    Args:
        rows: by class, in the order in which they are drawn from; each already in random order.
        positive: the class.
        generator: on the CPU; draws as SAEBench does.
    """
    n_positive = len(rows[positive])
    others = [theirs for name, theirs in rows.items() if name != positive]
    share = math.ceil(n_positive / len(others))
    negative = np.concatenate([theirs[_permutation(len(theirs), generator)[:share]] for theirs in others])
    negative = negative[_permutation(len(negative), generator)[:n_positive]]
    half = len(negative)
    both = np.concatenate([rows[positive][:half], negative])
    labels = np.concatenate([np.ones(half, np.int64), np.zeros(half, np.int64)])
    order = _permutation(2 * half, generator)
    return Drawn(both[order], labels[order])


def _permutation(n: int, generator: torch.Generator) -> NDArray[np.int64]:
    return torch.randperm(n, generator=generator).numpy()


def ranked_features(x: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Features by the difference of their means in the two halves, the largest first; [features].

    Args:
        x: [rows, features].
        labels: 0 or 1; [rows].
    """
    rows, is_positive = torch.as_tensor(x), torch.as_tensor(labels) == 1
    difference = (rows[is_positive].mean(0) - rows[~is_positive].mean(0)).abs()
    return difference.argsort(descending=True).numpy()


class _Classifier(Protocol):
    """What is used of scikit-learn's classifiers, which carry no types."""

    def fit(self, x: NDArray[np.float32], labels: NDArray[np.int64]) -> "_Classifier": ...
    def predict(self, x: NDArray[np.float32]) -> NDArray[np.int64]: ...


def sparse_accuracy(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
) -> float:
    """Accuracy on the test rows of a logistic regression on a few features; [rows, k] each."""
    # Imported where they are needed: a second, and 40 MB, that nothing else needs.
    from sklearn.exceptions import ConvergenceWarning  # pyright: ignore[reportMissingTypeStubs]
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingTypeStubs]

    probe = cast(_Classifier, LogisticRegression(C=1.0, max_iter=_MAX_ITERATIONS))
    with warnings.catch_warnings():
        # As in SAEBench, what 1,000 iterations reach is the probe.
        warnings.simplefilter("ignore", cast("type[Warning]", ConvergenceWarning))
        probe.fit(train, train_labels)
    return float((probe.predict(test) == test_labels).mean())


@torch.enable_grad()
def full_accuracy(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    generator: torch.Generator,
    choice: Choice,
) -> float:
    """Accuracy on the test rows of a linear probe on all features, trained by AdamW.

    Args:
        train: [rows, features], in random order.
        train_labels: 0 or 1; [rows].
        test: [rows, features].
        test_labels: 0 or 1; [rows].
        generator: on the CPU; draws the first weights and the order of rows.
        choice: what the epoch is chosen by.
    """
    x, y, test_x, test_y = (torch.as_tensor(a) for a in (train, train_labels, test, test_labels))
    choose_x, choose_y = test_x, test_y
    if choice is Choice.TRAINING:
        kept = len(x) - len(x) // 5
        x, y, choose_x, choose_y = x[:kept], y[:kept], x[kept:], y[kept:]
    targets = y.to(torch.float32)
    probe = nn.Linear(x.shape[1], 1, device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(probe.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(x.shape[1])
    nn.init.uniform_(probe.bias, -bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=_LEARNING_RATE)
    best = found = 0.0
    waited = 0
    for _ in range(_EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), _BATCH_ROWS):
            batch = order[start : start + _BATCH_ROWS]
            loss = F.binary_cross_entropy_with_logits(probe(x[batch]).squeeze(-1), targets[batch])
            optimizer.zero_grad()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        accuracy = _accuracy(probe, choose_x, choose_y)
        waited += 1
        if accuracy > best:
            best, waited = accuracy, 0
            found = best if choice is Choice.TEST else _accuracy(probe, test_x, test_y)
        if waited == _PATIENCE:
            break
    return found


@torch.no_grad()
def _accuracy(probe: nn.Linear, x: Tensor, labels: Tensor) -> float:
    return float(((probe(x).squeeze(-1) > 0) == (labels == 1)).double().mean())


def probe_task(
    train: RowsByClass,
    test: RowsByClass,
    probed: Mapping[str, Fetch],
    choice: Choice,
    seed: int = SEED,
) -> Iterator[tuple[str, ClassScores]]:
    """Probe each class against the rest, in each of several forms of the same rows.

    Args:
        train: training rows by class.
        test: test rows by class.
        probed: what is probed, by name: activations, codes.
        choice: see ``full_accuracy``.
        seed: of the rows drawn and of the full probes.
    """
    generator = torch.Generator().manual_seed(seed)
    for positive in train:
        drawn, tested = draw(train, positive, generator), draw(test, positive, generator)
        accuracies = {
            name: _accuracies(fetch, drawn, tested, generator.clone_state(), choice)
            for name, fetch in probed.items()
        }
        yield positive, ClassScores(len(drawn.rows), len(tested.rows), accuracies)


def _accuracies(
    fetch: Fetch, drawn: Drawn, tested: Drawn, generator: torch.Generator, choice: Choice
) -> dict[str, float]:
    x, test_x = fetch(drawn.rows), fetch(tested.rows)
    ranked = ranked_features(x, drawn.labels)
    found: dict[str, float] = {}
    for k in K:
        columns = np.sort(ranked[:k])
        found[str(k)] = sparse_accuracy(x[:, columns], drawn.labels, test_x[:, columns], tested.labels)
    found["all"] = full_accuracy(x, drawn.labels, test_x, tested.labels, generator, choice)
    return found
