"""A small real stage and dataset for the training tests; run as a program, it trains once."""

import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mvjax.experiment import Experiment
from mvjax.parallel import constrain
from mvjax.training.metrics import Record
from mvjax.training.objectives import Stage
from mvjax.training.train import train

WIDTH, LENGTH = 16, 8


def toy_config(**training) -> ml_collections.ConfigDict:
    settings = dict(steps=4, batch_size=8, seed=3, ema_decay=0.9, log_every=1, checkpoint_every=2)
    settings |= dict(accumulate=1, keep=2, keep_every=0, sample_every=0)
    return ml_collections.ConfigDict(
        dict(
            mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
            rules={},
            optimizer=dict(
                learning_rate=1e-2,
                schedule="cosine",
                warmup_steps=2,
                decay_steps=50,
                final_fraction=0.1,
                b1=0.9,
                b2=0.99,
                eps=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
                mu_dtype="",
            ),
            training={**settings, **training},
            init_from="",
            wandb="",
        )
    )


def toy_stage(width: int = WIDTH, scale: float = 1.0, adapters: bool = False) -> Stage:
    """A two-layer network on token sequences that denoises; `embed/kernel` does not learn."""

    def init(key):
        keys = jax.random.split(key, 3)
        adapter = {"adapter": {"lora_a": jax.random.normal(key, (3, 2))}} if adapters else {}
        return adapter | {
            "embed": {"kernel": jax.random.normal(keys[0], (3, width)) / 2},
            "up": {
                "kernel": jax.random.normal(keys[1], (width, 2 * width)) / 4,
                "bias": jnp.zeros(2 * width),
            },
            "down": {"kernel": jax.random.normal(keys[2], (2 * width, 3)) / 4},
        }

    def draw(batch, key):
        return {"noise": jax.random.normal(key, batch["tokens"].shape)}

    def objective(params, frozen, batch, draws):
        x = constrain(batch["tokens"] + 0.1 * draws["noise"], "batch", "length", None)
        x = constrain(x @ params["embed"]["kernel"], "batch", "length", "embed")
        x = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
        x = constrain(x, "batch", "length", "mlp") @ params["down"]["kernel"]
        error = jnp.mean((x - batch["target"]) ** 2) * scale
        return error, {"first_sample": batch["index"][0]}

    tokens = ("batch", "length", None)
    return Stage(
        name="toy",
        init=init,
        axes=({"adapter": {"lora_a": (None, "lora")}} if adapters else {})
        | {
            "embed": {"kernel": (None, "embed")},
            "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "down": {"kernel": ("mlp", None)},
        },
        trainable=lambda path: path[0] != "embed",
        draw=draw,
        objective=objective,
        batch_axes={"tokens": tokens, "target": tokens, "index": ("batch",)},
        frozen={},
    )


def toy_loader(batch_size: int = 8, repeat: int | None = None) -> grain.DatasetIterator:
    def sample(index: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(int(index)).normal(size=(LENGTH, 3)).astype(np.float32)
        return {"tokens": tokens, "target": tokens**2, "index": np.int32(index), "unused": "text"}

    dataset = grain.MapDataset.range(100).seed(1).shuffle().repeat(repeat).map(sample)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def train_toy(workdir, config=None, *, stage=None, loader=None, meta=None, **options) -> Record:
    """The real loop on the toy stage and loader, or on others."""
    return train(
        Experiment.from_config(toy_config() if config is None else config),
        toy_stage() if stage is None else stage,
        toy_loader() if loader is None else loader,
        Path(workdir),
        meta,
        **options,
    )


def main(workdir: str | Path, steps: int, *mesh: str) -> None:
    """Usage: toy_training.py WORKDIR STEPS [fsdp=4 context=2 ...]."""
    config = toy_config(steps=steps, checkpoint_every=max(1, steps // 4))
    config.mesh.update({name: int(size) for name, size in (entry.split("=") for entry in mesh)})
    train_toy(workdir, config, meta={"data_fingerprint": "toy"})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
