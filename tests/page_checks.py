"""Checks of HTML pages in a real Chromium: a page is read as a person with a small screen, a dark
theme or only a keyboard would read it.

    python tests/page_checks.py runs/quickstart/report.html [SCREENSHOTS]

prints what is wrong, in light and dark, on a phone and on a desktop. A site's page is checked with
`page_problems(browser, site / "index.html", root=site, content="article")`.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

ORIGIN = "http://localhost"  # no server: every request is answered from files, or is a problem
WIDTHS, HEIGHT = (380, 1280), 800
SCHEMES = ("light", "dark")
CONTROLS = "a[href], button, input, select, textarea, summary, video[controls], [tabindex='0']"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(Exception):
    """Playwright, axe or Chromium is missing."""


@contextmanager
def chromium() -> Iterator:
    """An installed Chromium, or the one of Playwright; `NoBrowser` says what is missing."""
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise NoBrowser(f"{error.name} is not installed (it is in the docs extra)") from None
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error as error:
            raise NoBrowser(f"no Chromium: {str(error).splitlines()[0]}") from None
        yield browser
        browser.close()


def page_problems(
    browser,
    path: Path,
    *,
    width: int = 1280,
    scheme: str = "light",
    root: Path | None = None,
    content: str = "body",
    screenshots: Path | None = None,
) -> list[str]:
    """Opens a page and says what is wrong with it.

    Args:
        browser: of `chromium`.
        path: the page's file.
        width: of the window, in pixels.
        scheme: "light" or "dark".
        root: the folder of the site that the page belongs to; default: the page's own.
        content: a selector of the part that is checked, such as "article" where the rest of the
            page is a theme's. Requests, errors, landmarks and the page's width are always checked.
        screenshots: a folder that receives a picture of the whole page.
    """
    found: list[str] = []
    with opened(browser, path, found, root=root, width=width, scheme=scheme) as page:
        found += page.evaluate(_LOOK, content)
        if screenshots:  # now that pictures and videos are there
            screenshots.mkdir(parents=True, exist_ok=True)
            picture = screenshots / f"{path.stem}_{scheme}_{width}.png"
            page.screenshot(path=picture, full_page=True)
        found += _axe(page, content)
        found += _keyboard(page, content)
    return found


@contextmanager
def opened(
    browser,
    path: Path,
    found: list[str],
    *,
    root: Path | None = None,
    width: int = 1280,
    scheme: str = "light",
    motion: str = "reduce",
) -> Iterator:
    """A page without a network; failed and other requests and errors are added to `found`."""
    root = (root or path.parent).resolve()

    def answer(route) -> None:
        url = urlsplit(route.request.url)
        file = root / unquote(url.path).lstrip("/")
        file = file / "index.html" if file.is_dir() else file
        if f"{url.scheme}://{url.netloc}" != ORIGIN:
            found.append(f"asks the network for {route.request.url}")
            route.abort()
        elif not file.is_file():
            found.append(f"there is no file {url.path}")
            route.fulfill(status=404)
        else:
            route.fulfill(path=file)

    size = {"width": width, "height": HEIGHT}
    how = dict(viewport=size, color_scheme=scheme, reduced_motion=motion)
    with browser.new_context(**how) as context:
        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: found.append(f"script: {error}"))
        page.goto(f"{ORIGIN}/{path.resolve().relative_to(root).as_posix()}")
        yield page


# Returns sentences about the part of the page that a selector names.
_LOOK = r"""async (selector) => {
  const found = [], content = document.querySelector(selector);
  if (!content) return [`there is no ${selector}`];
  const all = (what, from = content) => [...from.querySelectorAll(what)];
  const text = (e) => (e.getAttribute("aria-label") || e.textContent || "").trim().slice(0, 40);
  const named = (e) => `<${e.tagName.toLowerCase()}> "${text(e)}"`;
  const labelled = (e) => e.getAttribute("aria-label") || e.getAttribute("aria-labelledby");

  if (!document.documentElement.lang) found.push("the page has no language");
  for (const one of ["h1", "main"])
    if (all(one, document).length !== 1) found.push(`${all(one, document).length} <${one}>`);

  // Width.
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) found.push(`the page scrolls sideways: ${wide} > ${innerWidth} pixels`);
  const scrolls = (e) => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  // Themes let a wide block reach the edge of the window: only a section holds what is in it.
  for (const box of all("section").concat(content)) {
    const outer = box === content ? { left: 0, right: innerWidth } : box.getBoundingClientRect();
    const walk = (e) => {
      if (!e.checkVisibility() || e.className === "skip") return;
      const inner = e.getBoundingClientRect();
      if (inner.width && (inner.right > outer.right + 1 || inner.left < outer.left - 1))
        found.push(`${named(e)} sticks out of ${named(box)}`);
      else if (e.tagName !== "svg" && !scrolls(e)) [...e.children].forEach(walk);
    };
    [...box.children].forEach(walk);
  }

  // Pictures, figures and videos.
  for (const image of all("img")) {
    image.loading = "eager";
    await image.decode().catch(() => {});
    if (!image.naturalWidth) found.push(`picture "${image.alt}" does not load`);
    if (!image.alt && image.getAttribute("role") !== "presentation")
      found.push(`a picture has no text: ${image.src.slice(0, 60)}`);
  }
  for (const svg of all("svg")) {
    const hidden = svg.closest("[aria-hidden='true'], a, button, label");
    if (!hidden && !(svg.getAttribute("role") === "img" && labelled(svg)))
      found.push("a figure has no text");
    const frame = svg.getBoundingClientRect();
    for (const label of all("text", svg)) {
      const r = label.getBoundingClientRect();
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1
          || r.bottom > frame.bottom + 1) found.push(`a figure cuts off "${label.textContent}"`);
      const ratio = contrast(getComputedStyle(label).fill, label);
      if (ratio < 4.5) found.push(`"${label.textContent}" has a contrast of ${ratio.toFixed(1)}`);
    }
    for (const curve of all("[style*='--series']", svg)) {
      const { stroke, fill } = getComputedStyle(curve);
      const ratio = contrast(stroke === "none" ? fill : stroke, curve);
      if (ratio < 3) found.push(`a curve of "${text(svg)}" has a contrast of ${ratio.toFixed(1)}`);
    }
  }
  const decodes = document.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"');
  for (const video of all("video")) {
    if (!labelled(video)) found.push("a video has no text");
    if (!video.controls) found.push(`${named(video)} has no controls`);
    if (!decodes) continue;
    for (let i = 0; i < 100 && !video.videoWidth && !video.error; i++)
      await new Promise((then) => setTimeout(then, 50));
    if (!video.videoWidth) found.push(`${named(video)} does not play`);
  }

  function contrast(colour, element) {
    let behind = element;
    while (behind && ["rgba(0, 0, 0, 0)", ""].includes(getComputedStyle(behind).backgroundColor))
      behind = behind.parentElement;
    const light = (rgb) => {
      const [r, g, b] = rgb.match(/[\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const [low, high] = [light(colour), light(background)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }
  return [...new Set(found)];
}"""


def _axe(page, content: str) -> list[str]:
    """The serious and critical violations that axe-core finds."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"]}
    violations = Axe().run(page, context=content, options=options).response["violations"]
    return [
        f"axe, {v['impact']}, {v['id']}: {v['help']}: {node['html'][:160]}"
        for v in violations
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"][:3]
    ]


# Marks the visible controls, and returns their names.
_MARK = """([selector, controls]) => {
  const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length;
  const content = document.querySelector(selector);
  const all = [...content.querySelectorAll(controls)].filter((e) => !e.disabled && seen(e));
  all.forEach((e, i) => { e.dataset.control = i; });
  return all.map((e) => `<${e.tagName.toLowerCase()}> `
    + (e.getAttribute("aria-label") || e.textContent).trim().slice(0, 40));
}"""

# The mark of what has the focus, and whether a reader sees that it has.
_FOCUS = """() => {
  const e = document.activeElement, style = getComputedStyle(e), r = e.getBoundingClientRect();
  const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
  const there = r.bottom > 0 && r.top < innerHeight && r.right > 0 && r.left < innerWidth;
  return [e.dataset.control ?? null, (ring || style.boxShadow !== "none") && there];
}"""


def _keyboard(page, content: str) -> list[str]:
    """The controls that Tab does not reach, or whose focus nobody sees."""
    names = page.evaluate(_MARK, [content, CONTROLS])
    reached: dict[int, bool] = {}
    for _ in range(8 * len(names) + 50):  # a video has several controls, a theme its own
        if len(reached) == len(names):
            break
        page.keyboard.press("Tab")
        control, visible = page.evaluate(_FOCUS)
        if control is not None:
            reached[int(control)] = reached.get(int(control), False) or visible
    return [
        f"Tab does not reach {name}" if i not in reached else f"the focus of {name} is not visible"
        for i, name in enumerate(names)
        if not reached.get(i)
    ]


def main(file: str, screenshots: str = "") -> int:
    """Prints what is wrong with a page, and returns 1 if anything is."""
    bad, pictures = False, Path(screenshots) if screenshots else None
    with chromium() as browser:
        for scheme in SCHEMES:
            for width in WIDTHS:
                how = dict(width=width, scheme=scheme, screenshots=pictures)
                found = page_problems(browser, Path(file), **how)
                print(f"{scheme}, {width} pixels: {len(found)} problems", *found, sep="\n  ")
                bad |= bool(found)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
