"""LoRA: low-rank adapters on linear layers, what learns with them, and their merging."""

from dataclasses import dataclass

from mvjax.models.network import Params


@dataclass(frozen=True)
class LoRA:
    """Adapters on the linear layers whose attribute name is in `targets`.

    The published video fine-tuning uses rank 256, alpha 32 (mimic-video release,
    `configs/experiment/video2world.py`).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


def learns_with_lora(path: tuple[str, ...]) -> bool:
    """Whether a parameter learns in a LoRA run: adapters, and all adaLN weights, as published."""
    return path[-1] in ("lora_a", "lora_b") or any(part.startswith("adaln") for part in path)


def merge_lora(params: Params, lora: LoRA) -> Params:
    """Adds (alpha / rank) A B to every adapted kernel and drops the adapters.

    Works on arrays of JAX and NumPy, and on stacked kernels [layers, in, out] as on single ones.
    """
    merged = {}
    for name, value in params.items():
        if isinstance(value, dict):
            merged[name] = merge_lora(value, lora)
        elif name == "kernel" and "lora_a" in params:
            merged[name] = value + lora.scale * (params["lora_a"] @ params["lora_b"])
        elif name not in ("lora_a", "lora_b"):
            merged[name] = value
    return merged
