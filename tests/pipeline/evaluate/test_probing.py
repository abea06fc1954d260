"""Sparse probing: SAEBench's accuracies, labels that are right, rows that are where they should be."""

import contextlib
import io
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import datasets  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from posae.pipeline.errors import CorpusError
from posae.pipeline.evaluate.probing import hub, offline
from posae.pipeline.evaluate.probing.passages import (
    Passage,
    passages_of_contexts,
    passages_of_documents,
    runs,
)
from posae.pipeline.evaluate.probing.protocol import (
    SIZES,
    Choice,
    Fetch,
    Sizes,
    draw,
    full_accuracy,
    probe_task,
)
from posae.pipeline.evaluate.probing.representations import Means
from posae.pipeline.evaluate.probing.results import class_result, score, task_result
from posae.pipeline.evaluate.probing.tasks import (
    bracket_depth,
    first_use,
    indentation,
    line_distance,
    package,
    token_class,
)
from posae.pipeline.harvest.text.contexts import take_contexts, tokenizer_hash
from posae.pipeline.harvest.tokenizer import load_tokenizer
from posae.store.reader import ActivationStore

Matrices = dict[str, NDArray[np.float32]]
DEMO = cast(PreTrainedTokenizerFast, load_tokenizer("demo"))
BOS, EOS = 2, 1
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The protocol


def made_classes(seed: int, n_rows: int, n_features: int, n_classes: int = 4) -> Matrices:
    """Sparse rows, of which each class has features of its own, and noise."""
    rng = np.random.default_rng(seed)
    found: Matrices = {}
    for i in range(n_classes):
        x = rng.exponential(size=(n_rows, n_features)) * (rng.random((n_rows, n_features)) < 0.2)
        x[:, i] += rng.random(n_rows) * (rng.random(n_rows) < 0.7)
        x[:, i + n_classes] += 0.5 * rng.random(n_rows)
        found[f"class {i}"] = x.astype(np.float32)
    return found


def stacked(classes: Matrices) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int64]]]:
    """All rows, and which of them are of which class."""
    edges = [0, *accumulate(len(x) for x in classes.values())]
    rows = {name: np.arange(a, b) for name, (a, b) in zip(classes, pairwise(edges), strict=True)}
    return np.concatenate([*classes.values()]), rows


def probed_here(train: Matrices, test: Matrices, seed: int) -> dict[str, dict[str, float]]:
    x, train_rows = stacked(train)
    test_x, test_rows = stacked(test)
    both = np.concatenate([x, test_x])
    moved = {name: rows + len(x) for name, rows in test_rows.items()}
    found = probe_task(train_rows, moved, {"codes": lambda rows: both[rows]}, Choice.TEST, seed)
    return {name: scores.accuracies["codes"] for name, scores in found}


@pytest.fixture
def saebench() -> Iterator[Any]:
    """SAEBench's own module."""
    jaxtyping: Any = pytest.importorskip("jaxtyping", reason="sae-bench is not installed: see .ci/run")
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # some of its hints are wrong about their own sizes
    name = "sae_bench.evals.sparse_probing.probe_training"
    yield pytest.importorskip(name, reason="sae-bench is not installed: see .ci/run")
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.filterwarnings("ignore:'penalty' was deprecated:FutureWarning")
def test_accuracies_are_those_of_saebench(saebench: Any) -> None:
    def as_tensors(classes: Matrices) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(x) for name, x in classes.items()}

    for seed in (0, 42):
        train, test = made_classes(seed, 150, 24), made_classes(seed + 100, 60, 24)
        here = probed_here(train, test, seed)
        for k in (1, 2, 5):
            cast(Any, torch).manual_seed(seed)
            with contextlib.redirect_stdout(io.StringIO()):
                _, there = saebench.train_probe_on_activations(
                    as_tensors(train), as_tensors(test), select_top_k=k
                )
            assert {name: found[str(k)] for name, found in here.items()} == there
        # SAEBench trains between drawing the rows of two classes: the first class alone is drawn alike.
        for first in train:
            order = [first, *(name for name in train if name != first)]
            here = probed_here({n: train[n] for n in order}, {n: test[n] for n in order}, seed)
            cast(Any, torch).manual_seed(seed)
            with contextlib.redirect_stdout(io.StringIO()):
                _, there = saebench.train_probe_on_activations(
                    as_tensors({n: train[n] for n in order}),
                    as_tensors({n: test[n] for n in order}),
                    use_sklearn=False,
                    batch_size=250,
                    epochs=100,
                    lr=1e-2,
                )
            assert here[first]["all"] == pytest.approx(there[first], abs=1e-6)
            assert 0.5 < there[first] < 1


