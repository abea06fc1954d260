"""A store's card: true, of the store alone, safe whatever a store is called, the owner's once edited."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from posae.store import ActivationStore
from posae.store.card import card, is_ours, write_card
from posae.store.errors import StoreWriteError
from posae.store.files import StoreFiles
from posae.store.seal import CARD_PATH
from posae.store.shard_writer import write_array
from posae.store.stats import stats_specs
from posae.store.verify import verify
from posae.store.writer import StoreWriter

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore

COMMIT = "c5ebcd40d208330abc697524c919956e692655cf"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def finish(made: "Made", *layers: int) -> None:
    writer = StoreWriter.begin(made.root, made.manifest)
    with writer.lock():
        writer.finish(layers)


def card_of(root: Path) -> str:
    return card(ActivationStore.open(root))


# --- what it says -------------------------------------------------------------------------------------


def test_the_hub_reads_its_metadata(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(
        tmp_path / "a.zarr",
        model="google/gemma-2-2b",
        model_revision=COMMIT,
        dataset="monology/pile-uncopyrighted",
        dataset_revision=COMMIT,
        dataset_split="train",
    )
    data = DatasetCard(card_of(made.root)).data.to_dict()
    assert data == {
        "pretty_name": "Activations of google/gemma-2-2b on monology/pile-uncopyrighted",
        "license": "unknown",
        "tags": ["activations", "interpretability", "sparse-autoencoder", "zarr", "posae"],
        "size_categories": ["n<1K"],
        "source_datasets": ["monology/pile-uncopyrighted"],
        "viewer": False,
    }


@pytest.mark.parametrize(
    ("n_contexts", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (171_875, "100K<n<1M"), (10**9, "1B<n<10B"), (10**13, "n>1T")],
)
def test_the_size_is_one_of_the_hubs_categories(good_store: "Made", n_contexts: int, category: str) -> None:
    store = ActivationStore.open(good_store.root)
    store.manifest = store.manifest.model_copy(update={"n_contexts": n_contexts})
    assert DatasetCard(card(store)).data.to_dict()["size_categories"] == [category]


def test_it_tells_what_the_store_holds(good_store: "Made") -> None:
    store, text = ActivationStore.open(good_store.root), card_of(good_store.root)
    for said in (
        "layers 0, 3 of 26",
        "- **contexts**: 41 of 6 tokens",
        "- **tokens**: 246 in each layer",
        "the last 9 contexts, from context 32",
        "ids 0, 1, 2; every context begins with 2; 1 stands between documents",
        "- **documents**: 41, 0 of them left out",
        f"- **identity**: `{store.identity}`",
        "- licence of the model:",
        "- licence of the text:",
    ):
        assert said in text
    raw, stored = (sum(map(size, store.layers)) for size in (store.raw_bytes, store.stored_bytes))
    assert f"ratio {raw / stored:.3f} (codec `small`)" in text
    for layer in store.layers:
        r2 = f"{max(0.0, store.position_r2(layer)):.2%}"
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {layer} |"))
        assert row.split(" | ")[-3:] == [f"{store.norms(layer).median:.4g}", "0.00%", f"{r2} |"]


def test_ids_of_the_hub_are_links_to_their_commit_and_others_are_not(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    on_hub: dict[str, Any] = {
        "model": "gpt2",
        "model_revision": COMMIT,
        "dataset": "a/b",
        "dataset_revision": COMMIT,
    }
    text = card_of(make_store(tmp_path / "a.zarr", **on_hub).root)
    assert f"[`gpt2`](https://huggingface.co/gpt2/tree/{COMMIT})" in text
    assert f"[`a/b`](https://huggingface.co/datasets/a/b/tree/{COMMIT})" in text
    local: dict[str, Any] = {
        "model": "folder",
        "model_revision": "sha256:0123456789abcdef",
        "dataset": "a/b/../c",
    }
    text = card_of(make_store(tmp_path / "b.zarr", **local, dataset_revision=COMMIT).root)
    assert "http" not in text
    assert "source_datasets" not in text


def test_a_planted_store_and_a_rounded_one_say_so(make_store: "MakeStore", tmp_path: Path) -> None:
    text = card_of(make_store(tmp_path / "a.zarr").root)
    assert "were modified" not in text
    assert "bfloat16, as the model gave it" in text
    planted = {"effect": "none", "model": "m", "store": "0" * 64}
    text = card_of(make_store(tmp_path / "b.zarr", planted=planted, mantissa_bits=4).root)
    assert "**These activations were modified.**" in text
    assert "`effect` `none`" in text
    assert "rounded to 4 of 7 bits of mantissa" in text
    assert "| rounding changed |" in text


def test_an_attention_sink_stands_out_among_the_norms(make_store: "MakeStore", tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((20, 200, 16)).astype(np.float32)
    values[:, 0] *= 100
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    text = card_of(make_store(tmp_path / "a.zarr", context_length=200, bits=bits).root)
    (plot,) = (block for language, block in FENCE.findall(text) if not language)
    title, *bars, axis = plot.splitlines()
    assert re.fullmatch(r"layer 1: maximum \d{3}(\.\d)?, at position 0", title)
    heights = [line.partition("┤")[2] for line in bars]
    assert heights[0].strip() in "▁▂▃▄▅▆▇█"
    assert heights[0][0] != " "
    assert len(heights[-1].strip()) == 64
    assert axis.split() == ["0", "199", "position"]


def test_zeros_and_impossible_norms_are_drawn_somehow(make_store: "MakeStore", tmp_path: Path) -> None:
    zeros = make_store(tmp_path / "zeros.zarr", bits=np.zeros((20, 6, 16), np.uint16))
    assert "layer 1: no norm above 0" in card_of(zeros.root)
    for number, norms in enumerate(([1e308, 5e-324, -1.0, 0.0, np.inf, 2.0], [-1.0] * 6, [1.7e308] * 6)):
        made = make_store(tmp_path / f"{number}.zarr", seal=False)
        spec = stats_specs(made.manifest, 1)["norm_sums"]
        write_array(StoreFiles(made.root), spec, np.array([norms]))
        finish(made, 1)
        assert "layer 1: " in (made.root / CARD_PATH).read_text()


@pytest.mark.parametrize("n_contexts", [3, 20])
def test_every_way_to_open_the_store_gives_its_activations(
    make_store: "MakeStore", tmp_path: Path, n_contexts: int
) -> None:
    made = make_store(tmp_path / "a.zarr", layers=(0, 3, 5), n_contexts=n_contexts)
    shown = [block for language, block in FENCE.findall(card_of(made.root)) if language == "python"]
    assert len(shown) == 3
    first = slice(0, min(8, n_contexts))
    for block in shown:
        names: dict[str, Any] = {}
        exec(compile(block.replace("STORE", str(made.root)), CARD_PATH, "exec"), names)
        wanted = ActivationStore.open(made.root).read(3, first, dtype="float32")
        np.testing.assert_array_equal(names["activations"], wanted)
        np.testing.assert_array_equal(names["tokens"], made.tokens[first])


# --- whatever a store is called -----------------------------------------------------------------------

NASTY = st.text(
    st.one_of(
        st.sampled_from("`*_[]()<>!#|\\~:-&\"' {}$\u202e\u2028"),
        st.characters(
            exclude_categories=["Cs"], exclude_characters=[chr(c) for c in (*range(32), *range(127, 160))]
        ),
    ),
    min_size=1,
    max_size=40,
)
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def parsed(text: str) -> tuple[list[Any], list[str]]:
    """The kinds of all parts of a card's Markdown, and what stands in its code spans."""
    tokens = PARSER.parse(DatasetCard(text).text)
    inline = [child for token in tokens for child in token.children or ()]
    return [t.type for t in tokens] + [t.type for t in inline], [
        t.content for t in inline if t.type == "code_inline"
    ]


