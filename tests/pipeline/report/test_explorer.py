"""The feature explorer of a page, used in a real browser: hostile text, thousands of features."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posae.pipeline.report.page.explored import Excerpt, Explored, ExploredFeature, Unexplored
from posae.pipeline.report.page.page import page

if TYPE_CHECKING:
    from ..conftest import OpenPage

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
LENGTH, N_FEATURES = 32, 3000
WORDS = ["<bos>", " the", HOSTILE, "\n", " cat", "<!--", "\ud800", "\u202e", "café"]
CAT, HOSTILE_TOKEN = 4, 2


def explored(label: str = "first", n_features: int = N_FEATURES, **values: Any) -> Explored:
    """Feature n is largest on token n mod 9 at position 3 + n mod 20, rarer and more specific with n."""
    rng = np.random.default_rng(0)
    tokens = {context: np.full(LENGTH, 1, np.int32) for context in range(n_features)}
    features: list[ExploredFeature] = []
    for n in range(n_features):
        levels = np.zeros(LENGTH, np.int8)
        position = 3 + n % 20
        levels[position], levels[position + 1] = -127, 30
        tokens[n][position] = n % len(WORDS)
        few = (1 / (n + 1),) * 4
        features.append(
            ExploredFeature(
                number=2 * n,
                density=1 / (n + 1),
                specificity=n / 1e5,
                is_above_chance=bool(n % 2),
                specialisation=float(rng.random()),
                density_by_position=few * 8,
                mean_by_position=few * 8,
                density_by_range=few,
                mean_by_range=(1.0, 2.0, -3.0, 0.0),
                base_by_range=(0.5, 2.5, -3.0, 0.0),
                decoder_by_range=(1.0, 0.875, 0.5, -0.25),
                neighbours=((2 * n + 2, 0.75), (2 * n + 1, -0.5)),
                excerpts=(Excerpt(n, -2.5, position, levels),),
            )
        )
    found: dict[str, Any] = {
        "label": label,
        "folder": f"runs/{label}",
        "layer": 12,
        "contexts": (100, 140),
        "n_tokens": 1200,
        "context_length": LENGTH,
        "ranges": [(0, 8), (8, 16), (16, 24), (24, 32)],
        "dictionary_size": 8000,
        "n_fired": 7000,
        "features": features,
        "tokens": tokens,
        "texts": dict(enumerate(WORDS)),
    }
    return Explored(**found | values)


SCRIPT = """
const seen = {};
const one = (what) => document.querySelector(".explorer " + what);
const all = (what) => [...document.querySelectorAll(".explorer " + what)];
const listed = () => all(".list tbody tr").map((row) => Number(row.dataset.feature));
const click = (what) => one(what).click();
const type = (text) => {
  one("[name=token]").value = text;
  one("[name=token]").dispatchEvent(new Event("input"));
};
%s
const told = document.createElement("pre");
told.id = "seen";
told.textContent = JSON.stringify(seen);
document.body.append(told);
"""


def used(open_page: "OpenPage", folder: Path, text: str, script: str) -> dict[str, Any]:
    """What a script sees that uses a page as a reader would."""
    file = folder / "page.html"
    file.write_text(text.replace("</body>", f"<script>{SCRIPT % script}</script></body>"))
    opened = open_page(file)
    assert opened.console == []
    assert "<title>posae report</title>" in opened.dom  # what is hostile did not run
    found = re.search('<pre id="seen">(.*?)</pre>', opened.dom, re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


def test_thousands_of_features_are_sorted_searched_and_paged_by_click(
    open_page: "OpenPage", tmp_path: Path
) -> None:
    script = """
    seen.first = listed(); seen.shown = one("h3").textContent; seen.elements = all("*").length;
    click(".pager button:last-child"); seen.second = listed()[0];
    click(".list th:nth-child(2) button"); seen.densest = listed().slice(0, 3);
    click(".list th:nth-child(2) button"); seen.rarest = listed().slice(0, 3);
    click(".list tbody tr:nth-child(2)"); seen.chosen = one("h3").textContent;
    seen.facts = one(".facts").textContent;
    click(".neighbours button"); seen.neighbour = one("h3").textContent;
    seen.unlisted = all(".neighbours span").map((span) => span.textContent);
    type(" CAT"); seen.cats = one("[name=matches]").value; seen.cat = listed();
    seen.peaks = all(".peak").map((token) => token.textContent);
    type("#77"); seen.none = [listed(), one(".feature").textContent, one(".pager").textContent];
    type("#8000"); seen.beyond = one(".pager span").textContent;
    type("nowhere"); seen.nowhere = one(".pager span").textContent;
    type("#78"); seen.number = listed();
    type(""); seen.all = one(".pager span").textContent;
    """
    seen = used(open_page, tmp_path, page([], [], [], [explored()]), script)
    last = 2 * (N_FEATURES - 1)
    # The most specific come first; of all that are there a page of them is made.
    assert seen["first"] == [last - 2 * n for n in range(40)]
    assert seen["shown"] == f"feature {last}"
    assert seen["elements"] < 1500
    assert seen["second"] == last - 80
    assert seen["densest"] == [0, 2, 4]
    assert seen["rarest"] == [last, last - 2, last - 4]
    assert seen["chosen"] == f"feature {last - 2}"
    assert "specificity 0.0300 bits, not above chance" in seen["facts"]
    assert seen["neighbour"] == f"feature {last}"
    assert seen["unlisted"] == [f"{last + 2} (0.75)", f"{last + 1} (-0.50)"]
    n_cats = len([n for n in range(N_FEATURES) if n % len(WORDS) == CAT])
    assert seen["cats"].startswith(f"{n_cats} of {N_FEATURES} features")
    assert all(number // 2 % len(WORDS) == CAT for number in seen["cat"])
    assert seen["peaks"] == [" cat"]
    assert seen["none"][:2] == [[], ""]
    assert f"#77 is not among the {N_FEATURES:,} features shown" in seen["none"][2]
    assert seen["beyond"] == "no feature #8000: the run has 8,000"
    assert seen["nowhere"] == "no feature matches"
    assert seen["number"] == [78]
    assert seen["all"].endswith(f"1-40 of {N_FEATURES}")


def test_words_of_a_store_are_shown_and_never_run(open_page: "OpenPage", tmp_path: Path) -> None:
    hostile = explored(HOSTILE, 20, folder=HOSTILE, note=HOSTILE)
    missing = Unexplored(HOSTILE, HOSTILE, HOSTILE)
    text = page([], [], [], [hostile, missing])
    block = text.partition('class="explored">')[2].partition("</script>")[0]
    assert not {"<", ">", "&"} & set(block)
    json.loads(block)
    script = """
    type("<script>"); seen.found = listed(); seen.peak = one(".peak").textContent;
    seen.about = one(".about").textContent; seen.images = document.images.length;
    seen.option = one("option").textContent; seen.list = one(".tokens").textContent;
    """
    seen = used(open_page, tmp_path, text, script)
    assert seen["found"] == [2 * n for n in reversed(range(20)) if n % len(WORDS) == HOSTILE_TOKEN]
    assert seen["peak"] == HOSTILE
    assert HOSTILE in seen["about"]
    assert (seen["option"], seen["list"]) == (HOSTILE, HOSTILE)
    assert seen["images"] == 0


def test_a_feature_shows_what_its_run_says_of_it(open_page: "OpenPage", tmp_path: Path) -> None:
    script = """
    const rows = () => all(".ranges tr").map((row) => [...row.children].map((cell) => cell.textContent));
    type("#8"); seen.rows = rows(); seen.where = one(".where").textContent;
    seen.text = one(".text").textContent;
    seen.hint = one(".peak").title; seen.colours = all(".text span").map((token) => token.style.background);
    seen.about = one(".about").textContent;
    click("[name=whole]"); seen.whole = all(".text span").length;
    type(""); one("[name=run]").value = "1"; one("[name=run]").dispatchEvent(new Event("change"));
    seen.other = [listed(), one(".about").textContent, rows().map((row) => row[0])];
    one(".list tbody tr").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
    seen.below = one("h3").textContent;
    """
    few = explored("second", 3, n_fired=3, texts=None, note="no tokenizer")
    plain = [replace(feature, base_by_range=None, decoder_by_range=None) for feature in few.features]
    few = replace(few, features=plain)
    seen = used(open_page, tmp_path, page([], [], [], [explored(n_features=200), few]), script)
    assert seen["rows"] == [
        ["positions", "0:8", "8:16", "16:24", "24:32"],
        ["density", "20 %", "20 %", "20 %", "20 %"],
        ["mean activation", "1.00", "2.00", "-3.00", "0"],
        ["without adapter", "0.500", "2.50", "-3.00", "0"],
        ["added by the adapter", "+0.500", "-0.500", "0", "0"],
        ["cosine of adapted direction", "1.000", "0.875", "0.500", "-0.250"],
    ]
    assert seen["where"].startswith("-2.50 at 7")
    assert " cat" in seen["text"]
    assert seen["hint"] == "position 7, token 4: -2.50"
    blue, orange = ("rgba(0, 114, 178, 0.85)", "rgba(213, 94, 0, 0.2")
    assert seen["colours"][7] == blue
    assert seen["colours"][8].startswith(orange)
    assert not any(seen["colours"][:7])
    assert "runs/first, layer 12. Of 8,000 features 7,000 fired on 1,200 ordinary tokens" in seen["about"]
    assert "half have the largest specificity" in seen["about"]
    assert seen["whole"] == LENGTH
    listed, about, names = seen["other"]
    assert listed == [4, 2, 0]
    assert "this page shows all of them. Token ids are shown instead of text: no tokenizer." in about
    assert names == ["positions", "density", "mean activation"]
    assert seen["below"] == "feature 2"


def test_without_any_run_to_explore_a_page_says_why(tmp_path: Path) -> None:
    text = page([], [], [], [Unexplored("a", "runs/a", "there is no store at nowhere.zarr")])
    assert "<b>a</b> has no explorer: there is no store at nowhere.zarr" in text
    assert 'class="explored"' not in text
    assert "Feature explorer" not in page([], [], [])
