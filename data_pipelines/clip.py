"""The lengths of a clip: a few are configured, the others follow from them."""

from dataclasses import dataclass

SPATIAL, TEMPORAL, CHANNELS = 8, 4, 16  # compression of the video tokenizer, and its channels
PATCH = 2  # a token of the video DiT covers 2×2 latents of one latent frame
PIXELS_PER_TOKEN = SPATIAL * PATCH  # in height and in width


@dataclass(frozen=True)
class Clip:
    """The video a model sees: observed frames up to now, then future ones.

    Attributes:
        height, width: pixels, multiples of 16.
        observed_frames: frames up to and including now, 1 + 4k.
        future_frames: frames after now, a multiple of 4.
        fps: frames per second.
    """

    height: int
    width: int
    observed_frames: int
    future_frames: int
    fps: float

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) < PIXELS_PER_TOKEN or getattr(self, name) % PIXELS_PER_TOKEN:
                raise ValueError(
                    f"clip.{name} must be a multiple of {PIXELS_PER_TOKEN} pixels (8x8 pixels to a "
                    f"latent, 2x2 latents to a token), got {getattr(self, name)}."
                )
        if self.observed_frames < 1 or (self.observed_frames - 1) % TEMPORAL:
            raise ValueError(
                "clip.observed_frames must be 1 + 4k (the tokenizer takes the first frame alone, "
                f"then groups of four), e.g. 1 or 5; got {self.observed_frames}."
            )
        if self.future_frames < TEMPORAL or self.future_frames % TEMPORAL:
            raise ValueError(
                f"clip has {self.observed_frames} observed and {self.future_frames} future frames, "
                f"{self.frames} together; the whole must be 1 + 4k: make clip.future_frames a "
                "positive multiple of 4."
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
        """(latent frames, height, width, channels) of the latents."""
        return (self.latent_frames, self.height // SPATIAL, self.width // SPATIAL, CHANNELS)

    @property
    def tokens(self) -> int:
        """Length of the video DiT's sequence."""
        return self.latent_frames * self.height * self.width // PIXELS_PER_TOKEN**2


def check_frames(frames: int) -> None:
    """Raises ValueError unless a video has the 1 + 4k frames that a video tokenizer takes."""
    if frames < 1 or (frames - 1) % TEMPORAL:
        lower = max(1, (frames - 1) // TEMPORAL * TEMPORAL + 1)
        raise ValueError(
            f"A clip of {frames} frames cannot be tokenized: the first frame stands alone and the "
            f"others are taken four at a time, so use 1 + 4k frames, e.g. {lower} or "
            f"{lower + TEMPORAL}."
        )
