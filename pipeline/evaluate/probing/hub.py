"""SAEBench's eight datasets, for those who have the network: texts by class, as SAEBench draws them.

Texts, classes, sizes and seeds are those of ``sae_bench`` 0.6.0, ``sae_bench_utils/dataset_utils.py``; rows
are drawn with the same generators, so the texts are the same where the datasets are. A text is its first
128 tokens, BOS (else CLS) counted, alone in its context: positions count from its first token. Texts of
one length go through the language model together, so that there is no padding, on whatever side, that a
token could attend to; SAEBench pads on the right, which for a causal model comes to the same. Means are
over all tokens but BOS, EOS and padding (and CLS and SEP).

No code of a dataset is run. ``codeparrot/github-code`` comes with a script that newer versions of
``datasets`` refuse; what it does, telling languages by the ends of paths, is done here on the same files.

Cost: downloads of several GB, a forward pass of 12,500 texts a dataset, and in memory the means of one
dataset: 12,500 x (d_model + dictionary_size) float32.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import CorpusError
from ...harvest.text.contexts import encode
from .protocol import SEED, SIZES, Choice, Rows, Sizes, probe_task
from .representations import Encoder, Means
from .results import ClassResult, ProbingResult, TaskResult, class_result, probing_result, task_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_LENGTH = 128

Activations = Callable[[torch.Tensor], torch.Tensor]
"""The language model up to the layer: int64 ids [texts, positions] to [texts, positions, d_model]."""

Told = Callable[[int, int, str], None]
"""Told how many classes of how many are probed, and which was the last; first 0."""

_MODEL_BATCH = 32
_TOKENIZER_BATCH = 512
_SKIPPED_CHARACTERS = 150
_LEAST_CODE_CHARACTERS = 384 + _SKIPPED_CHARACTERS
_ENDS = {
    ".c": "C",
    ".h": "C",
    ".py": "Python",
    ".html": "HTML",
    ".java": "Java",
    **dict.fromkeys((".php", ".php3", ".php4", ".php5", ".phps", ".phpt"), "PHP"),
}
_LANGUAGE_PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}

Texts = dict[str, list[str]]
"""Texts by class."""


class _Table(Protocol):
    """What is used of ``datasets.Dataset``, which carries no types."""

    def __getitem__(self, column: str) -> Iterable[Any]: ...
    def select(self, indices: Sequence[int]) -> "_Table": ...


def _load(name: str, *arguments: str, **options: Any) -> Any:
    # Imported where it is needed: two seconds that all else does without.
    from datasets import load_dataset  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    return cast(Any, load_dataset)(name, *arguments, **options)


def _choice(n: int, wanted: int, seed: int, name: str) -> NDArray[np.int64]:
    """``wanted`` of ``n`` rows, those that pandas' ``sample`` takes.

    Raises:
        CorpusError: there are fewer.
    """
    if n < wanted:
        raise CorpusError(f"dataset {name}: a class has {n} texts, {wanted} are needed; it has changed")
    return np.random.RandomState(seed).choice(n, size=wanted, replace=False)


def _balanced(
    name: str,
    text: str,
    label: str,
    by: str | None,
    classes: Sequence[str],
    split: str,
    wanted: int,
    seed: int,
) -> Texts:
    """Texts of classes in one split of a dataset, in equal parts by a second column if there is one."""
    table = cast(_Table, _load(name, split=split))
    labels = np.array([str(value) for value in table[label]])
    seconds = np.array(list(table[by])) if by else np.zeros(len(labels))
    found: Texts = {}
    for wanted_class in classes:
        chosen: list[int] = []
        values = np.unique(seconds[labels == wanted_class])
        for value in values:
            rows = np.flatnonzero((labels == wanted_class) & (seconds == value))
            chosen += rows[_choice(len(rows), wanted // len(values), seed, name)].tolist()
        if not chosen:
            raise CorpusError(f"dataset {name}: it has no class {wanted_class}; it has changed")
        found[wanted_class] = list(table.select(chosen)[text])
    return found


def _from_splits(
    name: str, text: str, label: str, by: str | None, classes: Sequence[str], sizes: Sizes, seed: int
) -> tuple[Texts, Texts]:
    train = _balanced(name, text, label, by, classes, "train", sizes.train // 2, seed)
    return train, _balanced(name, text, label, by, classes, "test", sizes.test // 2, seed)


def _cut(samples: Mapping[str, list[str]], name: str, sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    """Shuffle each class's texts, and cut them into training and test texts.

    Raises:
        CorpusError: a class has too few.
    """
    shuffle = random.Random(seed)
    train, test = sizes.train // 2, sizes.test // 2
    for label, texts in samples.items():
        if len(texts) < train + test:
            raise CorpusError(
                f"dataset {name}: class {label} has {len(texts)} texts, {train + test} are needed; "
                "it has changed"
            )
        shuffle.shuffle(texts)
    return (
        {label: texts[:train] for label, texts in samples.items()},
        {label: texts[train : train + test] for label, texts in samples.items()},
    )


def github_code(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    """Code by language, its first 150 characters (a licence, often) left off."""
    name = "codeparrot/github-code"
    files = f"hf://datasets/{name}/data/train-*.parquet"
    rows = cast(
        "Iterable[Mapping[str, Any]]", _load("parquet", data_files=files, split="train", streaming=True)
    )
    wanted = (sizes.train + sizes.test) // 2
    samples: dict[str, list[str]] = {label: [] for label in classes}
    for row in rows:
        path = str(row["path"])
        language = next((found for end, found in _ENDS.items() if path.endswith(end)), None)
        code = str(row["content"] if "content" in row else row["code"])
        if language in samples and len(code) > _LEAST_CODE_CHARACTERS:
            samples[language].append(code[_SKIPPED_CHARACTERS:])
            if all(len(texts) > wanted for texts in samples.values()):
                break
    return _cut(samples, name, sizes, seed)


def europarl(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    """Sentences by language, each language from one pair."""
    name = "Helsinki-NLP/europarl"
    wanted = (sizes.train + sizes.test) // 2
    samples: dict[str, list[str]] = defaultdict(list)
    for language in classes:
        pair = _LANGUAGE_PAIRS[language]
        for row in cast("Iterable[Mapping[str, Any]]", _load(name, pair, split="train", streaming=True)):
            samples[language].append(row["translation"][language])
            if len(samples[language]) > wanted:
                break
    return _cut(samples, name, sizes, seed)


def _bios(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    return _from_splits("LabHC/bias_in_bios", "hard_text", "profession", "gender", classes, sizes, seed)


_AMAZON = "canrager/amazon_reviews_mcauley_1and5"


def _amazon(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    return _from_splits(_AMAZON, "text", "category", "rating", classes, sizes, seed)


def _sentiment(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    return _from_splits(_AMAZON, "text", "rating", None, classes, sizes, seed)


def _news(classes: Sequence[str], sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    return _from_splits("fancyzhx/ag_news", "text", "label", None, classes, sizes, seed)


class HubTask(NamedTuple):
    """One of SAEBench's tasks."""

    classes: tuple[str, ...]
    texts: Callable[[Sequence[str], Sizes, int], tuple[Texts, Texts]]
    """Training and test texts of classes."""


