"""The page's pictures: embedded JPEGs, and curves and histograms as small inline SVG."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

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
