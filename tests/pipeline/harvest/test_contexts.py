"""Contexts: each token of the corpus once, in its place, and no document read in vain."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from posae.pipeline.errors import CorpusError
from posae.pipeline.harvest.corpus import corpus_counts, count_duplicates
from posae.pipeline.harvest.text import contexts as module
from posae.pipeline.harvest.text.contexts import (
    Contexts,
    InOrder,
    held_out_contexts,
    order_of_contexts,
    special_tokens,
    take_contexts,
    tokenizer_hash,
)
from posae.pipeline.harvest.text.stdlib import stdlib_documents
from posae.store.errors import SettingsError

SPECIAL = {"bos": "<s>", "eos": "</s>", "cls": "[CLS]", "sep": "[SEP]"}
LETTERS = "abcdefghij"
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL.values(), *LETTERS, "<", ">", "s", "/"])}
DEMO = Path(module.__file__).parents[1] / "demo_model"


def letter_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a letter, spaces none; a post-processor that puts a special token before text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    named = {f"{name}_token": SPECIAL[name] for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **named)


TOKENIZERS = {
    names: letter_tokenizer(*names) for names in [("bos", "eos"), ("bos",), ("eos",), ("cls", "sep"), ()]
}
PLAIN = TOKENIZERS[("bos", "eos")]


load_tokenizer = cast(Any, AutoTokenizer).from_pretrained


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_tokenizer(DEMO)


def numbers(text: str) -> list[int]:
    return [VOCABULARY[letter] for letter in text.replace(" ", "")]


def stream_of(documents: list[str], separator: int | None) -> list[tuple[int, int]]:
    """Every (token, document) of the packed corpus."""
    stream: list[tuple[int, int]] = []
    for index, text in enumerate(documents):
        ids = numbers(text)
        if ids and separator is not None:
            ids.append(separator)
        stream += [(token, index) for token in ids]
    return stream


def body_of(taken: Contexts, n_first: int) -> list[tuple[int, int]]:
    tokens, documents = taken.tokens[:, n_first:], taken.documents[:, n_first:]
    return list(zip(tokens.ravel().tolist(), documents.ravel().tolist(), strict=True))


texts = st.lists(st.text(alphabet=LETTERS + " ", max_size=25), min_size=1, max_size=20)
tokenizers = st.sampled_from(list(TOKENIZERS.values()))


@given(texts, tokenizers, st.integers(2, 9), st.integers(0, 3), st.sampled_from([4, 1000]))
@settings(deadline=None, max_examples=150)
def test_packed_contexts_are_the_joined_documents(
    documents: list[str],
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    skip: int,
    piece: int,
) -> None:
    special = special_tokens(tokenizer)
    stream = stream_of(documents, special.separator)
    n_first = 0 if special.first is None else 1
    body = context_length - n_first
    n_contexts = len(stream) // body - skip
    take: dict[str, Any] = {"context_length": context_length, "skip_contexts": skip}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", piece)
        with pytest.raises(CorpusError):
            take_contexts(documents, tokenizer, n_contexts=max(1, n_contexts + 1), **take)
        if n_contexts < 1:
            return
        taken = take_contexts(documents, tokenizer, n_contexts=n_contexts, **take)
    assert taken.tokens.shape == taken.documents.shape == (n_contexts, context_length)
    assert taken.tokens.dtype == np.int32
    assert taken.documents.dtype == np.int64
    assert body_of(taken, n_first) == stream[skip * body : (skip + n_contexts) * body]
    if n_first:
        assert (taken.tokens[:, 0] == special.first).all()
        assert (taken.documents[:, 0] == taken.documents[:, 1]).all()
    assert taken.n_documents == 1 + taken.documents.max()
    assert taken.n_left_out == sum(not numbers(text) for text in documents[: taken.n_documents])


@given(texts, tokenizers, st.integers(2, 9), st.integers(0, 3))
@settings(deadline=None)
def test_truncated_contexts_are_the_beginnings_of_long_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, context_length: int, skip: int
) -> None:
    first = special_tokens(tokenizer).first
    begin = [] if first is None else [first]
    body = context_length - len(begin)
    long = [i for i, text in enumerate(documents) if len(numbers(text)) >= body][skip:]
    take: dict[str, Any] = {
        "context_length": context_length,
        "skip_contexts": skip,
        "packing": "truncate",
    }
    with pytest.raises(CorpusError):
        take_contexts(documents, tokenizer, n_contexts=len(long) + 1, **take)
    if not long:
        return
    taken = take_contexts(documents, tokenizer, n_contexts=len(long), **take)
    assert taken.tokens.tolist() == [begin + numbers(documents[i])[:body] for i in long]
    assert (taken.documents == np.array(long)[:, None]).all()
    assert taken.n_documents == long[-1] + 1
    assert taken.n_left_out == taken.n_documents - len(long) - skip


@pytest.mark.parametrize("packing", ["pack", "truncate"])
@pytest.mark.parametrize("n_contexts", [1, 7, 100])
def test_no_document_is_read_past_the_need(packing: Literal["pack", "truncate"], n_contexts: int) -> None:
    n_read = 0

    def documents() -> Iterator[str]:
        nonlocal n_read
        while True:
            n_read += 1
            yield "abcde"

    # With its separator a document is six tokens; six contexts of six tokens and BOS take six.
    taken = take_contexts(
        documents(), PLAIN, n_contexts=n_contexts, context_length=7 - (packing == "truncate"),
        packing=packing,
    )  # fmt: skip
    assert n_read == taken.n_documents == n_contexts


def test_demo_tokenizer_packs_as_it_encodes(demo: Any) -> None:
    documents = ["def <bos> one():\n", "", "# <eos> é 🂡 \x01\n" * 40, "x = 1 <pad><unk>\n" * 9]
    special = special_tokens(demo)
    assert special.first_is == "bos"
    assert special.first == demo.bos_token_id
    assert special.separator == demo.eos_token_id
    stream: list[list[int]] = [
        demo.encode(text, add_special_tokens=False, split_special_tokens=True) for text in documents
    ]
    # No text of a document became a special token, and none was lost.
    assert not set(itertools.chain(*stream)) & set(special.ids)
    assert [demo.decode(ids) for ids in stream] == documents
    joined = [token for ids in stream if ids for token in [*ids, special.separator]]
    n_contexts = len(joined) // 15
    taken = take_contexts(documents, demo, n_contexts=n_contexts, context_length=16)
    assert taken.tokens[:, 1:].ravel().tolist() == joined[: n_contexts * 15]
    assert taken.n_left_out == 1


def test_skipping_gives_the_later_part_of_the_standard_library(
    demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    whole = take_contexts(stdlib_documents(), demo, n_contexts=300, context_length=128, progress=told.append)
    later = take_contexts(stdlib_documents(), demo, n_contexts=100, context_length=128, skip_contexts=200)
    assert (later.tokens == whole.tokens[200:]).all()
    assert (later.documents == whole.documents[200:]).all()
    assert later[2:] == whole[2:]
    assert told == sorted(told)
    assert told[-1] == 300
    assert not caplog.records  # documents longer than the model's context are no news


def test_a_long_document_is_tokenised_in_pieces_cut_at_lines(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"value_{i} = {i} ** 2\n" for i in range(2000))
    whole = take_contexts([text], demo, n_contexts=100, context_length=64)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 1000)
    pieces = take_contexts([text], demo, n_contexts=100, context_length=64)
    assert (pieces.tokens == whole.tokens).all()
    cut = take_contexts([text], demo, n_contexts=1, context_length=64, packing="truncate")
    assert (cut.tokens == whole.tokens[:1]).all()


class SlowTokenizer(PreTrainedTokenizer):
    """A token a letter, without the Rust library."""

    def __init__(self, **named: str) -> None:
        super().__init__(**named)  # pyright: ignore[reportUnknownMemberType]

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY)

    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return list(text.replace(" ", ""))

    def _convert_token_to_id(self, token: str) -> int:
        return VOCABULARY[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(VOCABULARY)[index]


def test_slow_tokenizers_serve_too() -> None:
    slow = SlowTokenizer(bos_token="<s>", eos_token="</s>")
    assert special_tokens(slow) == special_tokens(PLAIN)
    documents = ["a <s> b", "cd", "efg"]
    slowly, fast = (take_contexts(documents, t, n_contexts=3, context_length=4) for t in (slow, PLAIN))
    assert (slowly.tokens == fast.tokens).all()
    assert tokenizer_hash(slow) == tokenizer_hash(SlowTokenizer(eos_token="</s>", bos_token="<s>"))
    assert tokenizer_hash(slow) != tokenizer_hash(SlowTokenizer(bos_token="<s>"))


def test_special_tokens_of_each_kind() -> None:
    found = {names: special_tokens(tokenizer) for names, tokenizer in TOKENIZERS.items()}
    assert found == {
        ("bos", "eos"): (0, 1, (0, 1), "bos"),
        ("bos",): (0, None, (0,), "bos"),
        ("eos",): (None, 1, (1,), None),
        ("cls", "sep"): (2, None, (2, 3), "cls"),
        (): (None, None, (), None),
    }


def test_tokenizer_hash_knows_the_tokenizer_and_not_its_last_call(demo: Any, tmp_path: Path) -> None:
    before = tokenizer_hash(demo)
    demo(["a b c"], padding="max_length", truncation=True, max_length=9, split_special_tokens=True)
    assert tokenizer_hash(demo) == before
    demo.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == before
    assert len({tokenizer_hash(t) for t in TOKENIZERS.values()} | {before}) == 1 + len(TOKENIZERS)


CORPUS = ["abc", "", "abcdefgh"]  # 4 + 9 tokens of the packed stream: 4 contexts of BOS and 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"n_contexts": 4096},
            "the corpus has 4 contexts of 4 tokens, but 4,096 were requested (1 documents are empty or "
            "too short); use --contexts 4 or fewer, or a larger corpus",
        ),
        (
            {"n_contexts": 4, "skip_contexts": 1},
            "the corpus has 3 contexts of 4 tokens after the 1 skipped, but 4 were requested (1 "
            "documents are empty or too short); use --contexts 3 or fewer, or a larger corpus",
        ),
        (
            {"n_contexts": 1, "skip_contexts": 9},
            "the corpus has 0 contexts of 4 tokens after the 4 skipped, but 1 were requested (1 "
            "documents are empty or too short); lower --skip-contexts below 4, or use a larger corpus",
        ),
        (
            {"n_contexts": 1, "context_length": 50, "packing": "truncate"},
            "the corpus has 0 contexts of 50 tokens, but 1 were requested (3 documents are empty or too "
            "short); use a larger corpus, or shorter contexts (--context-length)",
        ),
    ],
)
def test_a_corpus_too_small_is_told_what_it_has(setting: dict[str, Any], message: str) -> None:
    words: dict[str, Any] = {"context_length": 4} | setting
    with pytest.raises(CorpusError) as caught:
        take_contexts(CORPUS, PLAIN, **words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context_length": 1}, "contexts of 1 tokens hold no text; use 2 or more"),
        ({"n_contexts": 0}, "--contexts is 0; it must be at least 1"),
        ({"skip_contexts": -1}, "--skip-contexts is -1; it must be at least 0"),
        ({"packing": "zip"}, "packing 'zip' does not exist; use pack or truncate"),
        (
            {"n_contexts": 10**15},
            "1,000,000,000,000,000 contexts of 4 tokens need 48,000,000 GB of memory; lower --contexts",
        ),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    words: dict[str, Any] = {"n_contexts": 1, "context_length": 4} | setting
    with pytest.raises(SettingsError) as caught:
        take_contexts(CORPUS, PLAIN, **words)
    assert str(caught.value) == message


@given(st.integers(0, 60), st.integers(0, 2**40), st.data())
def test_permutation_keeps_the_held_out_part_at_the_end(
    n_contexts: int, seed: int, data: st.DataObject
) -> None:
    held_out = data.draw(st.integers(0, n_contexts))
    order = order_of_contexts(n_contexts, seed=seed, held_out=held_out)
    training = n_contexts - held_out
    assert sorted(order[:training]) == list(range(training))
    assert sorted(order[training:]) == list(range(training, n_contexts))
    # Rows in that order are the same whichever are asked for.
    rows = np.arange(2 * n_contexts, dtype=np.int32).reshape(n_contexts, 2)
    start = data.draw(st.integers(0, n_contexts))
    found = InOrder(rows, order)[start : start + 7]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, rows[order[start : start + 7]])


def test_permutation_depends_on_the_seed_in_both_parts() -> None:
    one, other = (order_of_contexts(200, seed=s, held_out=50) for s in (0, 1))
    assert (one[:150] != other[:150]).any()
    assert (one[150:] != other[150:]).any()
    # The training part does not depend on how much is held out after it.
    assert (order_of_contexts(150, seed=0, held_out=0) == one[:150]).all()


@pytest.mark.parametrize(("seed", "held_out"), [(-1, 0), (0, -1), (0, 4)])
def test_impossible_permutations_are_refused(seed: int, held_out: int) -> None:
    with pytest.raises(SettingsError):
        order_of_contexts(3, seed=seed, held_out=held_out)


def test_contexts_in_a_file_are_those_in_memory_and_leave_nothing(tmp_path: Path) -> None:
    in_memory, in_a_file = (
        take_contexts(CORPUS, PLAIN, n_contexts=3, context_length=4, folder=folder)
        for folder in (None, tmp_path)
    )
    for one, other in zip(in_memory, in_a_file, strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 5000), st.floats(0, 0.5), st.integers(1, 64))
def test_training_part_is_whole_chunks(n_contexts: int, fraction: float, chunk: int) -> None:
    held_out = held_out_contexts(n_contexts, fraction, chunk)
    if fraction == 0 or n_contexts <= chunk:
        assert held_out == 0
        return
    training = n_contexts - held_out
    assert held_out > 0
    assert training >= chunk
    assert training % chunk == 0
    wanted = n_contexts * (1 - fraction)
    nearest = min(range(chunk, n_contexts, chunk), key=lambda n: abs(n - wanted))
    assert abs(training - wanted) <= abs(nearest - wanted)


@pytest.mark.parametrize("fraction", [-0.1, 0.51, float("nan")])
def test_held_out_part_is_at_most_half(fraction: float) -> None:
    with pytest.raises(SettingsError, match=r"is not between 0 and 0\.5"):
        held_out_contexts(100, fraction)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_duplicates_are_contexts_seen_before(rows: list[tuple[int, int]]) -> None:
    tokens = np.array(rows, np.int32).reshape(-1, 2)
    assert count_duplicates(tokens) == sum(row in rows[:i] for i, row in enumerate(rows))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_special_tokens_that_occur_are_counted(rows: list[tuple[int, int]]) -> None:
    tokens = np.array(rows, np.int32).reshape(-1, 2)
    counts = corpus_counts(tokens, (1, 4, 9), n_documents=3, n_left_out=1)
    flat = [token for row in rows for token in row]
    assert counts["special_tokens"] == {str(i): flat.count(i) for i in (1, 4) if i in flat}
    assert list(counts["special_tokens"]) == sorted(counts["special_tokens"])