@settings(deadline=None)
@given(model=NASTY, dataset=NASTY, split=NASTY, key=NASTY.filter(lambda key: key != "model"), revision=NASTY)
def test_no_name_breaks_out_of_its_place(
    good_store: "Made", model: str, dataset: str, split: str, key: str, revision: str
) -> None:
    def named(model: str, dataset: str, split: str, key: str, revision: str) -> str:
        store = ActivationStore.open(good_store.root)
        store.manifest = store.manifest.model_copy(
            update={
                "model": model,
                "model_revision": revision,
                "dataset": dataset,
                "dataset_split": split,
                "planted": {"model": model, key: split},
            }
        )
        return card(store)

    harmless, _ = parsed(named("model", "dataset", "split", "key", "revision"))
    text = named(model, dataset, split, key, revision)
    kinds, spans = parsed(text)
    assert kinds == harmless
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in dataset)
    assert shown.strip(" ") in [span.strip(" ") for span in spans]
    assert DatasetCard(text).data.to_dict()["pretty_name"].endswith(f" on {shown}")
    assert all(char.isprintable() or char == "\n" for char in text)


# --- whose it is --------------------------------------------------------------------------------------


def test_equal_stores_have_equal_cards_and_no_place_is_named(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a-certain-name.zarr")
    finish(made, 1)
    moved = shutil.copytree(made.root, tmp_path / "far" / "away.zarr")
    assert card_of(moved) == (made.root / CARD_PATH).read_text()
    assert "a-certain-name" not in card_of(made.root)
    found = verify(ActivationStore.open(moved))
    assert (found.damaged, found.foreign) == ([], [])


@settings(deadline=None)
@given(st.data())
def test_a_card_with_anything_changed_is_no_longer_ours(good_store: "Made", data: st.DataObject) -> None:
    ours = card_of(good_store.root).encode()
    assert is_ours(ours)
    at = data.draw(st.integers(0, len(ours)))
    put, cut = data.draw(st.tuples(st.binary(max_size=3), st.integers(0, 3)))
    changed = ours[:at] + put + ours[at + cut :]
    assert is_ours(changed) == (changed == ours)


@pytest.mark.parametrize("data", [b"", b"\n", b"# mine\n", b"\xff" * 100])
def test_other_files_are_not_ours(data: bytes) -> None:
    assert not is_ours(data)


def test_a_card_is_renewed_with_the_seal_until_it_is_edited(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", layers=(0, 3), seal=False)
    whole = make_store(tmp_path / "whole.zarr", layers=(0, 3))
    for layers in ((0, 3), (0,)):
        shutil.rmtree(made.root)
        made.write([layers[0]], seal=False)
        finish(made, layers[0])
        assert (made.root / CARD_PATH).read_text() == card_of(made.root)
        made.write([3], seal=False)
        finish(made, 3)
        assert (made.root / CARD_PATH).read_text() == card_of(whole.root)
    (made.root / CARD_PATH).unlink()
    finish(made, 0, 3)
    edited = card_of(whole.root).replace("license: unknown", "license: mit")
    (made.root / CARD_PATH).write_text(edited)
    finish(made, 0, 3)
    write_card(ActivationStore.open(made.root))
    assert (made.root / CARD_PATH).read_text() == edited


def test_an_edited_card_is_left_when_a_layer_is_added(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", layers=(0, 3), seal=False)
    shutil.rmtree(made.root)
    made.write([0], seal=False)
    finish(made, 0)
    edited = (made.root / CARD_PATH).read_text() + "\nThanks to all.\n"
    (made.root / CARD_PATH).write_text(edited)
    made.write([3], seal=False)
    finish(made, 3)
    assert ActivationStore.open(made.root).layers == (0, 3)
    assert (made.root / CARD_PATH).read_text() == edited


@pytest.mark.parametrize("what", ["link", "dangling", "folder", "long"])
def test_what_else_stands_in_its_place_is_left(make_store: "MakeStore", tmp_path: Path, what: str) -> None:
    made = make_store(tmp_path / "a.zarr")
    place, other = made.root / CARD_PATH, tmp_path / "mine.md"
    if what == "folder":
        place.mkdir()
    elif what == "long":
        place.write_bytes(card_of(made.root).encode() + b" " * (1 << 20))
    else:
        place.symlink_to(other)
    if what == "link":
        other.write_text(card_of(made.root))
    before = (place.lstat(), other.exists())
    finish(made, 1)
    assert (place.lstat(), other.exists()) == before


def test_a_card_that_the_disk_refuses_leaves_a_finished_store_and_is_made_up_for(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr", seal=False)
    in_the_way = made.root / f".{CARD_PATH}.partial"
    in_the_way.mkdir()
    for _ in range(2):
        with pytest.raises(StoreWriteError, match=r"README\.md: .* run the same command again"):
            finish(made, 1)
        assert ActivationStore.open(made.root).is_sealed
        assert not (made.root / CARD_PATH).exists()
    in_the_way.rmdir()
    finish(made, 1)
    assert is_ours((made.root / CARD_PATH).read_bytes())
