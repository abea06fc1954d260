"""Figures of runs as Plotly's JSON, {"data": …, "layout": …}; the browser draws them.

Labels come from folders and settings. Plotly interprets some HTML tags in text, so they are escaped. A line
has at most ``MAX_POINTS`` points, evenly spaced, the last one included.
"""

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..measured import Line
from ..tables import Series

MAX_POINTS = 400

Figure = dict[str, Any]

_AXIS = {
    "gridcolor": "#e6e6e6",
    "zeroline": False,
    "automargin": True,
    "linecolor": "#999999",
    "ticks": "outside",
}
_LAYOUT = {
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
    "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
    "height": 420,
    "hovermode": "closest",
    "legend": {"font": {"size": 11}},
    "showlegend": True,
}

# Okabe and Ito's palette, which the colour-blind can distinguish, and grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")
_DASHES = ("solid", "dash", "dot", "dashdot")


def over_steps(series: Sequence[Series], name: str, title: str) -> Figure | None:
    """One key of ``metrics.jsonl`` over steps, for the first seed of each series, with the phases.

    With the loss, Figure 1a of the paper. Controls are hidden until they are clicked in the legend.
    """
    lines = [
        _line(series, one, [(line.step, line.value) for line in _thinned(steps)])
        for one in series
        if (steps := one.runs[0].steps(name))
    ]
    if not lines:
        return None
    axis = {**_AXIS, "title": {"text": title}, "type": "log", "exponentformat": "power"}
    return _figure(lines, {"text": "step"}, axis, phases(series))


def schedules(series: Sequence[Series]) -> Figure | None:
    """Learning rate, λ and alpha over steps, one below the other: Figure 1b of the paper."""
    rows = (("learning_rate", "learning rate"), ("l1_coefficient", "λ"), ("alpha", "alpha"))
    data: list[dict[str, Any]] = []
    for number, (name, _) in enumerate(rows):
        drawn_lines: set[tuple[Line, ...]] = set()
        for one in series:
            steps = tuple(_thinned(one.runs[0].steps(name)))
            if one.is_control or not steps or steps in drawn_lines:
                continue
            drawn_lines.add(steps)
            line = _line(series, one, [(step.step, step.value) for step in steps])
            data.append(
                line
                | {
                    "yaxis": "y" if number == 0 else f"y{number + 1}",
                    "legendgroup": one.label,
                    "showlegend": number == 0,
                }
            )
    if not data:
        return None
    figure = _figure(data, {"text": "step"}, {}, phases(series))
    for number, (_, title) in enumerate(rows):
        key = "yaxis" if number == 0 else f"yaxis{number + 1}"
        domain = [0.7 - 0.35 * number, 1.0 - 0.35 * number]
        figure["layout"][key] = {**_AXIS, "title": {"text": title}, "domain": domain, "rangemode": "tozero"}
    figure["layout"]["xaxis"] |= {"anchor": "y3"}
    return figure


