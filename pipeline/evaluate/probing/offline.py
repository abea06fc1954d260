"""Probing from a store alone: tasks that need no download and no language model.

Rows come from the held-out part where it has enough tokens, else from all contexts; a document is in
the training or in the test rows of a task, never in both. ``data`` of the result says which contexts, how
they were split, and how many runs of tokens were found in their documents.

Cost: one pass over the wanted contexts for each task, at most 262,144 tokens of them; memory as in
``protocol``, and the activations of a task's rows: at most 2,500 a class.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ....store.reader import ActivationStore
from .passages import Alignment, Passage, passages_of_contexts, passages_of_documents, runs
from .protocol import LEAST, SEED, SIZES, Choice, Fetch, Rows, Sizes, probe_task
from .representations import Encoder, Means, of_tokens
from .results import ClassResult, ProbingResult, TaskResult, class_result, probing_result, task_result
from .tasks import DOCUMENT_TASKS, TOKEN_TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH_TOKENS = 262_144
"""Held-out tokens that do without contexts of the training part; no more are labelled."""

MOST_CLASSES = 8
"""Classes of one task, the largest."""

Told = Callable[[int, int, str], None]
"""Told how many classes of how many are probed, and which was the last; first 0."""

_TEST_SHARE = 5
_LEAST_TOKENS = 32
_READ_CONTEXTS = 64


class Labelled(NamedTuple):
    """Rows with labels; [rows] each."""

    labels: list[str]
    items: NDArray[np.int64]
    """What a row is: a token, as context · context length + position; or a passage, by its index."""
    groups: NDArray[np.int64]
    """What is never split between training and test rows: documents, or contexts."""


class Task(NamedTuple):
    """A task about to be probed; rows index ``items``."""

    level: Literal["token", "context"]
    items: NDArray[np.int64]
    train: dict[str, Rows]
    test: dict[str, Rows]
    left_out: dict[str, str]


class _Source(NamedTuple):
    """Where activations come from."""

    store: ActivationStore
    layer: int
    autoencoder: Encoder
    device: torch.device
    passages: list[Passage]
    wanted: list[NDArray[np.bool_]]
    """Which tokens of each passage may be probed; [tokens]."""


def probe_store(
    store: ActivationStore,
    layer: int,
    autoencoder: Encoder,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[tuple[str, str]] | None,
    *,
    held_out: tuple[int, int],
    leave_out: Sequence[int],
    device: torch.device,
    told: Told = lambda done, total, last: None,
    sizes: Sizes = SIZES,
    seed: int = SEED,
) -> ProbingResult:
    """Probe activations of a store, and their codes, for what tokens and documents are.

    Args:
        store: an opened store.
        layer: one of its layers.
        autoencoder: in ``eval()``, on ``device``.
        tokenizer: the one that made the store's tokens.
        documents: name and text of each document of the store's corpus, in order; None if they
            cannot be had again.
        held_out: contexts [start, stop) that the autoencoder was not trained on.
        leave_out: token ids whose rows are never probed.
        device: where to encode.
        told: told before the first class, and after each.
        sizes: rows of a probe; fewer where there are fewer.
        seed: of what is drawn.

    Raises:
        StoreDamagedError: a chunk is not what was written.
    """
    random = np.random.default_rng(seed)
    contexts, part = _choose_contexts(store, layer, held_out, random)
    passages, alignment = _passages(store, contexts, tokenizer, documents)
    tokens = dict(zip(contexts.tolist(), store.tokens(contexts), strict=True))
    wanted = [~np.isin(tokens[passage.context][passage.positions], leave_out) for passage in passages]
    source = _Source(store, layer, autoencoder, device, passages, wanted)
    n_documents = len({passage.document for passage in passages})
    tasks: dict[str, Task] = {}
    for name, label in TOKEN_TASKS.items():
        if passages:
            labelled = _label_tokens(source, [label(passage) for passage in passages], n_documents > 1)
            tasks[name] = split("token", labelled, sizes, random)
    for name, label in DOCUMENT_TASKS.items():
        if passages and documents is not None:
            labelled = _label_contexts(source, [label(document) for document, _ in documents])
            tasks[name] = split("context", labelled, sizes, random)
    n_classes, done = sum(len(task.train) for task in tasks.values()), 0
    told(0, n_classes, "")
    found: dict[str, TaskResult] = {}
    for name, task in tasks.items():
        probed: Mapping[str, Fetch] = _probed(source, task) if task.train else {}
        classes: dict[str, ClassResult] = {}
        for positive, scores in probe_task(task.train, task.test, probed, Choice.TRAINING, seed):
            classes[positive] = class_result(scores)
            done += 1
            told(done, n_classes, f"{name}: {positive}")
        found[name] = task_result(task.level, classes, task.left_out)
    data: dict[str, Any] = {
        "contexts": part,
        "n_contexts": len(contexts),
        "split": "documents" if n_documents > 1 else "contexts",
        "n_documents": n_documents,
        "text": "decoded contexts" if documents is None else "documents",
        "alignment": alignment._asdict() if alignment else None,
    }
    return probing_result("offline", found, sizes, Choice.TRAINING, seed, data)


def _choose_contexts(
    store: ActivationStore, layer: int, held_out: tuple[int, int], random: np.random.Generator
) -> tuple[NDArray[np.int64], Literal["held-out", "all"]]:
    """Contexts whose tokens are labelled, in order, and the part that they are from."""
    enough = -(-ENOUGH_TOKENS // store.context_length)
    start, stop = held_out
    part: Literal["held-out", "all"] = "held-out" if stop - start >= enough else "all"
    if part == "all":
        start, stop = 0, store.contexts_by_layer[layer]
    chosen = random.permutation(np.arange(start, stop))[:enough]
    return np.sort(chosen), part


def _passages(
    store: ActivationStore,
    contexts: NDArray[np.int64],
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[tuple[str, str]] | None,
) -> tuple[list[Passage], Alignment | None]:
    manifest, tokens = store.manifest, store.tokens(contexts)
    found = list(
        runs(contexts, tokens, store.documents(contexts), manifest.first_token, manifest.separator_token)
    )
    ids = dict(zip(contexts.tolist(), tokens, strict=True))
    if documents is None:
        return list(passages_of_contexts(found, ids, tokenizer)), None
    return passages_of_documents(found, ids, [text for _, text in documents], tokenizer)


def _label_tokens(source: _Source, labels: list[list[str | None]], by_document: bool) -> Labelled:
    """The tokens that have a label and may be probed."""
    length = source.store.context_length
    kept: list[str] = []
    items: list[int] = []
    groups: list[int] = []
    for passage, wanted, some in zip(source.passages, source.wanted, labels, strict=True):
        for position, is_wanted, label in zip(passage.positions.tolist(), wanted, some, strict=True):
            if is_wanted and label is not None:
                kept.append(label)
                items.append(passage.context * length + position)
                groups.append(passage.document if by_document else passage.context)
    return Labelled(kept, np.array(items, np.int64), np.array(groups, np.int64))


def _label_contexts(source: _Source, label_of_document: Sequence[str]) -> Labelled:
    """The longest passage of each context, if it is long enough, labelled by its document."""
    longest: dict[int, int] = {}
    n_tokens = [int(wanted.sum()) for wanted in source.wanted]
    for i, passage in enumerate(source.passages):
        best = longest.get(passage.context)
        if n_tokens[i] >= _LEAST_TOKENS and (best is None or n_tokens[i] > n_tokens[best]):
            longest[passage.context] = i
    items = list(longest.values())
    groups = [source.passages[i].document for i in items]
    labels = [label_of_document[document] for document in groups]
    return Labelled(labels, np.array(items, np.int64), np.array(groups, np.int64))


def split(
    level: Literal["token", "context"], rows: Labelled, sizes: Sizes, random: np.random.Generator
) -> Task:
    """Training and test rows of each class, in random order, and what is left out and why."""
    labels = np.array(rows.labels, np.str_)
    names = [name for name, _ in Counter(rows.labels).most_common()]
    left_out: dict[str, str] = {}
    train: dict[str, Rows] = {}
    test: dict[str, Rows] = {}
    # A document has one label: each label's documents are split on their own, so that both halves have some.
    together = _test_groups(rows.groups, random) if level == "token" else None
    for name in names:
        mine = np.flatnonzero(labels == name)
        groups = rows.groups[mine]
        is_test = np.isin(groups, _test_groups(groups, random) if together is None else together)
        some_train = random.permutation(mine[~is_test])[: sizes.train // 2]
        some_test = random.permutation(mine[is_test])[: sizes.test // 2]
        if len(train) == MOST_CLASSES:
            left_out[name] = f"not among the {MOST_CLASSES} largest"
        elif 2 * len(some_train) < LEAST.train or 2 * len(some_test) < LEAST.test:
            left_out[name] = f"{len(some_train)} training and {len(some_test)} test rows are too few"
        else:
            train[name], test[name] = some_train, some_test
    if len(train) == 1:
        left_out |= dict.fromkeys(train, "there is no other class to tell it from")
        train, test = {}, {}
    return Task(level, rows.items, train, test, left_out)


def _test_groups(groups: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Groups that hold about a fifth of the rows: in random order, those that still fit into it."""
    names, counts = np.unique(groups, return_counts=True)
    order = random.permutation(len(names))
    room = len(groups) / _TEST_SHARE
    chosen: list[int] = []
    for i in order.tolist():
        if counts[i] <= room * 1.1:
            chosen.append(i)
            room -= counts[i]
    if not chosen and len(names) > 1:
        chosen = [int(counts.argmin())]
    return names[chosen]


