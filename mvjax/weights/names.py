"""Published names of the video DiT and of the action decoder."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mvjax.models.wan_vae import WanVAEConfig
from mvjax.weights.files import Tensors, TorchTensor, WeightsError

# Which published tensor is which of our parameters, and how its axes lie.
#
# A table of rules says everything about one network in one published layout; conversion in both
# directions, and the check that nothing is missing, are the same code for all tables.


class Layout(NamedTuple):
    """How a PyTorch tensor's axes become ours.

    Attributes:
        permute: our axes in terms of the tensor's, after its unit axes are dropped; () keeps them.
        units: trailing axes of length one that only PyTorch has.
    """

    permute: tuple[int, ...] = ()
    units: int = 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our array, a view where possible."""
        array = tensor.reshape(self._without_units(tensor.shape))
        return array.transpose(self.permute) if self.permute else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.permute:
            array = array.transpose(np.argsort(self.permute))
        return array.reshape(*array.shape, *(1,) * self.units)

    def ours_shape(self, tensor: Sequence[int]) -> tuple[int, ...]:
        """Our array's shape, from the tensor's."""
        shape = self._without_units(tuple(tensor))
        return tuple(shape[axis] for axis in self.permute) if self.permute else shape

    def torch_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, from our array's."""
        order = np.argsort(self.permute) if self.permute else range(len(ours))
        return (*(ours[axis] for axis in order), *(1,) * self.units)

    def _without_units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[: len(shape) - self.units]


