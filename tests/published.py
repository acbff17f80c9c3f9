"""Random weights as the releases publish them: tiny networks under the published names."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mvjax.training.checkpoint import leaf_paths
from mvjax.weights.files import Tensors, TorchTensor
from mvjax.weights.kinds import ACTION, TEXT, VAE, VIDEO, Config, Kind
from mvjax.weights.match import match
from mvjax.weights.names import Rule, Rules
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors_folder

LAYOUTS = [
    (VIDEO, "nvidia"),
    (VIDEO, "diffusers"),
    (ACTION, "mimic-video"),
    (VAE, "nvidia"),
    (VAE, "diffusers"),
    (TEXT, "diffusers"),
]
NO_LORA = {"rank": 0, "alpha": 0.0, "targets": []}
CONFIGS: dict[str, Config] = {
    "video": {
        "video_model": dict(
            width=48,
            num_blocks=2,
            num_heads=2,
            adaln_rank=4,
            rope_ratio_thw=[1.0, 3.0, 3.0],
            precision="float32",
        ),
        "text": {"dim": 64},
        "lora": NO_LORA,
    },
    "action": {
        "video_model": {"width": 48},
        "policy_io": {"action": {"horizon": 4, "dim": 4}, "proprio": {"horizon": 1, "dim": 9}},
        "decoder": dict(
            width=32,
            num_blocks=2,
            num_heads=2,
            adaln_rank=4,
            time_rank=16,
            precision="float32",
        ),
    },
    "vae": {"tokenizer": {"dim": 4, "num_res_blocks": 1, "precision": "float32"}},
    "text": {
        "text": {"dim": 64},
        "text_encoder": dict(
            vocab_size=128, width=64, num_blocks=2, num_heads=2, head_dim=16, mlp_dim=96
        ),
    },
}


def tensor(array: np.ndarray) -> TorchTensor:
    """An array as if it lay in a file."""
    array = np.ascontiguousarray(array)
    return TorchTensor(array.shape, array.dtype, lambda: array)


def random_tensors(kind: Kind, layout: str, config: Config | None = None, seed: int = 0) -> Tensors:
    """Random float32 tensors of a network under its published names, without prefix."""
    config = config or CONFIGS[kind.stage]
    rng = np.random.default_rng(seed)
    return {
        name: tensor(_values(rng, name, shape))
        for name, shape in published_shapes(kind, layout, config).items()
    }


def published_shapes(kind: Kind, layout: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, from our shapes alone."""
    shapes = leaf_paths(kind.network(config).abstract)
    return {
        name: shape
        for rule in kind.rules(layout, config)
        for name, shape in _named(rule, shapes[rule.ours.replace(".", "/")].shape)
    }


def _named(rule: Rule, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    if "{i}" not in rule.torch:
        return [(rule.torch, rule.layout.torch_shape(shape))]
    each = rule.layout.torch_shape(shape[1:])
    return [(rule.torch.replace("{i}", str(i)), each) for i in range(shape[0])]


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Signals keep their size: matrices by fan-in, scales around one."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    values = rng.normal(size=shape) / np.sqrt(max(fan_in, 1))
    if name.endswith(("norm.weight", "gamma", "norm_q.weight", "norm_k.weight")):
        values = 1 + 0.1 * rng.normal(size=shape)
    return values.astype(np.float32)


def to_params(arrays: Mapping[str, np.ndarray], rules: Rules) -> dict:
    """Our tree from published arrays; every name must be known and every rule served."""
    found = match({name: tensor(array) for name, array in arrays.items()}, rules)
    assert not found.missing and not found.unknown
    tree = {}
    for path, parameter in found.parameters.items():
        pieces = [parameter.rule.layout.to_ours(t.read()) for t in parameter.tensors]
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = np.stack(pieces) if parameter.rule.stacked else pieces[0]
    return tree


def to_arrays(params: dict, rules: Rules) -> dict[str, np.ndarray]:
    """The inverse of `to_params`."""
    leaves, arrays = leaf_paths(params), {}
    for rule in rules:
        leaf = np.asarray(leaves[rule.ours.replace(".", "/")])
        blocks = leaf if "{i}" in rule.torch else leaf[None]
        for i, block in enumerate(blocks):
            arrays[rule.torch.replace("{i}", str(i))] = rule.layout.to_torch(block)
    return arrays


def prefixed(tensors: Tensors, prefix: str = "net.") -> Tensors:
    """The tensors under a prefix."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def same_bits(there: Tensors, here: Tensors) -> None:
    """Asserts that both hold the same names and the same bytes."""
    assert set(there) == set(here)
    for name, value in there.items():
        other = here[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        assert value.read().tobytes() == other.read().tobytes(), name


def write_published(
    folder: Path, kind: Kind, layout: str, tensors: Tensors, config: Config | None = None
) -> Path:
    """Writes tensors as that layout is published, with the entries that are not converted."""
    path = folder / f"{kind.stage}_{layout}"
    if layout == "diffusers":
        stem = "model" if kind.stage == "text" else "diffusion_pytorch_model"
        write_safetensors_folder(path, tensors, stem=stem)
        described = kind.published(config or CONFIGS[kind.stage])
        (path / "config.json").write_text(json.dumps(described))
        return path
    if layout in kind.prefixed:
        tensors = prefixed(tensors) | {
            "net.accum_iteration": tensor(np.int64(7)),
            "net.pos_embedder.seq": tensor(np.arange(128, dtype=np.float32)),
            "net.blocks.0.self_attn.q_norm._extra_state": tensor(np.zeros(3, np.uint8)),
        }
    write_pt(path, tensors)
    return path
