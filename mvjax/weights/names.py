"""Published names: which tensor is which of our parameters, and the order of its axes.

A table of rules describes one network in one published layout. Conversion in both directions, and
the check that nothing is missing, are the same code for all tables. In this order: rules, video DiT
and action decoder, T5, Wan VAE, and the LoRA adapters of peft.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mvjax.models.lora import LoRA, merge_lora
from mvjax.models.wan_vae import WanVAEConfig
from mvjax.weights.files import Tensors, TorchTensor, WeightsError


class Layout(NamedTuple):
    """How a PyTorch tensor's axes become ours."""

    permute: tuple[int, ...] = ()  # our axes in terms of the tensor's; () keeps their order
    units: int = 0  # trailing axes of length one that only PyTorch has, not counted in `permute`

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns our array, a view where possible."""
        array = tensor.reshape(tensor.shape[: tensor.ndim - self.units])
        return array.transpose(self.permute) if self.permute else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.permute:
            array = array.transpose(np.argsort(self.permute))
        return array.reshape(*array.shape, *(1,) * self.units)

    def ours_shape(self, tensor: Sequence[int]) -> tuple[int, ...]:
        """Returns our array's shape; raises ValueError if the tensor has other axes."""
        return self.to_ours(np.broadcast_to(np.int8(0), tensor)).shape  # takes no memory

    def torch_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Returns the tensor's shape."""
        return self.to_torch(np.broadcast_to(np.int8(0), ours)).shape