SAME = Layout()
LINEAR = Layout((1, 0))  # [out, in] -> [in, out]
CONV2D = Layout((2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
CONV3D = Layout((2, 3, 4, 1, 0))  # [out, in, t, h, w] -> [t, h, w, in, out]
GAMMA2D = Layout(units=2)  # [c, 1, 1] -> [c]
GAMMA3D = Layout(units=3)  # [c, 1, 1, 1] -> [c]


class Rule(NamedTuple):
    """One tensor; or one per block, stacked on our leading axis, where `torch` holds "{i}".

    Attributes:
        torch: the published name, e.g. "blocks.{i}.mlp.layer1.weight".
        ours: the dotted path in our tree, e.g. "blocks.mlp.layer1.kernel".
        layout: how the axes lie.
    """

    torch: str
    ours: str
    layout: Layout = SAME


Rules = list[Rule]


_DIFFUSERS = {  # names of layers in `CosmosTransformer3DModel`, by ours
    "x_embedder": "patch_embed.proj",
    "t_embedder.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "text_projection": "crossattn_proj.0",
    "final_layer.linear": "proj_out",
    "final_layer.adaln.down": "norm_out.linear_1",
    "final_layer.adaln.up": "norm_out.linear_2",
}
_DIFFUSERS_BLOCK = {  # names of parts of a block
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "mlp": "ff",
    "layer1": "net.0.proj",
    "layer2": "net.2",
    "adaln_self_attn": "norm1",
    "adaln_cross_attn": "norm2",
    "adaln_mlp": "norm3",
    "down": "linear_1",
    "up": "linear_2",
}


def _kernel(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR)


def _scale(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}.scale")


def _bias(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.bias", f"{ours}.bias")


def _blocks() -> Rules:
    theirs, ours = "blocks.{i}", "blocks"
    rules = []
    for attention in ("self_attn", "cross_attn"):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            rules.append(_kernel(f"{theirs}.{attention}.{name}", f"{ours}.{attention}.{name}"))
        for name in ("q_norm", "k_norm"):
            rules.append(_scale(f"{theirs}.{attention}.{name}", f"{ours}.{attention}.{name}"))
    for name in ("layer1", "layer2"):
        rules.append(_kernel(f"{theirs}.mlp.{name}", f"{ours}.mlp.{name}"))
    for part in ("self_attn", "cross_attn", "mlp"):
        published = f"{theirs}.adaln_modulation_{part}"
        rules.append(_kernel(f"{published}.1", f"{ours}.adaln_{part}.down"))
        rules.append(_kernel(f"{published}.2", f"{ours}.adaln_{part}.up"))
    return rules


_FINAL = [
    _kernel("final_layer.linear", "final_layer.linear"),
    _kernel("final_layer.adaln_modulation.1", "final_layer.adaln.down"),
    _kernel("final_layer.adaln_modulation.2", "final_layer.adaln.up"),
    _scale("t_embedding_norm", "t_embedding_norm"),
]


def video_dit(text_projection: bool = False) -> Rules:
    """The video DiT in NVIDIA's and mimic-video's files, after the prefix `net.`.

    Args:
        text_projection: whether text is projected first (Predict2.5, `crossattn_proj`).
    """
    projection = (
        [
            _kernel("crossattn_proj.0", "text_projection"),
            _bias("crossattn_proj.0", "text_projection"),
        ]
        if text_projection
        else []
    )
    return [
        _kernel("x_embedder.proj.1", "x_embedder"),
        _kernel("t_embedder.1.linear_1", "t_embedder.linear_1"),
        _kernel("t_embedder.1.linear_2", "t_embedder.linear_2"),
        *projection,
        *_blocks(),
        *_FINAL,
    ]


def video_dit_diffusers(text_projection: bool = False) -> Rules:
    """The video DiT as diffusers' `CosmosTransformer3DModel`."""
    return [
        rule._replace(torch=f"{_diffusers_layer(rule)}.{rule.torch.rpartition('.')[2]}")
        for rule in video_dit(text_projection)
    ]


def _diffusers_layer(rule: Rule) -> str:
    layer = rule.ours.rpartition(".")[0]
    if not layer.startswith("blocks."):
        return _DIFFUSERS[layer]
    parts = (_DIFFUSERS_BLOCK[part] for part in layer.split(".")[1:])
    return ".".join(["transformer_blocks.{i}", *parts])


def action_decoder(proprio_layers: int, action_layers: int) -> Rules:
    """The action decoder in mimic-video's files, after the prefix `net.`.

    Args:
        proprio_layers, action_layers: linear layers of the embedders; 3 in the releases.
    """
    rules = [
        Rule("ctx_norm.weight", "context_norm.scale"),
        Rule("ctx_norm.bias", "context_norm.bias"),
        Rule("obs_mask_token", "proprio_mask_token"),
        Rule("pos_embedding", "position"),
        _kernel("t_embedder.pair.A", "t_embedder.to_shared"),
    ]
    pairs = [
        ("t_embedder.pair.proj_x", "t_embedder.proj_action"),
        ("t_embedder.pair.proj_c", "t_embedder.proj_video"),
        ("t_embedder.pair.B", "t_embedder.to_rank_action"),
        ("t_embedder.pair.C", "t_embedder.to_rank_video"),
    ]
    for theirs, ours, layers in (
        ("obs_embedder", "proprio_embedder", proprio_layers),
        ("action_embedder", "action_embedder", action_layers),
    ):  # every other layer of theirs is a GELU
        pairs += [(f"{theirs}.layers.{2 * i}", f"{ours}.layer{i}") for i in range(layers)]
    for theirs, ours in pairs:
        rules += [_kernel(theirs, ours), _bias(theirs, ours)]
    return [*rules, *_blocks(), *_FINAL]


def with_adapters(rules: Rules, targets: tuple[str, ...]) -> Rules:
    """The rules of a network whose layers in `targets` carry peft adapters.

    peft's `inject_adapter_in_model` with the adapter name "default" moves `x.weight` to
    `x.base_layer.weight` and adds `x.lora_A.default.weight` and `x.lora_B.default.weight`.
    """
    adapted = []
    for rule in rules:
        layer, _, leaf = rule.ours.rpartition(".")
        if leaf != "kernel" or layer.rpartition(".")[2] not in targets:
            adapted.append(rule)
            continue
        name = rule.torch.removesuffix(".weight")
        adapted += [
            Rule(f"{name}.base_layer.weight", rule.ours, LINEAR),
            Rule(f"{name}.lora_A.default.weight", f"{layer}.lora_a", LINEAR),
            Rule(f"{name}.lora_B.default.weight", f"{layer}.lora_b", LINEAR),
        ]
    return adapted


# T5's encoder as Hugging Face publishes it (`google-t5/t5-11b`), and our `T5Encoder`.


_BLOCK = "encoder.block.{i}.layer"

T5: Rules = [
    Rule("shared.weight", "token_embedding", SAME),
    # Published in block 0 because the first block computes it; every block uses it.
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_bias",
        SAME,
    ),
    Rule(f"{_BLOCK}.0.layer_norm.weight", "blocks.attn_norm.scale", SAME),
    Rule(f"{_BLOCK}.0.SelfAttention.q.weight", "blocks.q_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.k.weight", "blocks.k_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.v.weight", "blocks.v_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.o.weight", "blocks.output_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.layer_norm.weight", "blocks.mlp_norm.scale", SAME),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi.weight", "blocks.layer1.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.DenseReluDense.wo.weight", "blocks.layer2.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale", SAME),
]

# The same tensor under a second name; a file may hold either or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}

# Checkpoints of the whole T5 also hold what writes text; nothing here uses it.
IGNORED = ("decoder.", "lm_head.")


# The Wan 2.1 VAE under its published names and under those of diffusers.
#
# Both tables come from one walk over our network: the two layouts hold the same tensors in the same
# shapes, and differ in how they call a module.


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


# LoRA adapters as peft stores them beside the layers they adapt.
#
# `inject_adapter_in_model` with the adapter name "default" moves `x.weight` to
# `x.base_layer.weight` and adds `x.lora_A.default.weight` [rank, in] and `x.lora_B.default.weight`
# [out, rank]; the layer computes W x + (alpha / rank) B A x. alpha is not stored; 32 is published.


_BASE, _A, _B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def has_adapters(tensors: Tensors) -> bool:
    """Whether the tensors are those of a network with adapters."""
    return any(name.endswith((_A, _B, _BASE)) for name in tensors)


def adapter_rank(tensors: Tensors) -> int:
    """The rank all adapters have.

    Raises:
        WeightsError: if ranks differ.
    """
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith(_A)}
    if len(ranks) != 1:
        raise WeightsError(f"adapters of one rank are expected, found ranks {sorted(ranks)}.")
    return ranks.pop()


def adapted_layers(tensors: Tensors) -> tuple[str, ...]:
    """Published names of the adapted layers, e.g. "q_proj", "x_embedder.proj.1", in file order."""
    layers = (
        re.sub(r"^(blocks\.\d+\.\w+\.|t_embedder\.1\.)", "", name.removesuffix(_BASE))
        for name in tensors
        if name.endswith(_BASE)
    )
    return tuple(dict.fromkeys(layers))


def merge_adapters(tensors: Tensors, alpha: float) -> Tensors:
    """The tensors of the network without adapters; products are made when a tensor is read.

    Raises:
        WeightsError: if parts of adapters are missing; all of them are listed.
    """
    merged, missing = {}, []
    for name, tensor in tensors.items():
        if name.endswith(_BASE):
            layer = name.removesuffix(_BASE)
            parts = [layer + _A, layer + _B]
            absent = [part for part in parts if part not in tensors]
            missing += absent
            if not absent:
                a, b = (tensors[part] for part in parts)
                read = partial(_merged, tensor, a, b, alpha)
                merged[f"{layer}.weight"] = TorchTensor(tensor.shape, tensor.dtype, read)
        elif name.endswith((_A, _B)):
            base = name.removesuffix(_A).removesuffix(_B) + _BASE
            if base not in tensors:
                missing.append(base)
        else:
            merged[name] = tensor
    if missing:
        raise WeightsError(f"adapters are incomplete; missing: {', '.join(sorted(set(missing)))}.")
    return merged


def _merged(base: TorchTensor, a: TorchTensor, b: TorchTensor, alpha: float) -> np.ndarray:
    low, high = (part.read().astype(np.float32) for part in (a, b))
    return (base.read().astype(np.float32) + alpha / a.shape[0] * (high @ low)).astype(base.dtype)