def test_sizes_are_those_of_saebench() -> None:
    assert SIZES == (4000, 1000)
    assert set(hub.TASKS) == {
        "LabHC/bias_in_bios_class_set1",
        "LabHC/bias_in_bios_class_set2",
        "LabHC/bias_in_bios_class_set3",
        "canrager/amazon_reviews_mcauley_1and5",
        "canrager/amazon_reviews_mcauley_1and5_sentiment",
        "codeparrot/github-code",
        "fancyzhx/ag_news",
        "Helsinki-NLP/europarl",
    }


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_half_of_what_is_drawn_is_of_the_class_and_the_rest_evenly_of_the_others(
    counts: list[int], seed: int
) -> None:
    edges = [0, *accumulate(counts)]
    rows = {str(i): np.arange(a, b) for i, (a, b) in enumerate(pairwise(edges))}
    drawn = draw(rows, "0", torch.Generator().manual_seed(seed))
    assert len(set(drawn.rows.tolist())) == len(drawn.rows)
    positive = drawn.rows < counts[0]
    assert (positive == (drawn.labels == 1)).all()
    share = math.ceil(counts[0] / (len(counts) - 1))
    there = sum(min(share, n) for n in counts[1:])
    assert positive.sum() == (~positive).sum() == min(counts[0], there)
    for i in range(1, len(counts)):
        assert np.isin(rows[str(i)], drawn.rows).sum() <= share


def test_labels_at_random_are_told_by_chance_and_planted_ones_by_one_feature() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 20)).astype(np.float32)
    rows = {"a": np.arange(2500), "b": np.arange(2500, 5000)}
    planted = x.copy()
    planted[:2500, 7] += 8
    train = {name: some[:2000] for name, some in rows.items()}
    test = {name: some[2000:] for name, some in rows.items()}
    probed: dict[str, Fetch] = {"random": lambda some: x[some], "planted": lambda some: planted[some]}
    for _, found in probe_task(train, test, probed, Choice.TRAINING):
        assert (found.n_train, found.n_test) == (4000, 1000)
        assert all(0.45 < accuracy < 0.55 for accuracy in found.accuracies["random"].values())
        assert all(accuracy > 0.99 for accuracy in found.accuracies["planted"].values())


def test_choosing_the_epoch_on_the_test_rows_is_optimistic_and_on_training_rows_is_not() -> None:
    found: dict[Choice, list[float]] = {choice: [] for choice in Choice}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(260, 30)).astype(np.float32)
        labels = rng.integers(0, 2, 260)
        for choice in Choice:
            generator = torch.Generator().manual_seed(seed)
            accuracy = full_accuracy(x[:160], labels[:160], x[160:], labels[160:], generator, choice)
            found[choice].append(accuracy)
    assert np.mean(found[Choice.TEST]) > 0.53
    assert abs(np.mean(found[Choice.TRAINING]) - 0.5) < 0.04


