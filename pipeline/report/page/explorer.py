"""The feature explorer of a page: an HTML frame, each run's features as JSON, and ``explorer.js``.

Text of a store is escaped as HTML here, or written as JSON in which ``<``, ``>`` and ``&`` are escapes, so
that it cannot end its block; the script inserts it as text, never as HTML.

Size: about 2 kB per feature at 128 positions, one byte in base64 per position of its excerpts, and 5 bytes
per token of a context that is shown.
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
<output name="matches"></output>
</form>
<p class="about"></p>
<div class="panes">
<div class="list"><table><thead></thead><tbody></tbody></table><div class="pager"></div></div>
<div class="feature" aria-live="polite"></div>
</div>
<noscript><p>The explorer needs JavaScript; the script is part of this page.</p></noscript>
</div>
"""


def style() -> str:
    """CSS for the explorer."""
    return (_HERE / "explorer.css").read_text(encoding="utf-8")


def explorer(runs: Sequence[Explored | Unexplored]) -> str:
    """The explorer's HTML, with its script and data, without the style."""
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
    """The data of one run, for the script."""
    ids = sorted({int(token) for row in run.tokens.values() for token in row})
    index_of = {token: index for index, token in enumerate(ids)}
    data = {
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
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In JSON these three occur only in strings, where an escape means the same.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate cannot be encoded.
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
    """Rounded to four digits, for display.

    >>> _short(0.123456)
    0.1235
    """
    return float(f"{value:.4g}")


def _all_short(values: Sequence[float]) -> list[float]:
    return [_short(value) for value in values]
