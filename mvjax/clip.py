"""The lengths of a clip: a few are configured, the others follow from them."""

from dataclasses import dataclass

SPATIAL, TEMPORAL, CHANNELS, PATCH = 8, 4, 16, 2  # compression of the tokenizer; patch of the DiT


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
            if getattr(self, name) < 16 or getattr(self, name) % (SPATIAL * PATCH):
                raise ValueError(
                    f"clip.{name} must be a multiple of {SPATIAL * PATCH} pixels (8x8 pixels to a "
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
        return self.latent_frames * (self.height // 16) * (self.width // 16)
