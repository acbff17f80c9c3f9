"""The HTML pages in a real Chromium: in light and dark, on a phone and on a desktop, without a
network, and with only a keyboard.

Pictures of the pages go to the folder in MVJAX_SCREENSHOTS, or to the test's own.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_checks import SCHEMES, WIDTHS, opened, page_problems
from test_inspect import write_robot
from test_report import write_run

from data_pipelines.inspect import inspect_path
from data_pipelines.inspect_page import write_page
from mvjax.evaluation.offline import WindowErrors, summarise, write_offline
from mvjax.evaluation.report import build_report
from mvjax.evaluation.rollout import append_result, read_results


def offline_page(folder):
    """Of errors as they are: growing along the chunk, with one moment that could not be read."""
    rng, shape = np.random.default_rng(0), (11, 16, 4)  # stop steps, chunk, dimensions
    grows = np.linspace(0.1, 1, 16)[:, None]
    errors = [
        WindowErrors(
            *(grows * rng.random(shape) for _ in range(4)), 20 + rng.random(8), rng.random(8)
        )
        for _ in range(3)
    ]
    sigmas = np.geomspace(80, 0.3, 11)
    unreadable = ["episode_000004: OSError: " + "a_long_path/" * 12 + "file.mp4"]
    summary = summarise(errors, unreadable, list(range(11)), sigmas, "runs/arm/action on robot")
    return write_offline(folder, summary)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The path of each page."""
    folder = tmp_path_factory.mktemp("pages")
    run = write_run(folder / "quickstart")
    results = run / "evaluation" / "none" / "results.jsonl"  # of other tasks, which is a warning
    append_result(results, replace(read_results(results)[0], task="another-task-v3"))
    build_report(run, folder / "report.html")
    found = inspect_path(write_robot(folder), "lerobot", {})
    write_page(found, folder / "inspection.html")
    made = {"offline": offline_page(folder)}
    return made | {name: folder / f"{name}.html" for name in ("report", "inspection")}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["report", "offline", "inspection"])
def test_a_page_can_be_read_by_everybody(browser, pages, tmp_path, name, scheme, width):
    screenshots = Path(os.environ.get("MVJAX_SCREENSHOTS", tmp_path))
    how = dict(width=width, scheme=scheme, screenshots=screenshots)
    assert page_problems(browser, pages[name], **how) == []


def test_a_report_of_a_run_that_has_just_begun(browser, tmp_path):
    (tmp_path / "young").mkdir()
    build_report(tmp_path / "young", tmp_path / "young.html")
    assert page_problems(browser, tmp_path / "young.html", width=380) == []


_PLAYING = "() => [...document.querySelectorAll('video')].filter((v) => !v.paused).length"


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_videos_play_in_view_unless_the_reader_prefers_reduced_motion(browser, pages, motion):
    found = []
    with opened(browser, pages["report"], found, motion=motion) as page:
        button, likes_motion = page.get_by_role("button"), motion == "no-preference"
        assert button.inner_text() == ("Pause" if likes_motion else "Play") + " all videos"
        for plays in (likes_motion, not likes_motion, likes_motion):
            page.wait_for_function(f"({_PLAYING})() {'>' if plays else '=='} 0")
            button.click()
        assert page.evaluate("document.querySelectorAll('video').length") == 8
    assert not found


def test_a_page_is_read_where_scripts_are_blocked(pages):
    """Its videos have controls, and no button that does nothing is shown."""
    text = pages["report"].read_text()
    assert 'id="motion" hidden' in text and text.count("<video controls") == text.count("<video ")


_BAD = """<!DOCTYPE html><html><head><title>t</title><style>
section { width: 300px; background: #fff } .wide { width: 500px } .pale { color: #bbb }
button { outline: none !important }</style></head><body><h1>a</h1><main>
<section aria-label="one"><p class="wide">wide</p><p class="pale">pale</p>
<img src="missing.png"><img alt="far" src="https://example.com/a.png"><button>no ring</button>
<a href="#" tabindex="-1">no tab</a>
<video aria-label="broken" controls src="data:video/mp4;base64,AA"></video>
<video src="data:video/mp4;base64,AA"></video>
<svg viewBox="0 0 10 10" width="10"><text x="50" y="5">cut</text></svg></section>
</main><script>nothing.at.all</script></body></html>"""


def test_a_bad_page_is_found_out(browser, tmp_path):
    (tmp_path / "bad.html").write_text(_BAD)
    found = "\n".join(page_problems(browser, tmp_path / "bad.html", width=380))
    for words in [
        "asks the network for https://example.com/a.png",
        "there is no file /missing.png",
        "script: nothing is not defined",
        "the page has no language",
        "the page scrolls sideways: 5",
        '<p> "wide" sticks out of <section> "one"',
        'picture "far" does not load',
        "a picture has no text: http://localhost/missing.png",
        "a figure has no text",
        'a figure cuts off "cut"',
        "a video has no text",
        '<video> "" has no controls',
        '<video> "broken" does not play',
        "axe, serious, color-contrast",
        "the focus of <button> no ring is not visible",
        "Tab does not reach <a> no tab",
    ]:
        assert words in found, f"{words}\n{found}"
