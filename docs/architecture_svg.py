"""Draws `pictures/architecture.svg`: the released mimic-video model, from frames to actions.

The picture has its own background, and colours for light and dark pages.
"""

import random
from collections.abc import Iterator
from xml.sax.saxutils import escape

from data_pipelines.clip import PIXELS_PER_TOKEN, Clip
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS

WIDTH, HEIGHT = 720, 1070  # at a phone's width, 20 units are about 10 pixels
LEFT, RIGHT = 24, WIDTH - 24
LAYER = 20  # the block after which the released decoders read the video DiT
EULER_STEPS = 10

STYLE = """
text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif;
  font-size: 20px; fill: var(--ink) }
.title { font-size: 24px; font-weight: 600 }
.soft { fill: var(--soft) }
.middle { text-anchor: middle }
.end { text-anchor: end }
.page { fill: var(--page) }
.line { stroke: var(--soft); stroke-width: 2.5; fill: none }
.dashed { stroke-dasharray: 5 4 }
.head { fill: var(--soft) }
.frozen { fill: var(--grey); stroke: var(--grey-line) }
.video { fill: var(--blue); stroke: var(--blue-line) }
.action { fill: var(--orange); stroke: var(--orange-line) }
.video-bar { fill: var(--blue-line) }
.unread { fill: none; stroke: var(--blue-line); stroke-width: 1.5; stroke-dasharray: 4 3 }
.action-bar { fill: var(--orange-line) }
.clean { fill: var(--clean); stroke: var(--soft) }
.noise { fill: var(--page); stroke: var(--soft) }
.grain { fill: var(--soft) }
svg { --page: #ffffff; --ink: #1f2328; --soft: #59636e; --grey: #eef0f2; --grey-line: #8c959f;
  --blue: #dcebfd; --blue-line: #0b62c4; --orange: #fdebd8; --orange-line: #b35900;
  --clean: #a9cdf7 }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --grey: #21262d; --grey-line: #6e7681;
    --blue: #10294a; --blue-line: #58a6ff; --orange: #3a2510; --orange-line: #f0a04b;
    --clean: #2d5c94 }
}
"""

DESCRIPTION = """
Five observed frames are encoded by the Wan VAE; the future is noise. The video DiT, which also
reads the instruction, is run up to block 20 of 28. The action decoder reads the hidden states after
this block by cross-attention and turns noise into a chunk of actions in ten Euler steps. Stage 1
trains the video DiT; stage 2 freezes it and trains the action decoder. The VAE and T5 are never
trained.
"""


