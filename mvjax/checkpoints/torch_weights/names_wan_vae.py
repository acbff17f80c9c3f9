"""The Wan 2.1 VAE under its published names and under those of diffusers.

Both tables come from one walk over our network: the two layouts hold the same tensors in the same
shapes, and differ in how they call a module.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mvjax.checkpoints.torch_weights.rules import (
    CONV2D,
    CONV3D,
    GAMMA2D,
    GAMMA3D,
    Layout,
    Rule,
    Rules,
)
from mvjax.models.wan_vae_config import WanVAEConfig

POINTWISE2D = Layout((1, 0), units=2)  # [out, in, 1, 1] -> [in, out]
POINTWISE3D = Layout((1, 0), units=3)  # [out, in, 1, 1, 1] -> [in, out]


class Names(NamedTuple):
    """What one module is called: here, in the release, in diffusers."""

    ours: str
    published: str
    diffusers: str

    def __truediv__(self, child: "Names") -> "Names":
        """The module `child` inside this one."""
        return Names(*(f"{parent}.{name}" for parent, name in zip(self, child)))


Module = tuple[Names, Layout]  # a module with weights, and the layout of its weight or gamma


def wan_vae(config: WanVAEConfig) -> Rules:
    """The table of the release: `Wan2.1_VAE.pth`, the `tokenizer.pth` of Cosmos-Predict2."""
    return [rule for names, layout in _modules(config) for rule in _rules(names, 1, layout)]


def wan_vae_diffusers(config: WanVAEConfig) -> Rules:
    """The table of diffusers' `AutoencoderKLWan`."""
    return [rule for names, layout in _modules(config) for rule in _rules(names, 2, layout)]


def _rules(names: Names, column: int, layout: Layout) -> Rules:
    ours, torch = names.ours, names[column]
    if layout in (GAMMA2D, GAMMA3D):
        return [Rule(f"{torch}.gamma", f"{ours}.scale", layout)]
    return [
        Rule(f"{torch}.weight", f"{ours}.kernel", layout),
        Rule(f"{torch}.bias", f"{ours}.bias"),
    ]


def _modules(config: WanVAEConfig) -> Iterator[Module]:
    yield Names("quant_conv", "conv1", "quant_conv"), POINTWISE3D
    yield Names("post_quant_conv", "conv2", "post_quant_conv"), POINTWISE3D
    for part, levels in (("encoder", _encoder_levels), ("decoder", _decoder_levels)):
        root = Names(part, part, part)
        yield root / Names("conv_in", "conv1", "conv_in"), CONV3D
        yield from levels(config)
        yield from _middle(root)
        yield root / Names("norm_out", "head.0", "norm_out"), GAMMA3D
        yield root / Names("conv_out", "head.2", "conv_out"), CONV3D


def _encoder_levels(config: WanVAEConfig) -> Iterator[Module]:
    # Both layouts count the blocks and the downsamplings in one list.
    index = 0
    for level, (d_in, d_out) in enumerate(config.encoder_widths):
        for i in range(config.num_res_blocks):
            theirs = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            block = Names(f"encoder.level_{level}.block_{i}", *theirs)
            yield from _block(block, shortcut=i == 0 and d_in != d_out)
            index += 1
        if level < len(config.temporal_downsample):
            theirs = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            resample = Names(f"encoder.level_{level}.resample", *theirs)
            yield from _resample(resample, config.temporal_downsample[level])
            index += 1


def _decoder_levels(config: WanVAEConfig) -> Iterator[Module]:
    # The release counts in one list here too; diffusers counts within levels.
    index = 0
    for level, (d_in, d_out) in enumerate(config.decoder_widths):
        diffusers = f"decoder.up_blocks.{level}"
        for i in range(config.num_res_blocks + 1):
            theirs = f"decoder.upsamples.{index}", f"{diffusers}.resnets.{i}"
            block = Names(f"decoder.level_{level}.block_{i}", *theirs)
            yield from _block(block, shortcut=i == 0 and d_in != d_out)
            index += 1
        if level < len(config.temporal_downsample):
            theirs = f"decoder.upsamples.{index}", f"{diffusers}.upsamplers.0"
            resample = Names(f"decoder.level_{level}.resample", *theirs)
            yield from _resample(resample, config.temporal_downsample[::-1][level])
            index += 1


def _middle(root: Names) -> Iterator[Module]:
    middle = root / Names("middle", "middle", "mid_block")
    yield from _block(middle / Names("block_0", "0", "resnets.0"), shortcut=False)
    attention = middle / Names("attention", "1", "attentions.0")
    yield attention / Names("norm", "norm", "norm"), GAMMA2D
    yield attention / Names("qkv", "to_qkv", "to_qkv"), POINTWISE2D
    yield attention / Names("proj", "proj", "proj"), POINTWISE2D
    yield from _block(middle / Names("block_1", "2", "resnets.1"), shortcut=False)


def _block(block: Names, shortcut: bool) -> Iterator[Module]:
    yield block / Names("norm1", "residual.0", "norm1"), GAMMA3D
    yield block / Names("conv1", "residual.2", "conv1"), CONV3D
    yield block / Names("norm2", "residual.3", "norm2"), GAMMA3D
    yield block / Names("conv2", "residual.6", "conv2"), CONV3D
    if shortcut:
        yield block / Names("shortcut", "shortcut", "conv_shortcut"), POINTWISE3D


def _resample(resample: Names, temporal: bool) -> Iterator[Module]:
    yield resample / Names("conv", "resample.1", "resample.1"), CONV2D
    if temporal:
        yield resample / Names("time_conv", "time_conv", "time_conv"), CONV3D
