"""An inspection as one HTML file that needs no other file, no network and no JavaScript."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from data_pipelines.inspect import Inspection, SeenEpisode, SeenStream, rate, size
from mvjax.evaluation import report
from mvjax.evaluation.report import count, missing, row, section, table

# The page's pictures: embedded JPEGs, and curves and histograms as small inline SVG.


_WIDTH, _HEIGHT = 240, 90  # of a figure, in its own units
_LEFT, _BOTTOM, _TOP = 46, 16, 8  # margins for the labels
COLOUR = "#0b62c4"


def picture(frame: np.ndarray, title: str) -> str:
    """A uint8 [h, w, 3] picture, embedded."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{data}">'


def curve(times: np.ndarray, values: np.ndarray, low: float, high: float, title: str) -> str:
    """Values [k] over seconds [k], on the axis that all episodes share; gaps where not finite."""
    high = high if high > low else low + 1.0
    end = float(times[-1]) or 1.0
    x = _LEFT + (_WIDTH - _LEFT - 4) * times / end
    y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (values - low) / (high - low))
    lines, points = [], []
    for here, there in zip(x, y):
        if np.isfinite(there):
            points.append(f"{here:.1f},{there:.1f}")
        elif points:
            lines.append(points)
            points = []
    drawn = "".join(
        f'<polyline points="{" ".join(part)}" fill="none" stroke="{COLOUR}" stroke-width="1.4"/>'
        for part in [*lines, points]
        if part
    )
    labels = _label(_LEFT - 4, _TOP + 4, f"{high:.3g}", "end")
    labels += _label(_LEFT - 4, _HEIGHT - _BOTTOM + 3, f"{low:.3g}", "end")
    labels += _label(_LEFT, _HEIGHT - 3, "0", "start")
    labels += _label(_WIDTH - 4, _HEIGHT - 3, f"{end:.3g} s", "end")
    return _svg(_axes() + drawn + labels, title)


def histogram(values: Sequence[float], unit: str, title: str, bins: int = 24) -> str:
    """How many values lie where."""
    counts, edges = np.histogram(values, bins=min(bins, max(1, len(set(values)))))
    floor, width = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT - 4) / len(counts)
    tall = (floor - _TOP) * counts / counts.max()
    bars = "".join(
        f'<rect x="{_LEFT + i * width:.2f}" y="{floor - height:.2f}" '
        f'width="{max(width - 1, 0.5):.2f}" height="{height:.2f}" fill="{COLOUR}"/>'
        for i, height in enumerate(tall)
    )
    labels = _label(_LEFT - 4, _TOP + 4, f"{counts.max():,}", "end")
    labels += _label(_LEFT - 4, _HEIGHT - _BOTTOM + 3, "0", "end")
    labels += _label(_LEFT, _HEIGHT - 3, f"{edges[0]:.4g}", "start")
    labels += _label(_WIDTH - 4, _HEIGHT - 3, f"{edges[-1]:.4g} {unit}", "end")
    return _svg(_axes() + bars + labels, title)


def _axes() -> str:
    floor = _HEIGHT - _BOTTOM
    return (
        f'<path d="M{_LEFT},{_TOP} V{floor} H{_WIDTH - 4}" fill="none" stroke="#d0d7de" '
        'stroke-width="1"/>'
    )


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="10" fill="#57606a" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(content: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg>"
    )


_INSTRUCTIONS = 50
_PROBLEMS = 500  # of a kind; a page with every one of a million would not open
_DIMENSIONS = 32  # of a stream
_CAPTION = 200  # characters
_STYLE = """<style>
.strip { display: grid; grid-template-columns: repeat(3, minmax(0, 15rem)); gap: .4rem; }
.strip img { display: block; width: 100%; border-radius: 6px; background: #000; }
.curves { display: grid; gap: .5rem 1rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
.curves svg { max-width: 20rem; }
.episode { border-top: 1px solid var(--line); padding: .9rem 0; }
.episode:first-of-type { border-top: 0; }
.bad { color: var(--bad); }
.wide { max-width: 24rem; }
summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
td:last-child { overflow-wrap: anywhere; }
.episode p { margin: .2rem 0 .6rem; }
</style>"""


def write_page(found: Inspection, out: Path) -> None:
    """Writes the page; it appears complete or not at all.

    Args:
        found: of `inspect_dataset` or `inspect_records`.
        out: the HTML file.
    """
    body = [
        _STYLE,
        _header(found),
        _problems(found),
        _cameras(found),
        _numbers(found),
        _instructions(found),
        _lengths(found),
        _samples(found),
    ]
    template = Path(report.__file__).with_name("report.html").read_text(encoding="utf-8")
    title = escape(f"Inspection of {found.title}")
    page = Template(template).substitute(title=title, body="\n".join(body))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    partial.replace(out)


def _header(found: Inspection) -> str:
    bad = len(found.problems)
    verdict = f'<span class="bad">{count(bad, "problem")}</span>' if bad else "no problems found"
    facts = table([], [row(what, [escape(value)]) for what, value in found.facts])
    return (
        f"<header><h1>{escape(Path(found.title).name or found.title)}</h1>"
        f"<p>{escape(found.title)}: {verdict}</p></header>" + section("Summary", facts)
    )