TASKS = {
    "LabHC/bias_in_bios_class_set1": HubTask(("0", "1", "2", "6", "9"), _bios),
    "LabHC/bias_in_bios_class_set2": HubTask(("11", "13", "14", "18", "19"), _bios),
    "LabHC/bias_in_bios_class_set3": HubTask(("20", "21", "22", "25", "26"), _bios),
    _AMAZON: HubTask(("1", "2", "3", "5", "6"), _amazon),
    f"{_AMAZON}_sentiment": HubTask(("1.0", "5.0"), _sentiment),
    "codeparrot/github-code": HubTask(("C", "Python", "HTML", "Java", "PHP"), github_code),
    "fancyzhx/ag_news": HubTask(("0", "1", "2", "3"), _news),
    "Helsinki-NLP/europarl": HubTask(("en", "fr", "de", "es", "nl"), europarl),
}
"""SAEBench's datasets and classes, by its names."""


def load_texts(name: str, task: HubTask, sizes: Sizes, seed: int) -> tuple[Texts, Texts]:
    """Training and test texts of a task, by class.

    Raises:
        CorpusError: the dataset is out of reach, or not what it was.
    """
    try:
        return task.texts(task.classes, sizes, seed)
    except CorpusError:
        raise
    except Exception as error:  # from far away and out of strangers' files: it may be anything
        line = " ".join(str(error).split())[:300]
        raise CorpusError(
            f"dataset {name} cannot be read ({type(error).__name__}: {line}); check the network, or probe "
            "with --probing offline"
        ) from error