def test_errors_say_how_far_an_accuracy_is_noise() -> None:
    right = np.random.default_rng(0).random((4000, 500)) < 0.7
    assert score(0.7, 500)["standard_error"] == pytest.approx(right.mean(1).std(), rel=0.05)
    assert 0 < score(1.0, 50)["standard_error"] < 0.05
    x, rows = stacked(made_classes(0, 60, 16, n_classes=2))
    found = {n: class_result(s) for n, s in probe_task(rows, rows, {"codes": lambda r: x[r]}, Choice.TEST)}
    mean = task_result("token", found, {"rare": "3 rows"})["mean"]["codes"]["1"]
    one, two = (f["scores"]["codes"]["1"] for f in found.values())
    assert mean["accuracy"] == pytest.approx((one["accuracy"] + two["accuracy"]) / 2)
    # The two classes' test rows are the same rows: nothing averages out.
    assert mean["standard_error"] == pytest.approx((one["standard_error"] + two["standard_error"]) / 2)


# What tokens are


def passage(text: str, *, is_whole: bool = True, start: int = 0, stop: int | None = None) -> Passage:
    """A token a word, each with the space before it."""
    spans: list[tuple[int, int]] = []
    at = start
    for i in range(start + 1, (len(text) if stop is None else stop) + 1):
        if i == len(text) or i == stop or (text[i].isspace() and not text[i - 1].isspace()):
            spans.append((at, i))
            at = i
    return Passage(0, np.arange(len(spans)), 0, text, np.array(spans), is_whole)


def labelled(found: list[str | None], of: Passage) -> list[tuple[str, str | None]]:
    return [(of.text[a:b].strip(), label) for (a, b), label in zip(of.spans, found, strict=True)]


SOURCE = """\
# a comment
def area ( width , height = 2 ) :
    if width :
        return max ( [ width , \" ( \" , height ] )
"""


def test_token_classes_are_those_of_pythons_tokenizer() -> None:
    found = labelled(token_class(passage(SOURCE)), passage(SOURCE))
    assert found[:3] == [("#", "comment"), ("a", "comment"), ("comment", "comment")]
    assert found[3:7] == [("def", "keyword"), ("area", "name"), ("(", "operator"), ("width", "name")]
    assert ("2", "number") in found
    assert [label for word, label in found if '"' in word] == ["string", "string"]
    assert found[-1] == ("", "space")


def test_bracket_depth_counts_brackets_that_are_no_text() -> None:
    of = passage(SOURCE)
    found = labelled(bracket_depth(of), of)
    assert [label for word, label in found if word == "width"] == ["1", "0", "2"]
    assert [label for word, label in found if word == "height"] == ["1", "2"]
    assert [label for word, label in found if word == "("] == ["0", "0", "2"]
    assert found[-1] == ("", "0")
    decoded = passage("a ) b ( c [ d ( e ( f", is_whole=False)
    depths = dict(labelled(bracket_depth(decoded), decoded))
    assert [depths[letter] for letter in "abcdef"] == ["0", "0", "1", "2", "3+", "3+"]


def test_lines_are_told_only_where_their_beginning_is_known() -> None:
    of = passage(SOURCE)
    assert [label for word, label in labelled(indentation(of), of) if word in ("def", "if", "return")] == [
        "0",
        "1",
        "2",
    ]
    distances = labelled(line_distance(of), of)[3:11]
    assert distances[:4] == [("def", "0-7"), ("area", "0-7"), ("(", "8-23"), ("width", "8-23")]
    assert distances[5:] == [("height", "8-23"), ("=", "24-39"), ("2", "24-39")]
    cut = passage("tail of a line\n    next line", is_whole=False)
    assert indentation(cut) == [None] * 4 + ["1", "1"]
    assert line_distance(cut) == [None] * 4 + ["0-7", "8-23"]


