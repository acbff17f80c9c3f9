"""The shape of a clip: the configured lengths, and those that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SPATIAL, TEMPORAL, CHANNELS = 8, 4, 16  # the video tokenizer's compression, latent channels
PATCH = 2  # a token of the video DiT covers 2×2 latents of one latent frame
PIXELS_PER_TOKEN = SPATIAL * PATCH  # along height and width
VIDEO = "video"  # the name of the predicted view


@dataclass(frozen=True)
class Clip:
    """What a model sees: observed frames up to now, then future frames, and observed views.

    A view is a picture beside the video that has observed frames only, such as a wrist camera's.
    """

    height: int  # pixels, a multiple of 16
    width: int
    observed_frames: int  # up to and including now, 1 + 4k
    future_frames: int  # after now, a multiple of 4
    fps: float
    views: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # name -> height, width

    def __post_init__(self):
        _check_pixels("clip", self.height, self.width)
        for name, size in self.views.items():
            if name == VIDEO or not name.isidentifier():
                raise ValueError(
                    f"clip.views has a view named {name!r}; a name is a word such as wrist, and "
                    f"{VIDEO!r} is the name of the predicted view."
                )
            if set(size) != {"height", "width"}:
                raise ValueError(
                    f"clip.views.{name} must be its height and width, got {dict(size)}."
                )
            _check_pixels(f"clip.views.{name}", **size)
        if self.observed_frames < 1 or (self.observed_frames - 1) % TEMPORAL:
            raise ValueError(
                "clip.observed_frames must be 1 + 4k (the tokenizer takes the first frame alone, "
                f"then groups of four), got {self.observed_frames}."
            )
        if self.future_frames < TEMPORAL or self.future_frames % TEMPORAL:
            raise ValueError(
                f"clip.future_frames must be a positive multiple of 4, got {self.future_frames}."
            )
        if self.fps <= 0:
            raise ValueError(f"clip.fps must be positive, got {self.fps}.")

    @property
    def frames(self) -> int:
        """Observed and future frames together."""
        return self.observed_frames + self.future_frames

    @property
    def latent_frames(self) -> int:
        """Latent frames of the whole clip."""
        return 1 + (self.frames - 1) // TEMPORAL

    @property
    def condition_latents(self) -> int:
        """Latent frames of the observed part, which condition the video model."""
        return 1 + (self.observed_frames - 1) // TEMPORAL

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(latent frames, height, width, channels)."""
        return (self.latent_frames, self.height // SPATIAL, self.width // SPATIAL, CHANNELS)

    @property
    def tokens(self) -> int:
        """Tokens of the video DiT for the video, without those of views."""
        return tokens(self.latent_shape)

    @property
    def all_tokens(self) -> int:
        """Tokens of the video DiT for the video and all views: the length of its sequence."""
        return self.tokens + sum(map(tokens, self.view_shapes.values()))

    def read_shapes(self, observed_only: bool) -> tuple[tuple[int, ...], ...]:
        """As `latent_shape`, of the video or of its observed frames alone, and of every view."""
        frames, *size = self.latent_shape
        frames = self.condition_latents if observed_only else frames
        return (frames, *size), *self.view_shapes.values()

    @property
    def view_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """As `latent_shape`, of every view in the order of their names."""
        return {
            name: (
                self.condition_latents,
                self.views[name]["height"] // SPATIAL,
                self.views[name]["width"] // SPATIAL,
                CHANNELS,
            )
            for name in sorted(self.views)
        }


def tokens(latent_shape: tuple[int, ...]) -> int:
    """Tokens of the video DiT for latents (frames, height, width, ...)."""
    t, h, w = latent_shape[:3]
    return t * (h // PATCH) * (w // PATCH)


def _check_pixels(section: str, height: int, width: int) -> None:
    for name, pixels in (("height", height), ("width", width)):
        if pixels < PIXELS_PER_TOKEN or pixels % PIXELS_PER_TOKEN:
            raise ValueError(
                f"{section}.{name} must be a multiple of {PIXELS_PER_TOKEN} pixels, got {pixels}."
            )


def check_frames(frames: int) -> None:
    """Raises ValueError unless a video has 1 + 4k frames, as the video tokenizer requires."""
    if frames < 1 or (frames - 1) % TEMPORAL:
        raise ValueError(f"A clip of {frames} frames cannot be tokenized; use 1 + 4k frames.")
