"""The documentation: the site builds, links lead somewhere, commands have flags that exist.

`tests/docs_commands.py`, which .ci/run names, runs the commands. These tests only read them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import forked
import pytest
from docs_fences import (
    LANGUAGES,
    ROOT,
    Call,
    Fence,
    calls,
    fences,
    indented_commands,
    inline_calls,
    page_names,
    simple_commands,
)
from page_checks import page_problems

PAGES = page_names()
# Attributes whose address a browser fetches by itself; <a href> is followed by a person.
FETCHED = {"src", "srcset", "poster", "data", "action"}
PACKAGES = ("mvjax", "data_pipelines", "configs", "launch", "tests")


def texts() -> dict[str, str]:
    return {page: (ROOT / page).read_text() for page in PAGES}


# --- The site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocstrings", reason="the site's packages are not installed")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


class Fetches(HTMLParser):
    """Collects what a browser fetches from another host when it opens a page."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            fetched = name in FETCHED or (tag == "link" and name == "href")
            canonical = ("rel", "canonical") in attributes
            if fetched and not canonical and re.match(r"(https?:)?//", value or ""):
                self.found.append(f"<{tag} {name}={value}>")


def test_the_site_has_every_page_and_loads_nothing_from_another_host(site):
    built = sorted(site.rglob("*.html"))
    assert site / "index.html" in built and site / "reference/flow/index.html" in built
    for path in built:
        reader = Fetches()
        reader.feed(text := path.read_text())
        assert not reader.found, f"{path.relative_to(site)}: {reader.found}"
        assert "@import" not in text and 'class="mermaid"' not in text  # would load a library
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text()), path


def test_the_reference_has_every_docstring_it_names(site):
    for path in (ROOT / "docs/reference").glob("*.md"):
        page = site / "reference" / path.stem / "index.html"
        page = site / "reference/index.html" if path.stem == "index" else page
        text = page.read_text()
        for name in re.findall(r"^::: (\S+)", path.read_text(), flags=re.M):
            assert f'id="{name}"' in text, f"{path.name} has no {name}"
        assert "Args:</p>" not in text and "Returns:</p>" not in text, path.name


def test_estimates_and_scripts_are_no_part_of_the_site(site):
    assert not (site / "estimates").exists() and not list(site.rglob("*.py"))


@pytest.mark.parametrize(("width", "scheme"), [(380, "light"), (1280, "dark")])
def test_pages_of_the_site_can_be_read_by_everybody(browser, site, width, scheme):
    for name in (".", "start", "pods", "reference/policy"):
        how = dict(root=site, content="article", width=width, scheme=scheme)
        assert page_problems(browser, site / name / "index.html", **how) == [], name


# --- Links of the pages that a repository's own browser shows ---