def tokenised(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", first: int | None, length: int
) -> list[list[int]]:
    """The ids of texts, each after the first token that contexts have, cut to ``length``."""
    begin = [] if first is None else [first]
    found: list[list[int]] = []
    for start in range(0, len(texts), _TOKENIZER_BATCH):
        rows = encode(tokenizer, list(texts[start : start + _TOKENIZER_BATCH]))["input_ids"]
        found += [[*begin, *ids[: length - len(begin)]] for ids in rows]
    return found


def _masked_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    named = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep"))
    return [token for token in cast("Iterable[int | None]", named) if token is not None]


def add_means(
    means: Means, rows: Sequence[Sequence[int]], activations: Activations, masked: Sequence[int]
) -> list[int | None]:
    """Run rows of ids through the language model, and add the mean of each.

    Args:
        means: what they are added to.
        rows: ids, from position 0.
        activations: the language model.
        masked: ids that means leave out.

    Returns:
        For each of ``rows`` its row in ``means``; None for one without a token to take a mean of.
    """
    places: list[int | None] = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for length, group in groupby(by_length, key=lambda i: len(rows[i])):
        alike = list(group) if length else []
        for start in range(0, len(alike), _MODEL_BATCH):
            some = alike[start : start + _MODEL_BATCH]
            ids = torch.tensor([rows[i] for i in some])
            x = activations(ids).float().cpu().numpy()
            kept = ~np.isin(ids.numpy(), masked)
            for i, row, wanted in zip(some, x, kept, strict=True):
                if wanted.any():
                    places[i] = len(means)
                    means.add(row[wanted], np.flatnonzero(wanted))
    return places


def probe_saebench(
    activations: Activations,
    autoencoder: Encoder,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    first: int | None,
    context_length: int,
    device: torch.device,
    told: Told = lambda done, total, last: None,
    tasks: Mapping[str, HubTask] = TASKS,
    sizes: Sizes = SIZES,
    seed: int = SEED,
) -> ProbingResult:
    """Probe a layer of a language model, and its codes, on SAEBench's datasets.

    Args:
        activations: the language model up to the layer.
        autoencoder: in ``eval()``, on ``device``.
        tokenizer: the language model's.
        first: the id that every context begins with, if any.
        context_length: positions that the autoencoder knows; texts are cut to these, at most 128.
        device: where to encode.
        told: told before the first class, and after each.
        tasks: by name.
        sizes: texts of a probe.
        seed: of what is drawn.

    Raises:
        CorpusError: a dataset is out of reach, or not what it was.
    """
    length = min(CONTEXT_LENGTH, context_length)
    masked = _masked_ids(tokenizer)
    n_classes, done = sum(len(task.classes) for task in tasks.values()), 0
    told(0, n_classes, "")
    found: dict[str, TaskResult] = {}
    n_empty = 0
    for name, task in tasks.items():
        means = Means(autoencoder, device)
        splits: list[dict[str, Rows]] = []
        for texts in load_texts(name, task, sizes, seed):
            split: dict[str, Rows] = {}
            for label in task.classes:
                rows = tokenised(texts[label], tokenizer, first, length)
                places = add_means(means, rows, activations, masked)
                split[label] = np.array([place for place in places if place is not None], np.int64)
                n_empty += len(places) - len(split[label])
            splits.append(split)
        train, test = splits
        probed = means.probed()
        classes: dict[str, ClassResult] = {}
        for positive, scores in probe_task(train, test, probed, Choice.TEST, seed):
            classes[positive] = class_result(scores)
            done += 1
            told(done, n_classes, f"{name}: {positive}")
        found[name] = task_result("context", classes, {})
    data = {"context_length": length, "texts_without_tokens": n_empty}
    return probing_result("saebench", found, sizes, Choice.TEST, seed, data)
