"""The report's figures: inline SVG with the page's own fonts, sized to be read on a phone."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from mvjax.evaluation.closed_loop import SuccessRate

if TYPE_CHECKING:  # loaded when the first figure is drawn: an evaluation may have none
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (4.6, 2.9)  # 331 points: at a phone's width, 9-point text stays about 9 pixels
COLOURS = ("#0b62c4", "#b35900", "#2f7d32", "#8a3ffc", "#57606a")
INK = "#1f2328"
POINTS_DRAWN = 400


def loss_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> str:
    """Loss over steps, every logged value faint and its running mean bold.

    Args:
        curves: name -> (steps [n], losses [n]).
        title: what a screen reader says.
    """
    figure, axes = _axes("step", "loss")
    top = 0.0
    for (name, (steps, losses)), colour in zip(curves.items(), cycle(COLOURS)):
        smooth = _running_mean(losses, max(1, len(losses) // 25))
        keep = np.unique(np.linspace(0, len(steps) - 1, POINTS_DRAWN).astype(int))
        axes.plot(steps[keep], losses[keep], color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(steps[keep], smooth[keep], color=colour, linewidth=1.8, label=name)
        top = max(top, float(smooth.max()))
    axes.set_ylim(0, 1.1 * top or 1)
    axes.legend(frameon=False)
    return _svg(figure, title)


def curves_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], x_label: str, y_label: str, title: str
) -> str:
    """Lines from zero up.

    Args:
        curves: name -> (x [n], y [n]).
        x_label, y_label: of the axes.
        title: what a screen reader says.
    """
    figure, axes = _axes(x_label, y_label)
    for (name, (x, y)), colour in zip(curves.items(), cycle(COLOURS)):
        axes.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.8, label=name)
    axes.set_ylim(0, 1.15 * max(float(np.max(y)) for _, y in curves.values()) or 1)
    axes.legend(frameon=False)
    return _svg(figure, title)


def sweep_figure(
    curves: Mapping[str, Sequence[tuple[int, SuccessRate]]],
    lines: Sequence[SuccessRate],
    title: str,
) -> str:
    """Success against the number of video denoising steps, with Wilson intervals.

    Args:
        curves: name of a policy -> (stop step, success) pairs.
        lines: settings without a stop step (oracle, expert, doing nothing), as horizontal lines.
        title: what a screen reader says.
    """
    figure, axes = _axes("video denoising steps before the context is read", "success, %")
    colours = cycle(COLOURS)
    for (name, points), colour in zip(curves.items(), colours):
        _with_intervals(axes, [x for x, _ in points], [rate for _, rate in points], colour, name)
    axes.set_xticks(sorted({step for points in curves.values() for step, _ in points}))
    for line, colour, dash in zip(lines, colours, cycle(("--", ":", "-."))):
        axes.axhline(100 * line.rate, color=colour, linestyle=dash, linewidth=1.4, label=line.name)
    return _finished(figure, axes, title)


def study_figure(curves: Mapping[str, Sequence[tuple[int, SuccessRate]]], title: str) -> str:
    """Success against the number of action demonstrations, one line per way of training.

    Args:
        curves: name -> (demonstrations, success) pairs.
        title: what a screen reader says.
    """
    figure, axes = _axes("action demonstrations per task", "success, %")
    for (name, points), colour in zip(curves.items(), cycle(COLOURS)):
        points = sorted(points, key=lambda point: point[0])
        _with_intervals(axes, [x for x, _ in points], [rate for _, rate in points], colour, name)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xticks(ticks)
    return _finished(figure, axes, title)


def _with_intervals(
    axes: "Axes", x: Sequence[int], rates: Sequence[SuccessRate], colour: str, name: str
) -> None:
    below = [100 * (rate.rate - rate.low) for rate in rates]
    above = [100 * (rate.high - rate.rate) for rate in rates]
    y = [100 * rate.rate for rate in rates]
    # A mean over unequal tasks can leave the interval of the pooled episodes by a hair.
    errors = np.maximum([below, above], 0)
    axes.errorbar(x, y, errors, color=colour, marker="o", capsize=3, linewidth=1.8, label=name)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values (fewer at the start)."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def _axes(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    return figure, axes


def _finished(figure: "Figure", axes: "Axes", title: str) -> str:
    axes.set_ylim(-3, 103)
    axes.margins(x=0.06)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none")
    return _svg(figure, title)


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element without fixed size, metadata or clashing ids."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # real text, in the page's font
        "svg.hashsalt": title,  # the ids that stay are unique to this figure
        "font.size": 9,
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
