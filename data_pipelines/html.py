"""The one HTML engine: Jinja2 templates with every value escaped, and figures of matplotlib.

Templates lie in the folder `templates` of a package; `base.html` here gives a page its frame and
style. A page stands alone: pictures, figures and videos are inside it.
"""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, package: str = "data_pipelines", **values: Any) -> str:
    """Fills a template in.

    Args:
        template: a file in `templates` of `package`, e.g. "report.html"; it may extend "base.html"
            and import from what is here.
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


def figure_svg(figure: Any) -> Markup:
    """A matplotlib figure as SVG to stand in a page; equal figures give equal text."""
    import matplotlib  # a second of loading, only where a figure is drawn

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mvjax", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML header
