"""The building blocks of the report's page, as HTML strings."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mvjax.evaluation.statistics import SuccessRate


def section(title: str, body: str) -> str:
    """A titled box."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def missing(text: str) -> str:
    """The line that stands where something is not there yet."""
    return f'<p class="missing">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways where the screen is narrow; `head` is plain text."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def row(name: str, cells: Sequence[str], kind: str = "") -> str:
    """A table row; `name` is plain text, `cells` are HTML."""
    drawn = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{drawn}</tr>'


def rate_cell(rate: SuccessRate | None) -> str:
    """A success rate with its bar, episodes and interval."""
    if rate is None:
        return "–"
    below = f"<small>{rate.successes}/{rate.trials} · {interval(rate)}</small>"
    return bar(rate.rate, percent(rate.rate)) + below


def bar(fraction: float, text: str) -> str:
    """Text over a bar that is filled to `fraction`."""
    return f'{escape(text)}<span class="bar"><i style="width:{100 * fraction:.1f}%"></i></span>'


def video(path: Path) -> str:
    """A silent looping video, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal where it is not whole."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"


def interval(rate: SuccessRate) -> str:
    """The Wilson interval in whole percent."""
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f} %"


def count(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(megabytes: float | None) -> str:
    """Memory in gigabytes from one gigabyte on."""
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"