def architecture_svg() -> str:
    """Returns the picture as the text of an SVG file."""
    clip = Clip(height=480, width=640, observed_frames=5, future_frames=56, fps=5.0)
    video, decoder = VIDEO_DITS["cosmos2b"], ACTION_DECODERS["bridge"]
    libero = ACTION_DECODERS["libero"]
    rows, columns = clip.height // PIXELS_PER_TOKEN, clip.width // PIXELS_PER_TOKEN
    latents = "×".join(map(str, clip.latent_shape[1:3]))
    seen, unseen = clip.condition_latents, clip.latent_frames - clip.condition_latents

    parts = [
        *_legend(40),
        _text(LEFT, 116, "Video", "title"),
        _text(
            RIGHT,
            116,
            f"{clip.height}×{clip.width}, {clip.frames} frames at {clip.fps:g} fps",
            "soft end",
        ),
        *_frames(132, clip.observed_frames),
        _text(LEFT, 220, f"{clip.observed_frames} observed frames"),
        _text(RIGHT, 220, f"{clip.future_frames} future frames, known only in training", "end"),
        _arrow(96, 232, 96, 260),
        _arrow(560, 232, 560, 260, "line dashed"),
        *_box("frozen", LEFT, 262, WIDTH - 48, 50),
        _text(LEFT + 18, 295, "Wan 2.1 VAE, encoder", "title"),
        _text(RIGHT - 16, 294, f"{clip.latent_frames} latent frames of {latents}", "end"),
        _arrow(96, 312, 96, 340),
        *_latents(344, seen, unseen),
        _text(LEFT, 412, f"{seen} observed"),
        _text(RIGHT, 412, f"{unseen} future: noised, or pure noise when acting", "end"),
        _arrow(400, 424, 400, 470),
        _text(414, 454, f"{clip.latent_frames}×{rows}×{columns} = {clip.tokens:,} tokens", "soft"),
        *_box("frozen", LEFT, 500, 132, 92, "T5-11B"),
        _text(LEFT + 66, 620, "instruction", "soft middle"),
        _arrow(156, 546, 190, 546),
        *_box("video", 192, 472, RIGHT - 192, 164),
        _text(210, 506, "Video DiT (Cosmos-Predict2 2B)", "title"),
        *_bars(210, 524, video.num_blocks, LAYER, 17.2, 12, 62),
        _text(210, 616, f"blocks 1 to {LAYER}"),
        _text(RIGHT - 16, 616, f"{LAYER + 1} to {video.num_blocks}", "end"),
        _arrow(210 + (LAYER - 0.15) * 17.2, 586, 210 + (LAYER - 0.15) * 17.2, 716),
        _text(LEFT, 668, "Context: hidden states after"),
        _text(LEFT, 694, f"block {LAYER}, {clip.tokens:,} tokens × {video.width:,}"),
        _text(RIGHT, 668, "needed for", "soft end"),
        _text(RIGHT, 694, "video only", "soft end"),
        *_box("action", 192, 718, RIGHT - 192, 152),
        _text(210, 752, "Action decoder", "title"),
        _text(RIGHT - 16, 752, f"width {decoder.width:,}", "end"),
        *_bars(210, 768, decoder.num_blocks, decoder.num_blocks, 20, 13, 50, "action-bar"),
        _text(210, 850, f"{decoder.num_blocks} blocks read the context by cross-attention"),
        _text(LEFT, 760, "proprioception"),
        _arrow(LEFT, 774, 190, 774),
        _text(LEFT, 822, "noise"),
        _arrow(LEFT, 836, 190, 836),
        *_loop(870, 932),
        _text(250, 908, f"{EULER_STEPS} Euler steps"),
        _arrow(600, 870, 600, 926),
        *_chunk(930),
        _text(LEFT, 968, "Action chunk", "title"),
        _text(LEFT, 998, f"{decoder.action_horizon} (Bridge) or {libero.action_horizon} (LIBERO)"),
        _text(LEFT, 1024, f"actions of {decoder.action_dim} numbers"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'role="img" aria-labelledby="title desc">'
    )
    return "\n".join(
        [
            head,
            '<title id="title">The architecture of mimic-video</title>',
            f'<desc id="desc">{escape(" ".join(DESCRIPTION.split()))}</desc>',
            f"<style>{STYLE}</style>",
            f"<defs>{_grain()}</defs>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{kind}>{escape(text)}</text>'


def _rect(kind: str, x: float, y: float, width: float, height: float, round: float = 0) -> str:
    corner = f' rx="{round:g}"' if round else ""
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corner}/>'
    )


def _box(
    kind: str, x: float, y: float, width: float, height: float, title: str = ""
) -> Iterator[str]:
    yield _rect(kind, x, y, width, height, round=8)
    if title:
        yield _text(x + width / 2, y + height / 2 + 8, title, "title middle")


def _head(x: float, y: float, direction: str) -> str:
    ends = {
        "down": ((-7, -11), (7, -11)),
        "right": ((-11, -7), (-11, 7)),
        "up": ((-7, 11), (7, 11)),
    }[direction]
    points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in ((0, 0), *ends))
    return f'<polygon class="head" points="{points}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float, style: str = "line") -> str:
    """A straight arrow, down or to the right."""
    down = x1 == x2
    shaft = f"M{x1:g} {y1:g}V{y2 - 8:g}" if down else f"M{x1:g} {y1:g}H{x2 - 8:g}"
    return f'<path class="{style}" d="{shaft}"/>' + _head(x2, y2, "down" if down else "right")


