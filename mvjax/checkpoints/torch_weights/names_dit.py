"""Published names of the video DiT and of the action decoder."""

from mvjax.checkpoints.torch_weights.rules import LINEAR, Rule, Rules

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
