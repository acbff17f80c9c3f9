"""An inspection as one HTML file that needs no other file, no network and no JavaScript."""

from html import escape
from pathlib import Path
from string import Template

import numpy as np

from data_pipelines.inspection.dataset import Inspection
from data_pipelines.inspection.figures import curve, histogram, picture
from data_pipelines.inspection.found import SeenEpisode, SeenStream
from data_pipelines.inspection.text import rate, size
from mvjax.evaluation import report
from mvjax.evaluation.report_html import count, missing, row, section, table

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