def _problems(found: Inspection) -> str:
    kinds = found.problems_by_kind()
    if not kinds:
        return section("Problems", missing("None found."))
    parts = []
    for kind, problems in kinds.items():
        rows = [row(problem.episode, [escape(problem.text)]) for problem in problems[:_PROBLEMS]]
        left = len(problems) - len(rows)
        more = missing(f"... and {left:,} more.") if left else ""
        opened = " open" if len(problems) <= 20 else ""
        parts.append(
            f"<details{opened}><summary><b>{escape(kind)}</b>: {len(problems):,}</summary>"
            f"{table(['Episode', 'What was found'], rows)}{more}</details>"
        )
    return section("Problems", "".join(parts))


def _cameras(found: Inspection) -> str:
    rows = [
        row(name, [size(stream), rate(stream), escape(stream.codec or "–")])
        for name, stream in found.streams.items()
        if stream.camera
    ]
    head = ["Camera", "Size", "Frames per second", "Codec"]
    return section("Cameras", table(head, rows)) if rows else ""


def _numbers(found: Inspection) -> str:
    streams = {name: stream for name, stream in found.streams.items() if not stream.camera}
    if not streams:
        return section("Streams of numbers", missing("None."))
    rows = [
        row(name, [str(list(s.shape)), escape(s.dtype), rate(s), _ranges(s)])
        for name, s in streams.items()
    ]
    head = ["Stream", "Shape", "Type", "Per second", "Least and greatest, per dimension"]
    return section("Streams of numbers", table(head, rows))


def _ranges(stream: SeenStream) -> str:
    if stream.low is None:
        return "–"
    drawn = [
        f"{low:.3g} … {high:.3g}"
        for low, high in zip(stream.low[:_DIMENSIONS], stream.high[:_DIMENSIONS])
    ]
    left = stream.low.size - len(drawn)
    return "<br>".join([*drawn, f"and {left} more"] if left else drawn)


def _instructions(found: Inspection) -> str:
    frequent = found.instructions.most_common(_INSTRUCTIONS)
    rows = [row(text or "(empty)", [f"{number:,}"]) for text, number in frequent]
    left = len(found.instructions) - len(rows)
    more = missing(f"... and {left:,} more.") if left else ""
    note = f"<p>{len(found.instructions):,} distinct.</p>"
    return section("Instructions", note + table(["Instruction", "Episodes"], rows) + more)


def _lengths(found: Inspection) -> str:
    if not found.lengths:
        return ""
    drawn = histogram(found.lengths, found.length_unit, "Lengths of the episodes")
    note = f"<p>Episodes by length in {found.length_unit}.</p>"
    return section("Lengths", f'{note}<div class="wide">{drawn}</div>')


def _samples(found: Inspection) -> str:
    if not found.samples:
        return ""
    note = (
        "<p>First, middle and last frame, and the numbers over time. A dimension has the same axis "
        "in all episodes: the least and the greatest value of the dataset.</p>"
    )
    drawn = [_episode(found, seen) for seen in found.samples]
    return section("Episodes", note + "".join(drawn))


def _episode(found: Inspection, seen: SeenEpisode) -> str:
    texts = " / ".join(seen.instructions) or "(no instruction)"
    texts = texts if len(texts) <= _CAPTION else texts[:_CAPTION] + " …"
    parts = [f"<h3>{escape(seen.id)} · {seen.seconds:.3g} s</h3><p>{escape(texts)}</p>"]
    for problem in seen.problems:
        parts.append(f'<p class="bad">{escape(problem.kind)}: {escape(problem.text)}</p>')
    for camera, frames in seen.sample.pictures.items():
        drawn = "".join(picture(frame, f"{seen.id}, {camera}") for frame in frames)
        parts.append(f'<figcaption>{escape(camera)}</figcaption><div class="strip">{drawn}</div>')
    # Actions are what people look for; other streams unfold.
    for name, (times, values) in seen.sample.curves.items():
        opened = " open" if "action" in name else ""
        shape = found.streams[name]
        drawn = [
            f"<figure><figcaption>{escape(name)} [{i}]</figcaption>"
            f"{_curve(shape, i, times, values[:, i], name)}</figure>"
            for i in range(min(values.shape[1], _DIMENSIONS))
        ]
        parts.append(
            f"<details{opened}><summary>{escape(name)}</summary>"
            f'<div class="curves">{"".join(drawn)}</div></details>'
        )
    return f'<div class="episode">{"".join(parts)}</div>'


def _curve(stream: SeenStream, i: int, times: np.ndarray, values: np.ndarray, name: str) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return missing("No finite number.")
    known = stream.low is not None and i < stream.low.size
    low, high = (stream.low[i], stream.high[i]) if known else (finite.min(), finite.max())
    return curve(times, values, float(low), float(high), f"{name} {i}")