def _legend(y: float) -> Iterator[str]:
    for row, (kind, text) in enumerate(
        (
            ("video", "trained in stage 1 on video, frozen in stage 2"),
            ("action", "trained in stage 2 on robot demonstrations"),
            ("frozen", "never trained"),
        )
    ):
        x, line = (LEFT, y - 16 + 30 * row) if row < 2 else (516, y + 14)
        yield _rect(kind, x, line, 28, 20, round=4)
        yield _text(x + 38, line + 17, text)


def _frames(y: float, observed: int) -> Iterator[str]:
    """The observed frames as small pictures of a table and an arm, the future as a blank strip."""
    for i in range(observed):
        x, lean = LEFT + 30 * i, 3 * i
        yield _rect("clean", x, y, 84, 62, round=3)
        yield (
            f'<path class="line" d="M{x + 12} {y + 52}h60M{x + 22} {y + 50}'
            f'L{x + 30 + lean} {y + 18}L{x + 54 + lean / 2} {y + 24 + lean}"/>'
        )
    x = LEFT + 30 * observed + 66
    yield _rect("unread", x, y, RIGHT - x, 62, round=3)
    yield _text((x + RIGHT) / 2, y + 38, "?", "title middle")


def _latents(y: float, observed: int, noise: int) -> Iterator[str]:
    pitch = (RIGHT - LEFT + 6) / (observed + noise)
    side = pitch - 6
    for i in range(observed + noise):
        x = LEFT + pitch * i
        yield _rect("clean" if i < observed else "noise", x, y, side, side, round=2)
        if i >= observed:
            turn = f"rotate({90 * (i % 4)} {x + side / 2:g} {y + side / 2:g}) "
            yield f'<use href="#grain" transform="{turn}translate({x:g} {y:g})"/>'


def _grain() -> str:
    """Noise, drawn once and turned for each latent frame."""
    cells, side, draw = 7, 36, random.Random(0).random
    size = side / cells
    dots = [
        f'<rect x="{size * i:.1f}" y="{size * j:.1f}" width="{size:.1f}" height="{size:.1f}" '
        f'opacity="{draw():.2f}"/>'
        for i in range(cells)
        for j in range(cells)
    ]
    return f'<g id="grain" class="grain">{"".join(dots)}</g>'


def _bars(
    x: float,
    y: float,
    count: int,
    read: int,
    pitch: float,
    width: float,
    height: float,
    kind: str = "video-bar",
) -> Iterator[str]:
    for i in range(count):
        yield _rect(kind if i < read else "unread", x + pitch * i, y, width, height, round=2)


def _loop(y1: float, y2: float) -> Iterator[str]:
    """The chunk goes back into the decoder."""
    x1, x2 = 424, 232
    yield f'<path class="line" d="M{x1} {y1}V{y2 - 10}H{x2}V{y1 + 12}"/>'
    yield _head(x2, y1 + 2, "up")


def _chunk(y: float) -> Iterator[str]:
    """Curves in a frame: some numbers of an action over time."""
    x, width, height = 460, RIGHT - 460, 116
    yield _rect("action", x, y, width, height, round=8)
    for k, bends in enumerate(((30, -14, 22), (-22, 26, -10), (10, 12, -26))):
        middle = y + 32 + 26 * k
        points = [f"M{x + 16} {middle}"]
        for i, bend in enumerate(bends):
            points.append(f"q{(width - 32) / 6:g} {bend} {(width - 32) / 3:g} {(-1) ** i * 4}")
        yield f'<path class="line" d="{"".join(points)}"/>'