def _probed(source: _Source, task: Task) -> Mapping[str, Fetch]:
    """What is probed in a task, of the rows that it needs."""
    needed = np.unique(np.concatenate([*task.train.values(), *task.test.values()]))
    for part in (task.train, task.test):
        for name, rows in part.items():
            part[name] = np.searchsorted(needed, rows)
    items = task.items[needed]
    return _of_tokens(source, items) if task.level == "token" else _of_passages(source, items)


def _of_tokens(source: _Source, items: NDArray[np.int64]) -> Mapping[str, Fetch]:
    contexts, positions = np.divmod(items, source.store.context_length)
    bits = np.empty((len(items), source.store.d_model), np.uint16)
    distinct = np.unique(contexts)
    for start in range(0, len(distinct), _READ_CONTEXTS):
        some = distinct[start : start + _READ_CONTEXTS]
        read = source.store.read(source.layer, some)
        here = np.flatnonzero(np.isin(contexts, some))
        bits[here] = read[np.searchsorted(some, contexts[here]), positions[here]]
    return of_tokens(source.autoencoder, bits, positions, source.device)


def _of_passages(source: _Source, items: NDArray[np.int64]) -> Mapping[str, Fetch]:
    means = Means(source.autoencoder, source.device)
    for start in range(0, len(items), _READ_CONTEXTS):
        some: list[int] = items[start : start + _READ_CONTEXTS].tolist()
        contexts = np.array([source.passages[i].context for i in some])
        read = source.store.read(source.layer, contexts, dtype="float32")
        for i, activations in zip(some, read, strict=True):
            positions = source.passages[i].positions[source.wanted[i]]
            means.add(activations[positions], positions)
    return means.probed()
