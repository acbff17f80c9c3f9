"""Sizes, precision and latent statistics of a Wan VAE."""

from dataclasses import dataclass

from mvjax.models.precision import compute_dtype

# Mean and standard deviation of the released model's latents, per channel.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes and precision of a Wan VAE; `mvjax.models.presets` names the released one.

    Attributes:
        dim: channels at full resolution, even.
        channel_multipliers: width of each of the four resolutions, in units of `dim`.
        num_res_blocks: residual blocks per resolution (the decoder has one more).
        latent_channels: channels of the latents.
        temporal_downsample: which of the three halvings of the picture also halve time; two do.
        latent_mean, latent_std: statistics by which latents are normalised, one per channel.
        precision: "float32"; "bfloat16" (norms and latent statistics stay float32); or "published",
            which rounds norms and latent statistics to bfloat16 too, like the release.
        chunk: latent frames computed at a time, which bounds the memory; 0 takes the whole clip.
    """

    dim: int = 96
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    precision: str = "float32"
    chunk: int = 0

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(
                f"Wan VAE dim must be even (the decoder halves it), 2 or more; got {self.dim}."
            )
        if len(self.channel_multipliers) != 4 or min(self.channel_multipliers) < 1:
            raise ValueError(
                "Wan VAE channel_multipliers must be four positive numbers, one per resolution "
                f"(8x is three halvings); got {self.channel_multipliers}."
            )
        if len(self.temporal_downsample) != 3 or sum(self.temporal_downsample) != 2:
            raise ValueError(
                "Wan VAE temporal_downsample must be three booleans, two of them True (4x in "
                f"time is two halvings); got {self.temporal_downsample}."
            )
        if self.num_res_blocks < 1:
            raise ValueError(
                f"Wan VAE num_res_blocks must be 1 or more; got {self.num_res_blocks}."
            )
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"Wan VAE {name} has {len(getattr(self, name))} entries for "
                    f"{self.latent_channels} latent_channels; give one per channel."
                )
        if min(self.latent_std) <= 0:
            raise ValueError(f"Wan VAE latent_std must be positive; got {self.latent_std}.")
        compute_dtype(self.precision)
        if self.chunk < 0:
            raise ValueError(
                f"Wan VAE chunk is {self.chunk}; use a number of latent frames, or 0 for the "
                "whole clip at once."
            )

    @property
    def dtype(self) -> str:
        """The dtype of activations and, at use, of weights."""
        return compute_dtype(self.precision)

    @property
    def rounded(self) -> bool:
        """Whether norms and latent statistics are rounded to bfloat16."""
        return self.precision == "published"

    @property
    def encoder_widths(self) -> list[tuple[int, int]]:
        """(channels in, channels out) of the residual blocks of each level of the encoder."""
        out = [self.dim * m for m in self.channel_multipliers]
        return list(zip([self.dim, *out], out))

    @property
    def decoder_widths(self) -> list[tuple[int, int]]:
        """The same for the decoder, coarsest first; `Up` between levels halves the channels."""
        out = [self.dim * m for m in self.channel_multipliers[::-1]]
        return list(zip([out[0], *(d // 2 for d in out)], out))
