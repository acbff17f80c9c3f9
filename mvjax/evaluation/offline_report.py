"""The offline evaluation on file: `offline.json` for programs, `offline.html` for people."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mvjax.evaluation.figures import curves_figure
from mvjax.evaluation.offline import WindowErrors
from mvjax.evaluation.report_html import row, section, table

TRUE, GENERATED = "true video", "generated video"


def summarise(
    errors: Sequence[WindowErrors],
    unreadable: Sequence[str],
    stop_steps: Sequence[int],
    sigmas: np.ndarray,
    label: str,
) -> dict[str, Any]:
    """Means over windows, JSON-able.

    Args:
        errors: of every window.
        unreadable: episodes that are not among them, and why.
        stop_steps: at which the video was read.
        sigmas: noise levels of the whole schedule.
        label: what was evaluated.

    Returns:
        windows, unreadable, label, stop_steps, sigmas; under "true_video" and "generated_video"
        mse (of normalised actions, per stop step), mse_by_step and mse_by_dimension (per stop step
        and step of the chunk, or dimension), and mae_by_dimension (in the actions' units); psnr and
        ssim per future frame.
    """

    def mean(name: str, *axes: int) -> list:
        return np.mean([getattr(e, name) for e in errors], axis=(0, *axes)).tolist()

    summary = {
        "label": label,
        "windows": len(errors),
        "unreadable": list(unreadable),
        "stop_steps": list(stop_steps),
        "sigmas": [float(sigmas[k]) for k in stop_steps],
    }
    for name in ("true_video", "generated_video"):
        summary[name] = {
            "mse": mean(name, 2, 3),
            "mse_by_step": mean(name, 3),
            "mse_by_dimension": mean(name, 2),
            "mae_by_dimension": mean(f"raw_{name}", 2),
        }
    finite = np.minimum([e.psnr for e in errors], 100.0)  # equal frames are infinitely alike
    return summary | {"psnr": finite.mean(axis=0).tolist(), "ssim": mean("ssim")}


def write_offline(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes both files and returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Template(Path(__file__).with_name("report.html").read_text())
    body = "\n".join([_head(summary), _levels(summary), _chunk(summary), _video(summary)])
    title = escape(f"Offline evaluation of {summary['label']}")
    page = template.substitute(title=title, body=body)
    for name, text in (("offline.json", json.dumps(summary, indent=1)), ("offline.html", page)):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)
    return folder / "offline.html"


def _head(summary: dict[str, Any]) -> str:
    return section(
        "What was measured",
        f"<p>{escape(summary['label'])}: {summary['windows']} moments of held-out episodes.</p>"
        + "".join(f"<p>Could not be read: {escape(said)}</p>" for said in summary["unreadable"])
        + "<p>Action error: mean squared error of the normalised chunk against what was done "
        "there; 1 is about what a constant would get.</p>",
    )


def _levels(summary: dict[str, Any]) -> str:
    steps = summary["stop_steps"]
    curves = {
        name: (np.array(steps), np.array(summary[key]["mse"]))
        for name, key in ((TRUE, "true_video"), (GENERATED, "generated_video"))
    }
    rows = [
        row(str(k), [f"{sigma:.3g}", *(f"{values[i]:.4f}" for _, values in curves.values())])
        for i, (k, sigma) in enumerate(zip(steps, summary["sigmas"]))
    ]
    figure = curves_figure(curves, "stop step K of the video", "action error", "Error by stop step")
    return section(
        "By noise level of the video",
        figure + table(("stop step K", "σ", TRUE, GENERATED), rows),
    )


def _chunk(summary: dict[str, Any]) -> str:
    errors = np.array(summary["generated_video"]["mse_by_step"][0])
    steps = {f"K = {summary['stop_steps'][0]}": (np.arange(1, len(errors) + 1), errors)}
    rows = []
    for d in range(len(summary["generated_video"]["mse_by_dimension"][0])):
        cells = []
        for key in ("true_video", "generated_video"):
            cells += [
                f"{summary[key][n][0][d]:.4g}" for n in ("mse_by_dimension", "mae_by_dimension")
            ]
        rows.append(row(str(d), cells))
    head = (
        "dimension",
        f"{TRUE}: MSE",
        "absolute, in units",
        f"{GENERATED}: MSE",
        "absolute, in units",
    )
    figure = curves_figure(steps, "step of the chunk", "action error", "Error along the chunk")
    return section("Along the chunk and by dimension", figure + table(head, rows))


def _video(summary: dict[str, Any]) -> str:
    frames = np.arange(1, len(summary["psnr"]) + 1)
    figures = [
        curves_figure({name: (frames, np.array(summary[key]))}, "future frame", name, name)
        for name, key in (("PSNR, dB", "psnr"), ("SSIM", "ssim"))
    ]
    words = f"<p>PSNR {np.mean(summary['psnr']):.2f} dB, SSIM {np.mean(summary['ssim']):.3f}.</p>"
    return section("Fully denoised video against the true future", words + "".join(figures))