def phases(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Shapes from where alpha leaves 0 to where it reaches 1, of the first series with a curriculum."""
    for one in series:
        run = one.runs[0]
        warmup, ramp, alpha = run.setting("warmup_steps"), run.setting("ramp_steps"), run.steps("alpha")
        moves = len({line.value for line in alpha}) > 1
        if not one.is_control and moves and isinstance(warmup, int) and isinstance(ramp, int):
            last = alpha[-1].step
            ends = [
                (0, warmup, "base alone"),
                (warmup, warmup + ramp, "alpha rises"),
                (warmup + ramp, last, "alpha 1"),
            ]
            return [_phase(a, b, text, grey) for grey, (a, b, text) in enumerate(ends) if a < b]
    return []


def _phase(start: int, stop: int, text: str, grey: int) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": start,
        "x1": stop,
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"width": 0},
        "fillcolor": ("#f0f0f0", "#fafafa", "#f0f0f0")[grey],
        "label": {"text": text, "textposition": "top left", "font": {"size": 11, "color": "#777777"}},
    }


def fvu_by_position(series: Sequence[Series]) -> Figure | None:
    """FVU at each position, mean over seeds."""
    means = [(one, one.list_mean("fvu_by_position")) for one in series]
    lines = [
        _line(series, one, enumerate(values)) for one, values in means if any(v is not None for v in values)
    ]
    if not lines:
        return None
    return _figure(lines, {"text": "position"}, {**_AXIS, "title": {"text": "FVU"}, "rangemode": "tozero"})


def densities(series: Sequence[Series]) -> Figure | None:
    """Histogram of features by the share of tokens on which they fire, for the first seed of each series."""
    lines: list[dict[str, Any]] = []
    for one in series:
        edges = one.runs[0].series("density_histogram", "edges")
        counts = one.runs[0].series("density_histogram", "counts")
        shares = [10**edge for edge in edges if edge is not None]
        if counts and len(shares) == len(edges) == len(counts) + 1:
            steps = list(zip(shares, [*counts, counts[-1]], strict=True))
            lines.append(_line(series, one, steps) | {"line": {**_look(series, one), "shape": "hv"}})
    if not lines:
        return None
    about = {"text": "share of tokens on which a feature fires", "type": "log"}
    return _figure(lines, about, {**_AXIS, "title": {"text": "features"}, "rangemode": "tozero"})


def trade_off(series: Sequence[Series]) -> Figure | None:
    """Interpretability against specialisation, for groups of features."""
    lines: list[dict[str, Any]] = []
    for one in series:
        x, y = (
            one.runs[0].series("specificity", "curve", name)
            for name in ("specialisation", "interpretability")
        )
        if x and len(x) == len(y):
            lines.append(_line(series, one, zip(x, y, strict=True)) | {"mode": "lines+markers"})
    if not lines:
        return None
    x_title = {"text": "specialisation: bits about the position range per firing, above chance"}
    y_title = "interpretability: purity of top tokens"
    return _figure(lines, x_title, {**_AXIS, "title": {"text": y_title}})


def _thinned(steps: Sequence[Line]) -> list[Line]:
    stride = -(-len(steps) // MAX_POINTS) or 1
    return [line for number, line in enumerate(reversed(steps)) if number % stride == 0][::-1]


def _line(series: Sequence[Series], one: Series, points: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": html.escape(one.label),
        "x": list(xs),
        "y": list(ys),
        "line": _look(series, one),
        "visible": "legendonly" if one.is_control else True,
    }


def _look(series: Sequence[Series], one: Series) -> dict[str, str]:
    """Colour and dashes of a series, the same in all figures."""
    number = [other.label for other in series].index(one.label)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _figure(
    data: list[dict[str, Any]],
    x: dict[str, str],
    y: dict[str, Any],
    shapes: list[dict[str, Any]] | None = None,
) -> Figure:
    x_axis = {**_AXIS, "title": {"text": x["text"]}, "type": x.get("type", "linear")}
    return {"data": data, "layout": {**_LAYOUT, "xaxis": x_axis, "yaxis": y, "shapes": shapes or []}}


Draw = Callable[[Sequence[Series]], Figure | None]


FIGURES: tuple[tuple[str, str, Draw], ...] = (
    (
        "Figure 1a: loss over steps",
        "Penalties differ: compare shapes, not levels. Click a control in the legend to show it.",
        lambda series: over_steps(series, "loss", "loss of a training batch"),
    ),
    (
        "FVU over steps",
        "Of one training batch each; comparable only at equal L0.",
        lambda series: over_steps(series, "fvu", "FVU of a training batch"),
    ),
    (
        "Figure 1b: learning rate, sparsity penalty λ and alpha over steps",
        "Schedules that were logged alike are drawn once.",
        schedules,
    ),
    ("FVU by position", "On the contexts scored, mean over seeds.", fvu_by_position),
    ("Density of features", "On the contexts scored, first seed of each.", densities),
    (
        "Interpretability and specialisation",
        "Features sorted by specialisation in positions, in groups of equal size.",
        trade_off,
    ),
)
"""Title, caption, and function."""


def drawn(series: Sequence[Series]) -> list[tuple[str, str, Figure]]:
    """All figures that have data."""
    return [(title, about, figure) for title, about, draw in FIGURES if (figure := draw(series)) is not None]
