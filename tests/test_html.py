"""The HTML engine: values are escaped, figures stand in a page."""

import re
import xml.etree.ElementTree as ElementTree

import jinja2
import pytest
from matplotlib.figure import Figure

from data_pipelines.html import data_uri, figure_svg, file_uri, render


def _figure():
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2, 3], label="a < b")
    return figure


def test_a_template_that_lacks_a_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="found"):
        render("inspection.html", title="t", name="n")


def test_values_are_escaped():
    assert "<title>&lt;script&gt;</title>" in render("base.html", title="<script>")


def test_a_figure_is_an_element_that_scales_and_is_named():
    svg = str(figure_svg(_figure(), 'loss "a" & <b>'))
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'loss "a" & <b>'
    assert "width" not in root.attrib and root.attrib["viewBox"] == "0 0 216 144"
    assert "<metadata" not in svg and svg == str(figure_svg(_figure(), 'loss "a" & <b>'))


def test_figures_of_one_page_share_no_id():
    first, second = (set(re.findall(r' id="([^"]*)"', figure_svg(_figure(), t))) for t in "ab")
    assert first and not first & second


def test_bytes_and_files_stand_in_the_page(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert data_uri(b"abc", "image/png") == "data:image/png;base64,YWJj"
    assert file_uri(tmp_path / "a", "video/mp4") == "data:video/mp4;base64,YWJj"
