"""The figures of the report and of the offline page, as inline SVG.

`title` begins the text for screen readers; the numbers that a reader would look for follow it.
Curves differ by markers and dashes too, not by colour alone.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from data_pipelines.html import LINE, SERIES, figure_svg
from mvjax.evaluation.closed_loop import SuccessRate

if TYPE_CHECKING:  # matplotlib is imported for the first figure: an evaluation may have none
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (4.2, 2.7)  # 302 points: at a phone's width, 9-point text is 9 pixels or more
LEGEND_ROW_INCHES = 0.17
# As many as have no divisor in common with the colours: a combination returns late.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
POINTS_DRAWN = 400
TICKS = 8  # more would run into each other

Curve = tuple[np.ndarray, np.ndarray]  # x [n], y [n]


def loss_figure(curves: Mapping[str, Curve], title: str) -> Markup:
    """Draws losses over steps: the logged values faint, their running mean bold."""
    figure, axes = _axes("step", "loss")
    top, said = 0.0, []
    for (name, (steps, losses)), colour, dash in zip(curves.items(), cycle(SERIES), cycle(DASHES)):
        smooth = _running_mean(losses, max(1, len(losses) // 25))
        keep = np.unique(np.linspace(0, len(steps) - 1, POINTS_DRAWN).astype(int))
        axes.plot(steps[keep], losses[keep], color=colour, alpha=0.25, linewidth=0.7)
        style = dict(color=colour, linestyle=dash, linewidth=1.8)
        axes.plot(steps[keep], smooth[keep], **style, label=name)
        top = max(top, float(smooth.max()))
        said.append(f"{name}: from {smooth[0]:.3g} to {smooth[-1]:.3g} at step {steps[-1]}")
    axes.set_ylim(0, 1.1 * top or 1)
    if len(curves) > 1:  # the axis names a single one
        _legend(figure, len(curves))
    return figure_svg(figure, _described(title, said))


def curves_figure(curves: Mapping[str, Curve], x_label: str, y_label: str, title: str) -> Markup:
    """Draws lines, from zero up, with a legend if there are several."""
    figure, axes = _axes(x_label, y_label)
    said = []
    for (name, (x, y)), colour, dash, marker in zip(
        curves.items(), cycle(SERIES), cycle(DASHES), cycle(MARKERS)
    ):
        style = dict(color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.8)
        axes.plot(x, y, **style, label=name)
        said.append(f"{name}: from {y[0]:.3g} at {x[0]} to {y[-1]:.3g} at {x[-1]}")
    axes.set_ylim(0, 1.15 * max(float(np.max(y)) for _, y in curves.values()) or 1)
    if len(curves) > 1:  # the axis names a single one
        _legend(figure, len(curves))
    return figure_svg(figure, _described(title, said))


def success_figure(
    curves: Mapping[str, Sequence[tuple[float, SuccessRate]]],
    x_label: str,
    title: str,
    lines: Sequence[SuccessRate] = (),
) -> Markup:
    """Draws success over x with Wilson intervals.

    Args:
        curves: name -> (x, success) pairs.
        x_label: the label of x.
        title: the beginning of the text for screen readers.
        lines: rates without an x, drawn as horizontal lines.
    """
    figure, axes = _axes(x_label, "success, %")
    colours, said = cycle(SERIES), []
    for (name, points), colour, marker in zip(curves.items(), colours, cycle(MARKERS)):
        points = sorted(points, key=lambda point: point[0])
        x, y = [x for x, _ in points], [100 * rate.rate for _, rate in points]
        ends = [[100 * (rate.rate - rate.low), 100 * (rate.high - rate.rate)] for _, rate in points]
        # A mean over tasks can lie slightly outside the interval of the pooled episodes.
        errors = np.maximum(np.transpose(ends), 0)
        style = dict(color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.8)
        axes.errorbar(x, y, errors, **style, label=name)
        said.append(f"{name}: " + ", ".join(f"{y:.3g} % at {x}" for x, y in zip(x, y)))
    ticks = sorted({x for points in curves.values() for x, _ in points})
    if len(ticks) <= TICKS:
        axes.set_xticks(ticks)
    for line, colour, dash in zip(lines, colours, cycle(("--", ":", "-."))):
        axes.axhline(100 * line.rate, color=colour, linestyle=dash, linewidth=1.4, label=line.name)
        said.append(f"{line.name}: {100 * line.rate:.3g} %")
    axes.set_ylim(-3, 103)
    axes.margins(x=0.06)
    _legend(figure, len(curves) + len(lines))
    return figure_svg(figure, _described(title, said))


def _described(title: str, said: Sequence[str]) -> str:
    return f"{title}. {'; '.join(said)}."


def _legend(figure: "Figure", entries: int) -> None:
    """A legend above the axes, where it covers nothing."""
    width, height = SIZE_INCHES
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * entries)
    figure.legend(loc="outside upper left", frameon=False, handlelength=3)


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
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes
