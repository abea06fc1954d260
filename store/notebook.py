"""What a notebook shows of a store or a run: a heading and tables in HTML, without styles of its own.

Every string is escaped: stores and runs come from strangers. Costs next to nothing.
"""

from collections.abc import Mapping, Sequence
from html import escape

_LEFT = ' style="text-align:left"'


def block(title: str, *parts: str) -> str:
    """A heading, and below it parts that ``facts``, ``columns`` or ``folded`` made.

    >>> block("runs/<a>")
    '<div><strong>runs/&lt;a&gt;</strong></div>'
    """
    return f"<div><strong>{escape(title)}</strong>{''.join(parts)}</div>"


def facts(told: Mapping[str, str]) -> str:
    """A table of names and what is told of them, a line each."""
    rows = (
        f"<tr><th{_LEFT}>{escape(name)}</th><td{_LEFT}>{escape(text)}</td></tr>"
        for name, text in told.items()
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; numbers stand at the right, as notebooks put them."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(title: str, part: str) -> str:
    """A part that a click unfolds."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"
