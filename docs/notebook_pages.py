"""A hook of the site (`hooks` in mkdocs.yml): a notebook becomes a page, with its stored outputs.

mkdocs-jupyter loads MathJax from another host and adds half a megabyte of styles to the page. A
cell needs neither: text is Markdown, code and printed output are fences, pictures and videos are in
the file. Links to `start.ipynb` work on the site as they do in the repository.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PICTURES = ("image/png", "image/jpeg", "image/gif", "image/webp")


class NotebookFile(File):
    """A notebook, which the site treats as a page."""

    def is_documentation_page(self) -> bool:
        """Says that it is not a file to be copied."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts a page in the place of every notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb") and file.inclusion.is_included():
            page = NotebookFile(
                file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls
            )
            page.content_string = to_markdown(json.loads(Path(file.abs_src_path).read_text()))
            files.remove(file)
            files.append(page)
    return files


def to_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook and their stored outputs as one Markdown text."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(_fence(source, "python"))
            parts += filter(None, map(_output, cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "error":
        return _fence("\n".join(output["traceback"]), "text")
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in _PICTURES:
        if kind in data:  # a picture's text/plain is the name of its class
            content = "".join("".join(data[kind]).split())
            return f"![{_alternative(data)}](data:{kind};base64,{content})"
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]) + "</div>"
    if "image/svg+xml" in data:
        return "<div>" + "".join(data["image/svg+xml"]) + "</div>"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return _fence("".join(data.get("text/plain", "")), "text")


def _alternative(data: dict[str, Any]) -> str:
    """What a reader without pictures is told: IPython's text where it is one."""
    text = "".join(data.get("text/plain", ""))
    return "output of the cell above" if text.startswith("<") or not text else text.strip("'")


def _fence(text: str, language: str) -> str:
    text = _ANSI.sub("", text).rstrip()
    longest = max(map(len, re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}" if text else ""
