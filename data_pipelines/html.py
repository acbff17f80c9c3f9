"""The one HTML engine: Jinja2 templates with every value escaped, and figures of matplotlib.

Templates lie in the folder `templates` of a package; `base.html` here gives a page its frame and
style, `macros.html` its sections and tables. A page stands alone: pictures, figures and videos are
inside it.
"""

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, package: str = "data_pipelines", **values: Any) -> str:
    """Fills a template in.

    Args:
        template: a file in `templates` of `package`, e.g. "report.html"; it may extend "base.html"
            and import from "macros.html".
        package: the package whose template it is.
        values: what the template names; a name that is missing is an error.
    """
    names = dict.fromkeys((package, "data_pipelines"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in names]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that stands in the page itself, e.g. of kind "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path, kind: str) -> str:
    """As `data_uri`, for a file's content."""
    return data_uri(Path(path).read_bytes(), kind)


def figure_svg(figure: Any, title: str = "") -> Markup:
    """A matplotlib figure as an SVG element without a fixed size; equal figures give equal text.

    Args:
        figure: it chooses its own layout; text is drawn in the page's font.
        title: what a screen reader says. Figures of one page need different titles: the ids that
            matplotlib refers to are made from them.
    """
    import matplotlib  # a second of loading, only where a figure is drawn

    settings = {"svg.fonttype": "none", "svg.hashsalt": title or "mvjax", "font.size": 9}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    out = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML header
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # "axes_1" would stand in every figure
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
