"""HTML pages: Jinja2 templates with autoescape, and matplotlib figures as SVG.

Templates are in the folder `templates` of a package. Every page extends `base.html` (layout and
style) and imports from `macros.html` (sections, tables). A page is self-contained: images, figures
and videos are embedded. Pages and figures follow the reader's light or dark theme.
"""

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

# The colours of figures in the light theme. `figure_svg` makes them variables, to which `base.html`
# gives other values in the dark theme. All differ from either background by a ratio of 4.5 or more.
SERIES = ("#0b62c4", "#b35900", "#2f7d32", "#8a3ffc", "#57606a")
LINE = "#d0d7de"
_INK, _PAPER = "#000000", "#ffffff"  # matplotlib's own
_VARIABLES = {
    _INK: "currentColor",
    _PAPER: f"var(--paper, {_PAPER})",
    LINE: f"var(--line, {LINE})",
} | {colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(SERIES, 1)}


def render(template: str, package: str = "data_pipelines", **values: Any) -> str:
    """Renders a file in `templates` of `package`; a variable without a value is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("data_pipelines")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(headings=headings, **values)


def headings(content: str) -> list[tuple[str, Markup]]:
    """Id and text of the sections of a page's body, for its navigation."""
    return [(id, Markup(text)) for id, text in re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', content)]


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data URI; `kind` is a media type such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path, kind: str) -> str:
    """A file's content as a data URI."""
    return data_uri(Path(path).read_bytes(), kind)


def figure_svg(figure: Any, title: str = "") -> Markup:
    """A matplotlib figure as a scalable SVG element; equal figures give equal text.

    Args:
        figure: a figure with its layout done; text is drawn in the page's font. Its colours are
            those of `SERIES` and `LINE`, and matplotlib's black and white.
        title: the label for screen readers, which says what is seen. It also seeds matplotlib's
            element ids, so figures of one page need different titles.
    """
    import matplotlib  # takes a second to import

    settings = {"svg.fonttype": "none", "svg.hashsalt": title or "mvjax", "font.size": 9}
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    out = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", metadata=no_metadata, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML header
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # unused, and "axes_1" is in every figure
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda hex: _VARIABLES.get(hex[0], hex[0]), svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
