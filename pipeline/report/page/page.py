"""A report as one self-contained HTML file: tables, verdicts, figures drawn by Plotly, features.

Plotly is embedded, so the page has about 5 MB and opens without a network; its content security policy
forbids the browser to fetch anything. All text is escaped; in the JSON of figures, ``<`` and ``/`` are.
"""

import html
from collections.abc import Iterable, Sequence

from plotly.io import to_html  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from ..notes import Note
from ..provenance import Provenance
from ..provenance import section as provenance_section
from ..tables import COLOURS, Series, Table
from .explored import Explored, Unexplored
from .explorer import explorer
from .explorer import style as explorer_style
from .figures import Figure, drawn

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)

# By default Plotly offers to upload a figure's data to its makers.
_CONFIG = {"displaylogo": False, "responsive": True, "plotlyServerURL": "", "showSendToCloud": False}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0
1rem; } h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; } p.about { color: #666;
margin: 0 0 .6rem; } nav a { margin-right: 1rem; } a { color: #0072b2; } .wide { overflow-x: auto; } table {
border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { text-align: left; vertical-align:
top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; } th { border-bottom: 2px solid #999;
white-space: nowrap; } .figure { text-align: right; white-space: nowrap; } .yes, .no, .unknown { white-space:
nowrap; font-weight: 600; } .yes { color: #00704f; } .no { color: #b3261e; } .unknown { color: #8a6100; }
p.note { border-left: 3px solid #8a6100; padding-left: .6rem; }
details.run { border-top: 1px solid #ddd; padding: .4rem 0; } summary { cursor: pointer; }
details h3 { font-size: .95rem; margin: .8rem 0 .2rem; } .facts { font-size: 13px; }
.facts th, .facts td { border-bottom: 1px solid #eee; } .facts th { font-weight: 400; color: #666; }
.facts td, pre.command { overflow-wrap: anywhere; }
.beside { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 2rem; }
.beside h3 { margin-top: .2rem; }
pre.command { background: #f4f4f4; padding: .5rem .8rem; white-space: pre-wrap; }
@media (max-width: 60rem) { .beside { grid-template-columns: minmax(0, 1fr); } }
@media print {
  details::details-content { content-visibility: visible; block-size: auto; }
  body { max-width: none; margin: 0; font-size: 10pt; } nav, .modebar { display: none !important; }
  section { break-inside: avoid-page; } .wide { overflow: visible; } a { color: inherit; }
}
"""

_CLASSES = {"green": "yes", "red": "no", "yellow": "unknown"}


def page(
    answers: Iterable[Table],
    series: Sequence[Series],
    measurements: Iterable[Table],
    explored: Sequence[Explored | Unexplored] = (),
    provenance: Sequence[Provenance] = (),
    notes: Iterable[Note] = (),
) -> str:
    """The page: notes and answers first, then measurements, figures, features, and provenance."""
    figures = [_figure(number, *figure) for number, figure in enumerate(drawn(series))]
    sections = [*map(_table, answers), *map(_table, measurements), *figures]
    if explored:
        sections.append(("Feature explorer", explorer(explored)))
    if provenance:
        sections.append(("Provenance", provenance_section(provenance)))
    titles = [title for title, _ in sections]
    body = "\n".join(
        f'<section id="part-{number}"><h2>{html.escape(title)}</h2>\n{inner}</section>'
        for number, (title, inner) in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>posae report</title>
<style>{_STYLE}{explorer_style() if explored else ""}</style>
</head>
<body>
<h1>posae report</h1>
{_contents(titles)}
{"".join(f'<p class="note">note: {html.escape(note.text)}</p>' for note in notes)}
{body}
</body>
</html>
"""


def _contents(titles: Iterable[str]) -> str:
    links = (f'<a href="#part-{number}">{html.escape(title)}</a>' for number, title in enumerate(titles))
    return f"<nav>{' '.join(links)}</nav>"


def _table(table: Table) -> tuple[str, str]:
    """Its title and its HTML."""
    head = "".join(_cell("th", name, number, table) for number, name in enumerate(table.columns))
    rows = "".join(
        "<tr>" + "".join(_cell("td", text, number, table) for number, text in enumerate(row)) + "</tr>\n"
        for row in table.rows
    )
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
    return table.title, f'<div class="wide"><table>{inner}</table></div>\n'


def _cell(tag: str, text: str, number: int, table: Table) -> str:
    is_answer = tag == "td" and 0 < number < table.n_left and text in COLOURS
    kind = "figure" if number >= table.n_left else _CLASSES[COLOURS[text]] if is_answer else ""
    return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{html.escape(text)}</{tag}>"


def _figure(number: int, title: str, about: str, figure: Figure) -> tuple[str, str]:
    """Its title and its HTML; the first one embeds the library."""
    drawing: str = to_html(
        figure,
        config=_CONFIG,
        include_plotlyjs=number == 0,
        full_html=False,
        div_id=f"figure-{number}",
        default_height=f"{figure['layout']['height']}px",
    )
    return title, f'<p class="about">{html.escape(about)}</p>\n{drawing}\n'
