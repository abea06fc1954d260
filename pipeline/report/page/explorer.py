"""The feature explorer of a page: a frame in HTML, each run's features as JSON, and ``explorer.js``.

Words reach the page in two ways: escaped as HTML here, or as JSON in which ``<``, ``>`` and ``&`` are written
as escapes, so that no text of a store can end the block that it stands in; the script puts them into the page
as text, never as HTML.

Cost: of a page about 2 kB to each feature and 128 positions, base64 of one byte to each position of its
excerpts, and 5 bytes to each token of a context that is shown.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .explored import Explored, ExploredFeature, Unexplored

_HERE = Path(__file__).parent

_FRAME = """
<div class="explorer" id="explorer">
<form class="controls">
<label>run <select name="run">{options}</select></label>
<label>token <input type="search" name="token" placeholder="text, or #12 for a feature" size="26"></label>
<label><input type="checkbox" name="whole"> whole contexts</label>
<output name="told"></output>
</form>
<p class="about"></p>
<div class="panes">
<div class="list"><table><thead></thead><tbody></tbody></table><div class="pager"></div></div>
<div class="feature" aria-live="polite"></div>
</div>
<noscript><p>The explorer needs JavaScript, from this page alone.</p></noscript>
</div>
"""


def style() -> str:
    """CSS for the explorer."""
    return (_HERE / "explorer.css").read_text(encoding="utf-8")


def explorer(runs: Sequence[Explored | Unexplored]) -> str:
    """The explorer's HTML, with all that it needs but the style."""
    missing = "".join(
        f'<p class="about"><b>{html.escape(run.label)}</b> has no explorer: {html.escape(run.reason)}</p>\n'
        for run in runs
        if isinstance(run, Unexplored)
    )
    explored = [run for run in runs if isinstance(run, Explored)]
    if not explored:
        return missing
    options = "".join(
        f'<option value="{number}" title="{html.escape(run.folder)}">{html.escape(run.label)}</option>'
        for number, run in enumerate(explored)
    )
    blocks = "".join(
        f'<script type="application/json" class="explored">{_as_json(run)}</script>\n' for run in explored
    )
    script = (_HERE / "explorer.js").read_text(encoding="utf-8")
    return f"{missing}{_FRAME.format(options=options)}{blocks}<script>\n{script}</script>\n"


def _as_json(run: Explored) -> str:
    """All of a run that the script reads; it names no key that is not here."""
    ids = sorted({int(token) for row in run.tokens.values() for token in row})
    index_of = {token: index for index, token in enumerate(ids)}
    found = {
        "label": run.label,
        "folder": run.folder,
        "layer": run.layer,
        "contexts": run.contexts,
        "nTokens": run.n_tokens,
        "length": run.context_length,
        "ranges": run.ranges,
        "nFeatures": run.dictionary_size,
        "nFired": run.n_fired,
        "note": run.note,
        "ids": ids,
        "texts": [f"[{token}]" if run.texts is None else run.texts[token] for token in ids],
        "tokens": {context: [index_of[int(token)] for token in row] for context, row in run.tokens.items()},
        "features": [_feature(feature) for feature in run.features],
    }
    text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In JSON these three stand only inside strings, where an escape says the same.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate is no text that a file can hold.
    return text.encode(errors="replace").decode()


def _feature(feature: ExploredFeature) -> dict[str, Any]:
    return {
        "number": feature.number,
        "density": _short(feature.density),
        "specificity": _short(feature.specificity),
        "isAboveChance": feature.is_above_chance,
        "specialisation": _short(feature.specialisation),
        "densityByPosition": _all_short(feature.density_by_position),
        "meanByPosition": _all_short(feature.mean_by_position),
        "densityByRange": _all_short(feature.density_by_range),
        "meanByRange": _all_short(feature.mean_by_range),
        "baseByRange": None if feature.base_by_range is None else _all_short(feature.base_by_range),
        "decoderByRange": None if feature.decoder_by_range is None else _all_short(feature.decoder_by_range),
        "neighbours": [[number, round(cosine, 3)] for number, cosine in feature.neighbours],
        "excerpts": [
            [
                excerpt.context,
                _short(excerpt.peak),
                excerpt.position,
                base64.b64encode(excerpt.levels.tobytes()).decode(),
            ]
            for excerpt in feature.excerpts
        ],
    }


def _short(value: float) -> float:
    """Four digits: what a page can show.

    >>> _short(0.123456)
    0.1235
    """
    return float(f"{value:.4g}")


def _all_short(values: Sequence[float]) -> list[float]:
    return [_short(value) for value in values]