def test_first_use_is_told_at_the_end_of_a_name_and_within_the_passage() -> None:
    text = "width = height\nwidth = width + heights\n"
    spans = np.array(
        [[0, 3], [3, 5], [5, 7], [7, 14], [14, 20], [20, 22], [22, 28], [28, 30], [30, 38], [38, 39]]
    )
    whole = Passage(0, np.arange(10), 0, text, spans, is_whole=True)
    assert first_use(whole) == [None, "first", None, "first", "again", None, "again", None, "first", None]
    # The language model did not see what stands before the passage, nor all of the word that it begins in.
    later = whole._replace(spans=spans[1:], positions=np.arange(9))
    assert first_use(later) == [None, None, "first", "first", None, "again", None, "first", None]
    assert first_use(passage("if else if", is_whole=True)) == [None] * 3
    assert first_use(passage("one two one two two", is_whole=False)) == [
        None,
        "first",
        "first",
        "again",
        None,
    ]


def test_what_is_no_python_has_no_class() -> None:
    assert token_class(passage("x = (\n  'open")) == [None] * 4
    assert token_class(passage("x = 1", is_whole=False)) == [None] * 3
    assert (package("json/decoder.py"), package("json.py")) == ("json", "(single modules)")


# Where tokens stand


def contexts_of(texts: list[str], n_contexts: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    found = take_contexts(texts, DEMO, n_contexts=n_contexts, context_length=length)
    return found.tokens, found.documents


def decoded(ids: list[int]) -> str:
    return cast(Any, DEMO).decode(ids, clean_up_tokenization_spaces=False)


def passages_in(
    tokens: NDArray[Any], origins: NDArray[Any], texts: list[str] | None
) -> tuple[list[Passage], Any]:
    found = list(runs(np.arange(len(tokens)), tokens, origins, BOS, EOS))
    ids = dict(enumerate(tokens))
    if texts is None:
        return list(passages_of_contexts(found, ids, DEMO)), None
    return passages_of_documents(found, ids, texts, DEMO)


TEXTS = [
    "import os\n\n\ndef first(path):\n    return os.path.join(path, 'ünï→cödé')\n" * 2,
    "class Second:\n    '''It has a docstring.'''\n\n    number = 0x_FF + 12.5\n" + "y = 3\n" * 3,
    "x = 1\n",
    "def last(a, b):\n    for item in a:\n        yield item[b], (a, [b, {a: b}])\n",
]


def test_tokens_stand_in_their_documents_where_they_came_from() -> None:
    tokens, origins = contexts_of(TEXTS, 13, 12)
    passages, alignment = passages_in(tokens, origins, TEXTS)
    assert alignment.runs == alignment.found + alignment.ambiguous + alignment.missing
    assert alignment.missing == 0
    assert alignment.found == len(passages) > 8
    for found in passages:
        ids = tokens[found.context, found.positions]
        assert (origins[found.context, found.positions] == found.document).all()
        assert found.text == TEXTS[found.document]
        for token, (start, stop) in zip(ids.tolist(), found.spans, strict=True):
            shown = decoded([token])
            assert "�" in shown or found.text[start:stop] == shown
        assert not np.isin(ids, [BOS, EOS]).any()


def test_what_stands_twice_in_a_document_or_never_is_left_out() -> None:
    text = "again\n" * 20
    tokens, origins = contexts_of([text, "other\n" * 40], 12, 8)
    passages, alignment = passages_in(tokens, origins, [text, "nothing of it\n"])
    # Of the repeated lines only those next to the document's known end have one place.
    assert alignment.ambiguous > 0
    assert alignment.missing > 0
    assert all(found.document == 0 for found in passages)
    for found in passages:
        assert found.spans[-1, 1] == len(text)


def test_decoded_contexts_are_the_text_of_their_tokens() -> None:
    tokens, origins = contexts_of(TEXTS, 13, 12)
    passages, _ = passages_in(tokens, origins, None)
    assert sum("→" in found.text or "ö" in found.text for found in passages) > 0
    for found in passages:
        ids: list[int] = tokens[found.context, found.positions].tolist()
        whole = decoded(ids)
        if "�" not in whole:
            assert found.text == whole
        assert (found.spans[1:, 0] == found.spans[:-1, 1]).all()
        assert found.spans[-1, 1] == len(found.text)
        for token, (start, stop) in zip(ids, found.spans, strict=True):
            shown = decoded([token])
            assert "�" in shown or found.text[start:stop] == shown


# A store


class Doubling:
    """Codes are what is above 0 in an activation and what is below, and remember where they were."""

    def __init__(self, d_model: int) -> None:
        self.dictionary_size = 2 * d_model
        self.seen: list[int] = []

    def encode(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.seen += [int(position) for position in positions]
        return torch.cat([x, -x], dim=1).relu()


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    """Files of two packages, with a name of their own each."""
    rng = random.Random(0)
    found: list[tuple[str, str]] = []
    for i in range(24):
        words = [f"{rng.choice('abcdefgh')}{rng.choice('ijklmnop')}{rng.choice('qrstuv')}" for _ in range(8)]
        lines = [
            f"{'    ' * rng.randrange(3)}{rng.choice(words)} = {rng.choice(words)}({rng.choice(words)}, "
            f"{rng.randrange(99)})  # {rng.choice(words)}\n"
            for _ in range(60)
        ]
        body = "".join(f"if {words[0]}:\n    pass\n{line.lstrip()}" for line in lines)
        found.append((f"{'left' if i % 2 else 'right'}/{i}.py", f"# file {i}\n{body}"))
    return found


def made_store(
    root: Path, documents: list[tuple[str, str]], make_store: Callable[..., Any], n_contexts: int = 260
) -> tuple[ActivationStore, NDArray[np.int32]]:
    """A store whose activations tell in their first number whether a token is a keyword, in the second
    which package its document belongs to, and in the third its position; the rest is noise.
    """
    length = 64
    texts = [text for _, text in documents]
    tokens, origins = contexts_of(texts, n_contexts, length)
    x = np.random.default_rng(1).normal(size=(n_contexts, length, 8)).astype(np.float32)
    passages, _ = passages_in(tokens, origins, texts)
    x[..., 0] = 0
    for found in passages:
        x[found.context, found.positions, 0] = 2 * (np.array(token_class(found)) == "keyword")
    x[..., 1] = origins % 2
    x[..., 2] = np.arange(length) / length
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    like = make_store(root / "like.zarr", n_contexts=n_contexts, context_length=length, d_model=8)
    manifest = like.manifest.model_copy(
        update={
            "tokenizer_hash": tokenizer_hash(DEMO),
            "vocabulary_size": len(DEMO),
            "first_token": BOS,
            "separator_token": EOS,
            "special_token_ids": (0, EOS, BOS, 3),
        }
    )
    made = type(like)(root / "made.zarr", manifest, tokens, origins, {1: bits}, like.corpus)
    made.write([1])
    return ActivationStore.open(root / "made.zarr"), tokens


@pytest.fixture(scope="module")
def store(
    documents: list[tuple[str, str]], make_store: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    return made_store(tmp_path_factory.mktemp("probing"), documents, make_store)[0]


SMALL = Sizes(400, 100)


def probe(
    store: ActivationStore,
    documents: list[tuple[str, str]] | None,
    told: Callable[[int, int, str], None] = lambda done, total, last: None,
    sizes: Sizes = SMALL,
) -> Any:
    autoencoder = Doubling(store.d_model)
    found = offline.probe_store(
        store,
        1,
        autoencoder,
        DEMO,
        documents,
        held_out=(250, 260),
        leave_out=store.manifest.special_token_ids,
        device=CPU,
        told=told,
        sizes=sizes,
    )
    return found, autoencoder


def test_probes_find_what_activations_tell_and_nothing_else(
    store: ActivationStore, documents: list[tuple[str, str]]
) -> None:
    told: list[tuple[int, int, str]] = []
    found, autoencoder = probe(
        store, documents, told=lambda done, total, last: told.append((done, total, last))
    )
    assert found["data"]["contexts"] == "all"
    assert found["data"]["split"] == "documents"
    assert found["data"]["alignment"]["found"] > 250
    keyword = found["tasks"]["token class"]["classes"]["keyword"]
    for scores in keyword["scores"].values():
        assert [scores[k]["accuracy"] > 0.99 for k in ("1", "2", "5")] == [True] * 3
        assert scores["all"]["accuracy"] > 0.9
    for name, scores in found["tasks"]["package"]["mean"].items():
        assert scores["1"]["accuracy"] > 0.95, name
    depth = found["tasks"]["bracket depth"]["mean"]["activations"]["5"]
    assert abs(depth["accuracy"] - 0.5) < 0.1
    assert set(autoencoder.seen) <= set(range(1, store.context_length))
    n_classes = sum(len(task["classes"]) for task in found["tasks"].values())
    assert [words[:2] for words in told] == [(i, n_classes) for i in range(n_classes + 1)]
    again, _ = probe(store, documents)
    assert again == found
    assert json.loads(json.dumps(found)) == found


def test_codes_are_made_at_the_positions_of_their_rows(
    store: ActivationStore, documents: list[tuple[str, str]]
) -> None:
    class Checking(Doubling):
        def encode(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            assert (x[:, 2] * 64 == positions).all()
            return super().encode(x, positions)

    offline.probe_store(
        store,
        1,
        Checking(store.d_model),
        DEMO,
        documents,
        held_out=(250, 260),
        leave_out=store.manifest.special_token_ids,
        device=CPU,
        sizes=SMALL,
    )


@given(st.lists(st.integers(1, 400), min_size=2, max_size=12), st.integers(0, 99), st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_document_is_trained_on_and_tested_on(
    counts: list[int], seed: int, label_is_document: bool
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    labels = (groups % 3 if label_is_document else rng.integers(0, 3, len(groups))).astype(str).tolist()
    rows = offline.Labelled(labels, np.arange(len(groups)), groups)
    sizes = Sizes(300, 80)
    task = offline.split("context" if label_is_document else "token", rows, sizes, rng)
    assert set(task.train) == set(task.test)
    assert set(task.train) | set(task.left_out) == set(labels)
    trained, tested = (
        {int(groups[row]) for some in part.values() for row in some} for part in (task.train, task.test)
    )
    assert not trained & tested
    for label, train in task.train.items():
        test = task.test[label]
        assert {labels[row] for row in [*train, *test]} == {label}
        assert 100 <= len(train) <= 150
        assert 25 <= len(test) <= 40


def test_without_documents_the_tasks_of_the_decoded_text_are_left(store: ActivationStore) -> None:
    found, _ = probe(store, None)
    assert found["data"]["text"] == "decoded contexts"
    assert found["data"]["alignment"] is None
    assert "package" not in found["tasks"]
    assert found["tasks"]["token class"]["mean"] == {}
    for name in ("bracket depth", "distance to line start", "first use"):
        assert set(found["tasks"][name]["mean"]) == {"activations", "codes"}, name


def test_held_out_contexts_are_taken_where_there_are_enough(
    store: ActivationStore, documents: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "ENOUGH_TOKENS", 10 * store.context_length)
    found, _ = probe(store, documents)
    assert (found["data"]["contexts"], found["data"]["n_contexts"]) == ("held-out", 10)
    reasons = " ".join(why for task in found["tasks"].values() for why in task["left_out"].values())
    assert "too few" in reasons


def test_sizes_bound_the_rows_of_a_probe(store: ActivationStore, documents: list[tuple[str, str]]) -> None:
    found, _ = probe(store, documents, sizes=Sizes(240, 60))
    name = found["tasks"]["token class"]["classes"]["name"]
    assert (name["n_train"], name["n_test"]) == (240, 60)
    assert (found["n_train"], found["n_test"]) == (240, 60)


# The Hub


def reviews(n: int) -> Any:
    """Rows of classes 0 to 3 by two of a second column, unevenly; the text says what it is."""
    rng = np.random.default_rng(0)
    labels, seconds = rng.integers(0, 4, n), (rng.random(n) < 0.3).astype(int)
    text = [f"{a} {b} {i}" for i, (a, b) in enumerate(zip(labels, seconds, strict=True))]
    return cast(Any, datasets).Dataset.from_dict(
        {"hard_text": text, "profession": labels.tolist(), "gender": seconds.tolist()}
    )


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``load_dataset`` gives, by ``name`` or ``name/config``; and what it was asked for."""
    there: dict[str, Any] = {"asked": []}

    def load(name: str, *arguments: str, **options: Any) -> Any:
        there["asked"].append((name, *arguments, options))
        return there["/".join((name, *arguments))]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return there


def test_texts_are_balanced_by_the_second_column_and_those_that_pandas_draws(loads: dict[str, Any]) -> None:
    table = loads["LabHC/bias_in_bios"] = reviews(900)
    task = hub.HubTask(("0", "2"), hub.TASKS["LabHC/bias_in_bios_class_set1"].texts)
    train, test = hub.load_texts("bios", task, Sizes(120, 40), 42)
    assert [options["split"] for _, options in loads["asked"]] == ["train", "test"]
    frame: Any = table.to_pandas()
    for label in ("0", "2"):
        assert (len(train[label]), len(test[label])) == (60, 20)
        assert all(text.startswith(f"{label} ") for text in train[label])
        assert sum(text.startswith(f"{label} 1") for text in train[label]) == 30
        expected: list[str] = []
        for _, group in frame[frame.profession == int(label)].groupby("gender"):
            expected += group.sample(n=30, random_state=42)["hard_text"].tolist()
        assert train[label] == expected


def test_a_dataset_that_has_changed_is_told(loads: dict[str, Any]) -> None:
    loads["LabHC/bias_in_bios"] = reviews(90)
    texts = hub.TASKS["LabHC/bias_in_bios_class_set1"].texts
    with pytest.raises(CorpusError, match="are needed; it has changed"):
        hub.load_texts("bios", hub.HubTask(("0",), texts), Sizes(120, 40), 42)
    with pytest.raises(CorpusError, match="no class 9"):
        hub.load_texts("bios", hub.HubTask(("9",), texts), Sizes(8, 4), 42)
    with pytest.raises(CorpusError, match=r"KeyError.*--probing offline"):
        hub.load_texts("news", hub.TASKS["fancyzhx/ag_news"], SIZES, 42)


def test_code_loses_its_first_150_characters_and_languages_are_told_by_path(loads: dict[str, Any]) -> None:
    def row(end: str, i: int, length: int = 600) -> dict[str, str]:
        return {"path": f"src/file{i}{end}", "content": "L" * 150 + f"{end} {i} ".ljust(length - 150, "x")}

    ends = (".c", ".py", ".h", ".js", ".php")
    rows = [row(end, i) for i in range(40) for end in ends]
    rows.insert(0, row(".py", 999, length=534))  # too short
    rows.insert(1, row(".py", 998, length=535))
    loads["parquet"] = iter(rows)
    train, test = hub.github_code(("C", "Python", "PHP"), Sizes(40, 20), 42)
    assert {name: (len(train[name]), len(test[name])) for name in train} == dict.fromkeys(
        ("C", "Python", "PHP"), (20, 10)
    )
    everything = [text for part in (train, test) for texts in part.values() for text in texts]
    assert not any("L" in text for text in everything)
    assert all(text[0] == "." for text in everything)
    assert {text.split()[0] for text in train["C"]} == {".c", ".h"}
    assert not any(text.startswith(".py 999 ") for text in everything)
    # As SAEBench does: all until each language has more than are needed, shuffled by one generator.
    expected = [text for text in (r["content"][150:] for r in rows if r["path"].endswith((".c", ".h")))][:62]
    random.Random(42).shuffle(expected)
    assert next(loads["parquet"], None) is not None
    assert train["C"] == expected[:20]


def test_a_language_of_europarl_is_read_from_its_pair(loads: dict[str, Any]) -> None:
    for language, pair in (("en", "en-fr"), ("nl", "nl-pt")):
        rows = [{"translation": {language: f"{language} {i}", "xx": "no"}} for i in range(100)]
        loads[f"Helsinki-NLP/europarl/{pair}"] = rows
    train, test = hub.europarl(("en", "nl"), Sizes(40, 20), 42)
    assert all(text.startswith("nl ") for text in train["nl"] + test["nl"])
    assert len(set(train["en"] + test["en"])) == 30
    numbers = [int(text.split()[1]) for text in train["en"] + test["en"]]
    assert max(numbers) <= 30


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_from_the_first_token_and_no_padding_is_seen(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DEMO, "padding_side", side)
    texts = ["def f(x): return x", "a", "", "x = 1\n" * 90, "class C: pass"]
    rows = hub.tokenised(texts, DEMO, BOS, 128)
    assert [row[0] for row in rows] == [BOS] * 5
    assert [len(row) for row in rows][1:4] == [2, 1, 128]
    assert rows[3][:5] == [BOS, *DEMO("x = 1\n" * 90, add_special_tokens=False)["input_ids"][:4]]

    def activations(ids: torch.Tensor) -> torch.Tensor:
        assert not torch.isin(ids, torch.tensor(DEMO.pad_token_id)).any()
        assert (ids[:, 0] == BOS).all()
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return torch.stack([ids.float(), positions.float()], dim=2)

    class Checking(Doubling):
        def encode(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            assert (x[:, 1] == positions).all()
            assert (positions > 0).all()
            return super().encode(x, positions)

    means = Means(Checking(2), CPU)
    places = hub.add_means(means, rows, activations, [BOS, EOS])
    assert places[2] is None
    found = means.probed()["activations"](np.array([p for p in places if p is not None]))
    for row, mean in zip([row for row in rows if len(row) > 1], found, strict=True):
        assert mean[0] == pytest.approx(np.mean(row[1:]), rel=1e-6)
        assert mean[1] == pytest.approx(len(row) / 2)


def test_saebench_is_probed_from_texts_to_accuracies() -> None:
    def texts(classes: Any, sizes: Sizes, seed: int) -> tuple[hub.Texts, hub.Texts]:
        rng = random.Random(seed)
        words = {"0": "import return yield", "1": "x y z", "2": "1 2 3"}

        def some(n: int) -> hub.Texts:
            return {
                name: [" ".join(rng.choices(words[name].split(), k=rng.randrange(1, 9))) for _ in range(n)]
                for name in classes
            }

        return some(sizes.train // 2), some(sizes.test // 2)

    def activations(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids, len(DEMO)).float()

    told: list[tuple[int, int, str]] = []
    found = hub.probe_saebench(
        activations,
        Doubling(len(DEMO)),
        DEMO,
        first=BOS,
        context_length=64,
        device=CPU,
        told=lambda done, total, last: told.append((done, total, last)),
        tasks={"fake": hub.HubTask(("0", "1", "2"), texts)},
        sizes=Sizes(120, 40),
    )
    assert found["full_probe"] == Choice.TEST.value
    assert found["data"] == {"context_length": 64, "texts_without_tokens": 0}
    assert [words[0] for words in told] == [0, 1, 2, 3]
    assert found["mean"]
    for scores in found["mean"].values():
        assert scores["all"]["accuracy"] > 0.95
        assert scores["1"]["accuracy"] < scores["all"]["accuracy"]


def test_probes_that_do_not_converge_are_still_probes() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) * np.array(
        [1e-3, 1e4, 1], np.float32
    )
    rows = {"a": np.arange(20), "b": np.arange(20, 40)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(probe_task(rows, rows, {"x": lambda some: x[some]}, Choice.TRAINING))