SAME = Layout()
LINEAR = Layout((1, 0))  # [out, in] -> [in, out]
POINTWISE2D = Layout((1, 0), units=2)  # [out, in, 1, 1] -> [in, out]
POINTWISE3D = Layout((1, 0), units=3)  # [out, in, 1, 1, 1] -> [in, out]
CONV2D = Layout((2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
CONV3D = Layout((2, 3, 4, 1, 0))  # [out, in, t, h, w] -> [t, h, w, in, out]
GAMMA2D = Layout(units=2)  # [c, 1, 1] -> [c]
GAMMA3D = Layout(units=3)  # [c, 1, 1, 1] -> [c]


class Rule(NamedTuple):
    """One tensor; or one per block, stacked on our leading axis, if `torch` contains "{i}"."""

    torch: str  # the published name, e.g. "blocks.{i}.mlp.layer1.weight"
    ours: str  # the dotted path in our tree, e.g. "blocks.mlp.layer1.kernel"
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Whether the blocks' tensors are stacked on our leading axis."""
        return "{i}" in self.torch

    def name(self, block: int | None) -> str:
        """Returns the tensor's name; `block` matters if stacked."""
        return self.torch.replace("{i}", str(block))


Rules = list[Rule]


def _kernel(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR)


def _scale(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}.scale")


def _bias(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.bias", f"{ours}.bias")


# --- Video DiT and action decoder ---


def _blocks() -> Rules:
    rules = []
    for attention in ("self_attn", "cross_attn"):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            rules.append(_kernel(f"blocks.{{i}}.{attention}.{name}", f"blocks.{attention}.{name}"))
        for name in ("q_norm", "k_norm"):
            rules.append(_scale(f"blocks.{{i}}.{attention}.{name}", f"blocks.{attention}.{name}"))
    for name in ("layer1", "layer2"):
        rules.append(_kernel(f"blocks.{{i}}.mlp.{name}", f"blocks.mlp.{name}"))
    for part in ("self_attn", "cross_attn", "mlp"):
        published = f"blocks.{{i}}.adaln_modulation_{part}"
        rules.append(_kernel(f"{published}.1", f"blocks.adaln_{part}.down"))
        rules.append(_kernel(f"{published}.2", f"blocks.adaln_{part}.up"))
    return rules


_FINAL = [
    _kernel("final_layer.linear", "final_layer.linear"),
    _kernel("final_layer.adaln_modulation.1", "final_layer.adaln.down"),
    _kernel("final_layer.adaln_modulation.2", "final_layer.adaln.up"),
    _scale("t_embedding_norm", "t_embedding_norm"),
]


def video_dit(text_projection: bool = False) -> Rules:
    """Returns the table of NVIDIA's and mimic-video's video DiTs, without the prefix `net.`.

    Predict2.5 has a text projection (`crossattn_proj`).
    """
    projection = "crossattn_proj.0", "text_projection"
    return [
        _kernel("x_embedder.proj.1", "x_embedder"),
        _kernel("t_embedder.1.linear_1", "t_embedder.linear_1"),
        _kernel("t_embedder.1.linear_2", "t_embedder.linear_2"),
        *([_kernel(*projection), _bias(*projection)] if text_projection else []),
        *_blocks(),
        *_FINAL,
    ]


_DIFFUSERS = {  # our names of layers -> those in `CosmosTransformer3DModel`
    "x_embedder": "patch_embed.proj",
    "t_embedder.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "text_projection": "crossattn_proj.0",
    "final_layer.linear": "proj_out",
    "final_layer.adaln.down": "norm_out.linear_1",
    "final_layer.adaln.up": "norm_out.linear_2",
}
_DIFFUSERS_BLOCK = {  # the same for the parts of a block
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


def video_dit_diffusers(text_projection: bool = False) -> Rules:
    """Returns the table of diffusers' `CosmosTransformer3DModel`."""
    rules = []
    for rule in video_dit(text_projection):
        layer, leaf = rule.ours.rpartition(".")[0], rule.torch.rpartition(".")[2]
        if layer.startswith("blocks."):
            parts = (_DIFFUSERS_BLOCK[part] for part in layer.split(".")[1:])
            theirs = ".".join(["transformer_blocks.{i}", *parts])
        else:
            theirs = _DIFFUSERS[layer]
        rules.append(rule._replace(torch=f"{theirs}.{leaf}"))
    return rules


def action_decoder(proprio_layers: int, action_layers: int) -> Rules:
    """Returns the table of mimic-video's action decoders, without the prefix `net.`.

    The arguments are the numbers of linear layers in the embedders; 3 in the releases.
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


# --- T5's encoder, as Hugging Face publishes it (`google-t5/t5-11b`) ---


_T5_BLOCK = "encoder.block.{i}.layer"
T5: Rules = [
    Rule("shared.weight", "token_embedding"),
    # Published in block 0 because the first block computes it; every block uses it.
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    _scale(f"{_T5_BLOCK}.0.layer_norm", "blocks.attn_norm"),
    _kernel(f"{_T5_BLOCK}.0.SelfAttention.q", "blocks.q_proj"),
    _kernel(f"{_T5_BLOCK}.0.SelfAttention.k", "blocks.k_proj"),
    _kernel(f"{_T5_BLOCK}.0.SelfAttention.v", "blocks.v_proj"),
    _kernel(f"{_T5_BLOCK}.0.SelfAttention.o", "blocks.output_proj"),
    _scale(f"{_T5_BLOCK}.1.layer_norm", "blocks.mlp_norm"),
    _kernel(f"{_T5_BLOCK}.1.DenseReluDense.wi", "blocks.layer1"),
    _kernel(f"{_T5_BLOCK}.1.DenseReluDense.wo", "blocks.layer2"),
    _scale("encoder.final_layer_norm", "final_norm"),
]
# The same tensor under a second name; a file may hold either or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
# Checkpoints of the whole T5 also hold its decoder, which is not used.
IGNORED = ("decoder.", "lm_head.")


# --- The Wan 2.1 VAE ---
#
# One walk over the network makes both tables: the two layouts hold the same tensors in the same
# shapes and differ only in the names of the modules.


class _Names(NamedTuple):
    """The names of one module: here, in the release, in diffusers."""

    ours: str
    published: str
    diffusers: str

    def child(self, ours: str, published: str, diffusers: str | None = None) -> "_Names":
        """Returns the names of a module inside this one; `diffusers` defaults to `published`."""
        names = ours, published, diffusers or published
        return _Names(*(f"{parent}.{name}" for parent, name in zip(self, names)))


_Module = tuple[_Names, Layout]  # a module with weights, and the layout of its weight or gamma


def wan_vae(config: WanVAEConfig, column: str = "published") -> Rules:
    """Returns the table of the release: `Wan2.1_VAE.pth`, `tokenizer.pth` of Cosmos-Predict2."""
    rules = []
    for names, layout in _modules(config):
        ours, torch = names.ours, getattr(names, column)
        if layout in (GAMMA2D, GAMMA3D):
            rules.append(Rule(f"{torch}.gamma", f"{ours}.scale", layout))
        else:
            rules += [Rule(f"{torch}.weight", f"{ours}.kernel", layout), _bias(torch, ours)]
    return rules


def wan_vae_diffusers(config: WanVAEConfig) -> Rules:
    """Returns the table of diffusers' `AutoencoderKLWan`."""
    return wan_vae(config, "diffusers")


def _modules(config: WanVAEConfig) -> Iterator[_Module]:
    yield _Names("quant_conv", "conv1", "quant_conv"), POINTWISE3D
    yield _Names("post_quant_conv", "conv2", "post_quant_conv"), POINTWISE3D
    for part in ("encoder", "decoder"):
        root = _Names(part, part, part)
        yield root.child("conv_in", "conv1", "conv_in"), CONV3D
        yield from _levels(root, config)
        middle = root.child("middle", "middle", "mid_block")
        yield from _residual(middle.child("block_0", "0", "resnets.0"), shortcut=False)
        attention = middle.child("attention", "1", "attentions.0")
        yield attention.child("norm", "norm"), GAMMA2D
        yield attention.child("qkv", "to_qkv"), POINTWISE2D
        yield attention.child("proj", "proj"), POINTWISE2D
        yield from _residual(middle.child("block_1", "2", "resnets.1"), shortcut=False)
        yield root.child("norm_out", "head.0", "norm_out"), GAMMA3D
        yield root.child("conv_out", "head.2", "conv_out"), CONV3D


def _levels(root: _Names, config: WanVAEConfig) -> Iterator[_Module]:
    """Yields the levels: residual blocks and, except in the last level, a resampling."""
    # The release numbers both in one list. So does diffusers in the encoder, whereas in its decoder
    # it numbers them within each level.
    encoder = root.ours == "encoder"
    widths = config.encoder_widths if encoder else config.decoder_widths
    temporal = config.temporal_downsample if encoder else config.temporal_downsample[::-1]
    index = 0
    for level, (d_in, d_out) in enumerate(widths):
        for i in range(config.num_res_blocks + (not encoder)):
            theirs = f"down_blocks.{index}" if encoder else f"up_blocks.{level}.resnets.{i}"
            listed = f"{'down' if encoder else 'up'}samples.{index}"
            block = root.child(f"level_{level}.block_{i}", listed, theirs)
            yield from _residual(block, shortcut=i == 0 and d_in != d_out)
            index += 1
        if level < len(temporal):
            theirs = f"down_blocks.{index}" if encoder else f"up_blocks.{level}.upsamplers.0"
            listed = f"{'down' if encoder else 'up'}samples.{index}"
            resample = root.child(f"level_{level}.resample", listed, theirs)
            yield resample.child("conv", "resample.1"), CONV2D
            if temporal[level]:
                yield resample.child("time_conv", "time_conv"), CONV3D
            index += 1


def _residual(block: _Names, shortcut: bool) -> Iterator[_Module]:
    yield block.child("norm1", "residual.0", "norm1"), GAMMA3D
    yield block.child("conv1", "residual.2", "conv1"), CONV3D
    yield block.child("norm2", "residual.3", "norm2"), GAMMA3D
    yield block.child("conv2", "residual.6", "conv2"), CONV3D
    if shortcut:
        yield block.child("shortcut", "shortcut", "conv_shortcut"), POINTWISE3D


# --- LoRA adapters as peft stores them ---
#
# `inject_adapter_in_model` with the adapter name "default" moves `x.weight` to
# `x.base_layer.weight` and adds `x.lora_A.default.weight` [rank, in] and `x.lora_B.default.weight`
# [out, rank]; the layer computes W x + (alpha / rank) B A x. alpha is not stored; 32 is published.


_BASE, _A, _B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def with_adapters(rules: Rules, targets: tuple[str, ...]) -> Rules:
    """Returns the rules of a network whose layers in `targets` have adapters."""
    adapted = []
    for rule in rules:
        layer, _, leaf = rule.ours.rpartition(".")
        if leaf != "kernel" or layer.rpartition(".")[2] not in targets:
            adapted.append(rule)
            continue
        name = rule.torch.removesuffix(".weight")
        parts = ((_BASE, rule.ours), (_A, f"{layer}.lora_a"), (_B, f"{layer}.lora_b"))
        adapted += [Rule(name + suffix, ours, LINEAR) for suffix, ours in parts]
    return adapted


def has_adapters(tensors: Tensors) -> bool:
    """Whether any layer has adapters."""
    return any(name.endswith((_A, _B, _BASE)) for name in tensors)


def adapters(tensors: Tensors) -> tuple[int, list[str]]:
    """Returns the adapters' rank and their layers in file order ("q_proj", "x_embedder.proj.1").

    Raises:
        WeightsError: The adapters have different ranks.
    """
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith(_A)}
    if len(ranks) != 1:
        raise WeightsError(f"all adapters must have the same rank; found {sorted(ranks)}.")
    layers = (
        re.sub(r"^(blocks\.\d+\.\w+\.|t_embedder\.1\.)", "", name.removesuffix(_BASE))
        for name in tensors
        if name.endswith(_BASE)
    )
    return ranks.pop(), list(dict.fromkeys(layers))


def merge_adapters(tensors: Tensors, alpha: float) -> Tensors:
    """Returns the tensors of the network without adapters, each merged when it is read.

    Raises:
        WeightsError: Parts of adapters are missing; lists all of them.
    """
    merged, missing = {}, set()
    for name, tensor in tensors.items():
        suffix = next((part for part in (_BASE, _A, _B) if name.endswith(part)), None)
        if suffix is None:
            merged[name] = tensor
            continue
        layer = name.removesuffix(suffix)
        absent = {layer + part for part in (_BASE, _A, _B)} - tensors.keys()
        missing |= absent
        if suffix == _BASE and not absent:
            read = partial(_merged, tensor, tensors[layer + _A], tensors[layer + _B], alpha)
            merged[f"{layer}.weight"] = TorchTensor(tensor.shape, tensor.dtype, read)
    if missing:
        raise WeightsError(f"adapters are incomplete; missing: {', '.join(sorted(missing))}.")
    return merged


def _merged(base: TorchTensor, a: TorchTensor, b: TorchTensor, alpha: float) -> np.ndarray:
    kernel, low, high = (part.read().astype(np.float32) for part in (base, a, b))
    # [out, in] = [out, rank] [rank, in]: in PyTorch's order of axes, B is on the left.
    layer = {"kernel": kernel, "lora_a": high, "lora_b": low}
    return merge_lora(layer, LoRA(a.shape[0], alpha, ()))["kernel"].astype(base.dtype)