def anchors(text: str) -> set[str]:
    """As GitHub names the headings of a page."""
    plain = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.M | re.S)
    found: dict[str, int] = defaultdict(int)
    names = set(re.findall(r'(?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", plain, flags=re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower().replace("`", "")
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def links(text: str) -> list[tuple[int, str]]:
    """(line, address) of what is linked or shown from the repository itself."""
    plain = re.sub(r"^(`{3,}).*?^\1", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    plain = re.sub(r"`[^`\n]*`", "", plain)
    spans = re.compile(
        r'\]\(\s*<?([^)\s>]+)|(?:src|srcset|href)="([^"]+)"|^\[[^]]+\]: *(\S+)', re.M
    )
    found = [
        (plain.count("\n", 0, m.start()) + 1, m[1] or m[2] or m[3]) for m in spans.finditer(plain)
    ]
    return [(line, address) for line, address in found if not re.match(r"\w+:|//", address)]


def test_links_between_files_lead_to_a_file_and_a_heading():
    wrong = []
    for page, text in texts().items():
        for line, address in links(text):
            path, _, anchor = address.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if not target.exists():
                wrong.append(f"{page}:{line}: there is no {address}")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
                wrong.append(f"{page}:{line}: {path or page} has no heading #{anchor}")
    assert not wrong, "\n".join(wrong)


# --- Words ---


def test_spelling():
    pytest.importorskip("codespell_lib", reason="codespell is not installed")
    names = [
        page for page in [*PAGES, "CHANGELOG.md", "mkdocs.yml", ".github"] if (ROOT / page).exists()
    ]
    result = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *names, "docs/reference", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


# --- Commands ---


def test_every_fence_says_what_it_is():
    """So that none escapes `docs_commands.py`: commands are ```bash, and a title is not empty."""
    wrong = []
    for page, text in texts().items():
        for fence in fences(page, text):
            where = f"{page}:{fence.line}"
            if fence.language not in LANGUAGES:
                wrong.append(f"{where}: ```{fence.language} is none of {sorted(LANGUAGES)}")
            if fence.title is not None and not fence.title.strip():
                wrong.append(f"{where}: the title is empty")
            if fence.language == "python" and fence.runs:
                try:
                    compile(fence.text, page, "exec")
                except SyntaxError as error:
                    wrong.append(f"{page}:{fence.line + (error.lineno or 0)}: {error.msg}")
            if fence.language == "text" and re.search(
                r"^\$ ?(mvjax|python|bash) ", fence.text, re.M
            ):
                wrong.append(f"{where}: a command belongs into a fence ```bash, without $")
        wrong += [f"{line} (indented)" for line in indented_commands(text, page)]
    assert not wrong, "\n".join(wrong)


def wrong_calls(found: list[Call]) -> list[str]:
    """ "page:line: sentence" of every command that the program would refuse."""
    wrong = [f"{c.page}:{c.line}: {c.fault}" for c in found if c.fault]
    by_module: dict[str, list[Call]] = defaultdict(list)
    for call in found:
        if not call.fault:
            by_module[call.module].append(call)
    for module, group in by_module.items():
        for call, sentence in zip(group, sentences(module, group), strict=True):
            if sentence and (call.complete or "must be given" not in sentence):
                wrong.append(f"{call.page}:{call.line}: {sentence}")
    return sorted(wrong)


def sentences(module: str, group: list[Call]) -> list[str]:
    """What `parse_flags.py` says to each call."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder, "calls.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps([(call.arguments, call.complete) for call in group]))
        said = forked.run("parse_flags", module, asked, answers)
        assert said.code == 0 and answers.exists(), f"{module}: {said.out}{said.err}"
        return json.loads(answers.read_text())


def test_every_flag_and_setting_of_a_page_exists():
    found = []
    for page, text in texts().items():
        for fence in fences(page, text):
            if fence.language in ("bash", "yaml"):
                found += calls(fence)
        found += inline_calls(page, text)
    assert len(found) > 20
    wrong = wrong_calls(found)
    assert not wrong, "\n".join(wrong)


STUDIES = {  # with what their phases are asked for
    "cameras": '"out"',
    "chunking": '"run", "out", "smoke"',
    "contexts": '"out", "smoke", 2',
}


def test_every_flag_and_setting_of_a_study_exists():
    found = []
    for study, asked in STUDIES.items():
        code = (
            "import shlex\n"
            f"from launch.benchmarks.{study} import phases\n"
            f"for phase in phases({asked}):\n"
            "    print(shlex.join(['python', *phase.command[1:]]))"
        )
        script = subprocess.check_output([sys.executable, "-c", code], text=True)
        found += calls(Fence(study, 0, "bash", None, script))
    assert len(found) > 70
    wrong = wrong_calls(found)
    assert not wrong, "\n".join(wrong)


MISTAKES = """
Text with `mvjax train --workdri=x` in it.

```bash title="On a pod; not run"
mvjax train --config=quickstart_video \\
    --workdir=runs/x --config.optimizer.lerning_rate=1
FOO=1 mvjax local --processes=2 -- evaluate --checkpoint=runs/a --mods=policy >log 2>&1 &
python -m launch.serve --checkpoint=runs/a --config.sampler.no=1   # --nothing=1
mvjax tarin && mvjax inspect data/my_robot --out=x.html
for i in 1 2; do mvjax record --out=x --kind=robot --episodes=$i --seeds=1; done
mvjax convert a.pt
python -m launch.no_such
bash launch/no_such.sh
ssh pod --command="cd x && mvjax train --config=quickstart_video --workdir=x --stpes=1"
```
"""


def test_a_misspelt_flag_or_setting_is_found_with_its_line():
    (fence,) = fences("page.md", MISTAKES)
    wrong = wrong_calls([*calls(fence), *inline_calls("page.md", MISTAKES)])
    expected = {
        2: "'workdri'",
        5: "'lerning_rate'; did you mean 'learning_rate'?",
        7: "'mods'",
        8: "'no'",
        9: "mvjax has no command 'tarin'",
        10: "'seeds'",
        11: "DEST must be given",
        12: "no module launch.no_such",
        13: "no file launch/no_such.sh",
        14: "'stpes'",
    }
    said = {int(line.split(":")[1]): line for line in wrong}
    assert len(wrong) == len(said) == len(expected), wrong
    for line, words in expected.items():
        assert words in said[line], (line, said[line])


PAGE = """# A page

1. In a list:

    ```bash title="Run by hand"
    mvjax --help
    ```

=== "Tab"

    ```python
    x = 1
    ```

    mvjax train --config=x
"""


def test_fences_are_found_in_lists_and_tabs():
    first, second = fences("page.md", PAGE)
    assert first == ("page.md", 5, "bash", "Run by hand", "mvjax --help\n") and not first.runs
    assert (second.line, second.text, second.runs) == (11, "x = 1\n", True)
    assert list(indented_commands(PAGE, "page.md")) == ["page.md:15: mvjax train --config=x"]


def test_shell_is_split_into_its_commands():
    script = "a 'b c' | d &&\\\n  e # f\ncat <<END >g\nh\nEND\n\nx \"y\nz\" 2>&1\n"
    assert list(simple_commands(script)) == [
        (1, ["a", "b c"]),
        (1, ["d"]),
        (1, ["e"]),
        (3, ["cat"]),
        (7, ["x", "y\nz"]),
    ]
