"""Published parameter names (`net.*` of the PyTorch releases) and where they live in our trees.

A rule is (published name, our path). `{i}` stands for the block number; the blocks' tensors are
stacked on a leading axis. Linear weights [out, in] become kernels [in, out]; everything else keeps
its shape.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Rules = list[tuple[str, str]]


def _attention(name: str) -> Rules:
    ours = f"blocks.{name}"
    projections = ("q_proj", "k_proj", "v_proj", "output_proj")
    return [
        *((f"blocks.{{i}}.{name}.{p}.weight", f"{ours}.{p}.kernel") for p in projections),
        *((f"blocks.{{i}}.{name}.{n}.weight", f"{ours}.{n}.scale") for n in ("q_norm", "k_norm")),
    ]


def _block() -> Rules:
    rules = [*_attention("self_attn"), *_attention("cross_attn")]
    for layer in ("layer1", "layer2"):
        rules.append((f"blocks.{{i}}.mlp.{layer}.weight", f"blocks.mlp.{layer}.kernel"))
    for sublayer in ("self_attn", "cross_attn", "mlp"):
        published = f"blocks.{{i}}.adaln_modulation_{sublayer}"
        rules.append((f"{published}.1.weight", f"blocks.adaln_{sublayer}.down.kernel"))
        rules.append((f"{published}.2.weight", f"blocks.adaln_{sublayer}.up.kernel"))
    return rules


_FINAL: Rules = [
    ("final_layer.linear.weight", "final_layer.linear.kernel"),
    ("final_layer.adaln_modulation.1.weight", "final_layer.adaln.down.kernel"),
    ("final_layer.adaln_modulation.2.weight", "final_layer.adaln.up.kernel"),
    ("t_embedding_norm.weight", "t_embedding_norm.scale"),
]

VIDEO_DIT: Rules = [
    ("x_embedder.proj.1.weight", "x_embedder.kernel"),
    ("t_embedder.1.linear_1.weight", "t_embedder.linear_1.kernel"),
    ("t_embedder.1.linear_2.weight", "t_embedder.linear_2.kernel"),
    *_block(),
    *_FINAL,
]


def action_decoder(embedder_layers: int) -> Rules:
    """Rules of a decoder whose embedders have this many linear layers (Bridge and LIBERO: 3)."""
    rules = [
        ("ctx_norm.weight", "context_norm.scale"),
        ("ctx_norm.bias", "context_norm.bias"),
        ("obs_mask_token", "proprio_mask_token"),
        ("pos_embedding", "position"),
        ("t_embedder.pair.A.weight", "t_embedder.to_shared.kernel"),
    ]
    for theirs, ours in (
        ("proj_x", "proj_action"),
        ("proj_c", "proj_video"),
        ("B", "to_rank_action"),
        ("C", "to_rank_video"),
    ):
        rules += _with_bias(f"t_embedder.pair.{theirs}", f"t_embedder.{ours}")
    for theirs, ours in (("obs", "proprio"), ("action", "action")):
        for i in range(embedder_layers):
            rules += _with_bias(f"{theirs}_embedder.layers.{2 * i}", f"{ours}_embedder.layer{i}")
    return [*rules, *_block(), *_FINAL]


def _with_bias(theirs: str, ours: str) -> Rules:
    return [(f"{theirs}.weight", f"{ours}.kernel"), (f"{theirs}.bias", f"{ours}.bias")]


def to_params(
    tensors: Mapping[str, np.ndarray], rules: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """Our parameter tree from published tensors (prefix `net.` removed).

    Raises:
        ValueError: names every tensor that is missing or left over.
    """
    left = set(tensors)
    missing: list[str] = []
    tree: dict[str, Any] = {}
    for published, path in rules:
        names = [published]
        if "{i}" in published:
            first, last = published.split("{i}")
            count = sum(name.startswith(first) and name.endswith(last) for name in tensors)
            names = [published.format(i=i) for i in range(max(count, 1))]
        missing += [name for name in names if name not in tensors]
        left -= set(names)
        if missing:
            continue
        leaves = [np.asarray(tensors[name]) for name in names]
        if path.endswith(".kernel"):
            leaves = [leaf.T for leaf in leaves]
        *parents, leaf_name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf_name] = np.stack(leaves) if "{i}" in published else leaves[0]
    if missing or left:
        raise ValueError(
            "The tensors do not match this network."
            + (f" Missing: {', '.join(sorted(missing))}." if missing else "")
            + (f" Unknown: {', '.join(sorted(left))}." if left else "")
        )
    return tree
