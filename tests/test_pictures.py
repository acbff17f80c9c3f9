"""The README's pictures: those that the code draws, and small enough for a first page."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"


def test_the_architecture_is_what_the_code_draws_and_is_well_formed():
    text = (PICTURES / "architecture.svg").read_text()
    assert runpy.run_path(str(DOCS / "architecture_svg.py"))["architecture_svg"]() == text
    root = ElementTree.fromstring(text)
    assert {child.tag.rpartition("}")[2] for child in root} >= {"title", "desc"}
    assert "prefers-color-scheme: dark" in text


def test_the_animation_plays_and_both_pictures_are_under_a_megabyte():
    with Image.open(PICTURES / "robot.webp") as animation:
        assert animation.n_frames > 10 and animation.info["loop"] == 0
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 1_000_000
