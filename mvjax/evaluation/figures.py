"""The figures of the report and of the offline page, as inline SVG.

`title` is always the text for screen readers.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from data_pipelines.html import figure_svg
from mvjax.evaluation.closed_loop import SuccessRate

if TYPE_CHECKING:  # matplotlib is imported for the first figure: an evaluation may have none
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (4.6, 2.9)  # 331 points: at a phone's width, 9-point text stays about 9 pixels
COLOURS = ("#0b62c4", "#b35900", "#2f7d32", "#8a3ffc", "#57606a")
INK = "#1f2328"
POINTS_DRAWN = 400

Curve = tuple[np.ndarray, np.ndarray]  # x [n], y [n]


def loss_figure(curves: Mapping[str, Curve], title: str) -> Markup:
    """Draws losses over steps: the logged values faint, their running mean bold."""
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
    return figure_svg(figure, title)


def curves_figure(curves: Mapping[str, Curve], x_label: str, y_label: str, title: str) -> Markup:
    """Draws lines, from zero up."""
    figure, axes = _axes(x_label, y_label)
    for (name, (x, y)), colour in zip(curves.items(), cycle(COLOURS)):
        axes.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.8, label=name)
    axes.set_ylim(0, 1.15 * max(float(np.max(y)) for _, y in curves.values()) or 1)
    axes.legend(frameon=False)
    return figure_svg(figure, title)


def success_figure(
    curves: Mapping[str, Sequence[tuple[int, SuccessRate]]],
    x_label: str,
    title: str,
    lines: Sequence[SuccessRate] = (),
) -> Markup:
    """Draws success over x with Wilson intervals.

    Args:
        curves: name -> (x, success) pairs.
        x_label: the label of x.
        title: the text for screen readers.
        lines: rates without an x, drawn as horizontal lines.
    """
    figure, axes = _axes(x_label, "success, %")
    colours = cycle(COLOURS)
    for (name, points), colour in zip(curves.items(), colours):
        points = sorted(points, key=lambda point: point[0])
        x, y = [x for x, _ in points], [100 * rate.rate for _, rate in points]
        ends = [[100 * (rate.rate - rate.low), 100 * (rate.high - rate.rate)] for _, rate in points]
        # A mean over tasks can lie slightly outside the interval of the pooled episodes.
        errors = np.maximum(np.transpose(ends), 0)
        axes.errorbar(x, y, errors, color=colour, marker="o", capsize=3, linewidth=1.8, label=name)
    axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
    for line, colour, dash in zip(lines, colours, cycle(("--", ":", "-."))):
        axes.axhline(100 * line.rate, color=colour, linestyle=dash, linewidth=1.4, label=line.name)
    axes.set_ylim(-3, 103)
    axes.margins(x=0.06)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none")
    return figure_svg(figure, title)


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
