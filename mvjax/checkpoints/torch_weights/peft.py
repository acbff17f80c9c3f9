"""LoRA adapters as peft stores them beside the layers they adapt.

`inject_adapter_in_model` with the adapter name "default" moves `x.weight` to
`x.base_layer.weight` and adds `x.lora_A.default.weight` [rank, in] and `x.lora_B.default.weight`
[out, rank]; the layer computes W x + (alpha / rank) B A x. alpha is not stored; 32 is published.
"""

import re
from functools import partial

import numpy as np

from mvjax.checkpoints.torch_weights.tensors import Tensors, TorchTensor, WeightsError

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
