"""A hook of the site (`hooks` in mkdocs.yml): README.md is its first page.

The repository and the site then say the same. Links to pages lose their folder; files that are not
part of the site are named without a link.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

# Files of the repository's root that are pages of the site.
_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Puts README.md in the place of index.md."""
    if page.file.src_uri != "index.md":
        return markdown
    return to_site((Path(config.config_file_path).parent / "README.md").read_text())


def to_site(text: str) -> str:
    """README.md with the addresses of the site."""
    text = text.replace('src="docs/', 'src="')
    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", _link, text)


def _link(match: re.Match[str]) -> str:
    mark, words, address = match.groups()
    if re.match(r"\w+:|#", address):
        return match[0]
    if address.startswith("docs/"):
        return f"{mark}[{words}]({address.removeprefix('docs/')})"
    if address in _PAGES:
        return f"{mark}[{words}]({_PAGES[address]})"
    return words
