"""An inspection as text for a terminal."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data_pipelines.inspect import Inspection
from data_pipelines.inspect_episode import StreamSummary

_INSTRUCTIONS = 10
_EXAMPLES = 5  # problems shown of each kind


def describe(found: Inspection) -> str:
    """The findings as text, with a few problems of each kind; the page lists more."""
    lines = [found.title, *_columns([("  " + what, value) for what, value in found.facts])]
    cameras = [("  camera", "size", "fps", "codec")]
    numbers = [("  stream", "shape", "dtype", "rate", "min", "max")]
    for name, s in found.streams.items():
        if s.camera:
            cameras.append((f"  {name}", size_text(s), rate_text(s), s.codec or "–"))
        else:
            known = s.low is not None and s.low.size
            ends = (f"{s.low.min():.4g}", f"{s.high.max():.4g}") if known else ("–", "–")
            numbers.append((f"  {name}", str(list(s.shape)), s.dtype, rate_text(s), *ends))
    for table in (cameras, numbers):
        lines += ["", *_columns(table)] if len(table) > 1 else []
    if found.left_out:
        lines += ["", "  not used by an encoding job"]
        lines += [f"    {line}" for line in left_out_text(found)]
    if found.lengths:
        low, middle, high = np.percentile(found.lengths, [0, 50, 100])
        unit = found.length_unit
        lines += ["", f"  lengths: {low:.4g} to {high:.4g} {unit}, median {middle:.4g}"]
    lines += ["", f"  instructions: {len(found.instructions):,} distinct"]
    frequent = found.instructions.most_common(_INSTRUCTIONS)
    lines += [f"    {count:>6,}  {text!r}" for text, count in frequent]
    total = len(found.problems)
    lines += ["", f"  problems: {total:,}" if total else "  no problems found"]
    for kind, problems in found.problems_by_kind().items():
        lines.append(f"    {len(problems):>6,}  {kind}")
        lines += [f"            {p.episode}: {p.text}" for p in problems[:_EXAMPLES]]
        if len(problems) > _EXAMPLES:
            lines.append(f"            ... and {len(problems) - _EXAMPLES:,} more")
    # Names and texts that are not valid UTF-8 would fail to print.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def left_out_text(found: Inspection) -> list[str]:
    """A line per stream that an encoding job could not use, and why; a few reasons of each."""
    lines, reasons = [], defaultdict(list)
    for (name, why), count in found.left_out.most_common():
        reasons[name].append((why, count))
    for name, each in reasons.items():
        lines += [f"{name}: {why} ({_episodes(count)})" for why, count in each[:_EXAMPLES]]
        if rest := each[_EXAMPLES:]:
            more = _episodes(sum(count for _, count in rest))
            lines.append(f"{name}: {len(rest):,} other reasons ({more})")
    return lines


def _episodes(count: int) -> str:
    return f"{count:,} episode{'s' if count > 1 else ''}"


def size_text(stream: StreamSummary) -> str:
    """Width x height of a camera."""
    return f"{stream.shape[1]}x{stream.shape[0]}" if stream.shape else "unknown"


def rate_text(stream: StreamSummary) -> str:
    """Samples per second."""
    return "–" if stream.rate is None else f"{stream.rate:.4g}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
