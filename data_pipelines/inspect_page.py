"""An inspection as one self-contained HTML file, without network access or JavaScript.

`templates/inspection.html` has the page's text; here are its pictures and figures.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from PIL import Image

from data_pipelines import atomic, html
from data_pipelines.inspect import Inspection
from data_pipelines.inspect_episode import EpisodeSummary
from data_pipelines.inspect_text import (
    left_out_text,
    rate_text,
    size_text,
)

if TYPE_CHECKING:  # loaded when the first figure is drawn
    from matplotlib.axes import Axes

_DIMENSIONS = 32  # shown of each stream
_WIDTH, _HEIGHT = 240, 90  # of a figure, points
_BINS = 24


def write_page(found: Inspection, out: Path) -> None:
    """Writes the page atomically."""
    page = html.render(
        "inspection.html",
        title=f"Inspection of {found.title}",
        name=Path(found.title).name or found.title,
        found=found,
        dimensions=_DIMENSIONS,
        rate=rate_text,
        size=size_text,
        left_out=left_out_text(found),
        jpeg=_jpeg,
        curves=lambda episode: _curves(found, episode),
        lengths=_histogram(found.lengths, found.length_unit) if found.lengths else "",
    )
    # Names and texts that are not valid UTF-8 would fail to encode.
    atomic.write_text(out, page.encode("utf-8", "backslashreplace").decode())


def _jpeg(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return html.data_uri(buffer.getvalue(), "image/jpeg")


def _curves(found: Inspection, episode: EpisodeSummary) -> dict[str, list[Markup | None]]:
    """Stream -> a figure of each dimension; None for a dimension without finite numbers."""
    figures = {}
    for name, (times, values) in episode.curves.items():
        stream, figures[name] = found.streams[name], []
        for i, column in enumerate(values.T[:_DIMENSIONS]):
            finite = column[np.isfinite(column)]
            if not finite.size:
                figures[name].append(None)
                continue
            # All episodes share the axis of a dimension, unless the first one lacks the dimension.
            known = stream.low is not None and i < stream.low.size
            low, high = (stream.low[i], stream.high[i]) if known else (finite.min(), finite.max())
            title = f"{episode.id}, {name} {i}: from {finite.min():.3g} to {finite.max():.3g}"
            figures[name].append(_curve(times, column, low, high, title))
    return figures


def _curve(times: np.ndarray, values: np.ndarray, low: float, high: float, title: str) -> Markup:
    """Values [k] over seconds [k], with gaps where they are not finite."""
    end = float(times[-1]) or 1.0
    high = high if high > low else low + 1.0
    axes = _axes((0, end), ["0", f"{end:.3g} s"], (low, high), [f"{low:.3g}", f"{high:.3g}"])
    over_the_axes = dict(clip_on=False, zorder=3)
    axes.plot(times, values, color=html.SERIES[0], linewidth=1.4, **over_the_axes)
    return html.figure_svg(axes.figure, title)


def _histogram(values: Sequence[float], unit: str) -> Markup:
    """A histogram of the episodes' lengths."""
    counts, edges = np.histogram(values, bins=min(_BINS, len(set(values))))
    ends, most = (edges[0], edges[-1]), counts.max()
    axes = _axes(ends, [f"{ends[0]:.4g}", f"{ends[1]:.4g} {unit}"], (0, most), ["0", f"{most:,}"])
    axes.bar(edges[:-1], counts, 0.95 * np.diff(edges), align="edge", color=html.SERIES[0])
    title = f"Lengths of the episodes: from {ends[0]:.4g} to {ends[1]:.4g} {unit}"
    return html.figure_svg(axes.figure, title)


def _axes(x: tuple, x_labels: list[str], y: tuple, y_labels: list[str]) -> "Axes":
    """Empty axes with labels at the ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    axes = figure.add_axes((46 / _WIDTH, 18 / _HEIGHT, 190 / _WIDTH, 64 / _HEIGHT))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(html.LINE)
    axes.tick_params(length=0, labelsize=10, pad=4)
    axes.set(xlim=x, ylim=y)
    axes.set_yticks(y, y_labels)
    axes.set_xticks(x, x_labels)
    for label, side in zip(axes.get_xticklabels(), ("left", "right")):
        label.set_horizontalalignment(side)  # inside the figure
    return axes
