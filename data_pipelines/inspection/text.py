"""An inspection as lines of text for a terminal."""

import numpy as np

from data_pipelines.inspection.dataset import Inspection
from data_pipelines.inspection.found import SeenStream

_INSTRUCTIONS = 10
_EXAMPLES = 5  # problems of a kind


def describe(found: Inspection) -> str:
    """What is in a dataset and what is wrong with it; the page lists every problem."""
    lines = [found.title, *_columns([("  " + what, value) for what, value in found.facts])]
    cameras = {name: stream for name, stream in found.streams.items() if stream.camera}
    numbers = {name: stream for name, stream in found.streams.items() if not stream.camera}
    if cameras:
        head = ("  camera", "size", "fps", "codec")
        rows = [("  " + name, size(s), rate(s), s.codec or "–") for name, s in cameras.items()]
        lines += ["", *_columns([head, *rows])]
    if numbers:
        head = ("  stream", "shape", "dtype", "rate", "min", "max")
        rows = [
            ("  " + name, str(list(s.shape)), s.dtype, rate(s), *_range(s))
            for name, s in numbers.items()
        ]
        lines += ["", *_columns([head, *rows])]
    if found.lengths:
        low, middle, high = np.percentile(found.lengths, [0, 50, 100])
        unit = found.length_unit
        lines += ["", f"  lengths: {low:.4g} to {high:.4g} {unit}, half below {middle:.4g}"]
    lines += ["", f"  instructions: {len(found.instructions):,} distinct"]
    frequent = found.instructions.most_common(_INSTRUCTIONS)
    lines += [f"    {count:>6,}  {text!r}" for text, count in frequent]
    lines += ["", *_problems(found)]
    # Names and texts that were never UTF-8 cannot be printed as they are.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def size(stream: SeenStream) -> str:
    """Width x height of a camera."""
    return f"{stream.shape[1]}x{stream.shape[0]}" if stream.shape else "unknown"


def rate(stream: SeenStream) -> str:
    """Samples per second."""
    return "–" if stream.rate is None else f"{stream.rate:.4g}"


def _range(stream: SeenStream) -> tuple[str, str]:
    if stream.low is None or not stream.low.size:
        return "–", "–"
    return f"{stream.low.min():.4g}", f"{stream.high.max():.4g}"


def _problems(found: Inspection) -> list[str]:
    kinds = found.problems_by_kind()
    if not kinds:
        return ["  no problems found"]
    lines = [f"  problems: {len(found.problems):,}"]
    for kind, problems in kinds.items():
        lines.append(f"    {len(problems):>6,}  {kind}")
        lines += [f"            {p.episode}: {p.text}" for p in problems[:_EXAMPLES]]
        if len(problems) > _EXAMPLES:
            lines.append(f"            ... and {len(problems) - _EXAMPLES:,} more")
    return lines


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
