"""Both real stages at toy size, on synthetic batches; run as a program, it trains both.

python tests/tiny_stages.py OUT [fsdp=4 context=2 ...]
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.clip import Clip
from mvjax.experiment import Experiment
from mvjax.models.network import Params
from mvjax.models.stand_ins import NgramTextEncoder
from mvjax.parallel import Rules, make_mesh, make_rules
from mvjax.training.checkpoint import Store
from mvjax.training.metrics import Record
from mvjax.training.objectives import Stage, make_stage
from mvjax.training.resume import describe
from mvjax.training.step import assemble, create_state
from mvjax.training.train import train

# Of observed views: 8 tokens, and 6 that four devices do not divide.
VIEWS = {"wrist": dict(height=32, width=32), "hand": dict(height=16, width=48)}
WORDS = ("open the drawer", "close the drawer", "press the button")


@contextlib.contextmanager
def quick_compiles() -> Iterator[None]:
    """Leaves XLA's optimisations out, which makes compiling four times faster."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def tiny_config(stage: str, **training) -> ConfigDict:
    """The quickstart's configuration of a stage with smaller networks and a smaller clip."""
    config = importlib.import_module(f"configs.quickstart_{stage}").get_config("smoke")
    config.clip.height = config.clip.width = 32
    config.policy_io.action.horizon = 4
    config.text.update(length=4, dim=16)
    config.video_model.update(width=48, num_blocks=2, num_heads=2, adaln_rank=4)
    config.decoder.update(width=32, num_blocks=2, num_heads=2, adaln_rank=4, time_rank=16)
    config.context_layer = 1
    config.optimizer.update(schedule="constant", warmup_steps=0, clip_norm=0.0)
    config.training.update(batch_size=8, log_every=1, checkpoint_every=100, **training)
    if stage == "action":
        config.backbone.checkpoint = ""
    return config


def tiny_batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """One batch as the loader makes it, of noise."""
    rng, io = np.random.default_rng(seed), config.policy_io
    samples = config.training.batch_size
    text = NgramTextEncoder(config.text.length, config.text.dim).encode(WORDS)
    arrays = {
        "latents": rng.normal(size=(samples, *Clip(**config.clip).latent_shape)),
        "text": text[rng.integers(len(WORDS), size=samples)],
        "actions": rng.normal(size=(samples, io.action.horizon, io.action.dim)),
        "action_mask": np.ones((samples, io.action.horizon, io.action.dim)),
        "proprio": rng.normal(size=(samples, io.proprio.horizon, io.proprio.dim)),
    }
    for name, shape in Experiment.from_config(config).clip.view_shapes.items():
        arrays[f"views/{name}"] = rng.normal(size=(samples, *shape))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def tiny_loader(config: ConfigDict) -> grain.DatasetIterator:
    """Endless batches, a pure function of their number."""
    numbers = grain.MapDataset.range(10_000)
    return iter(numbers.map(lambda n: tiny_batch(config, int(n))).to_iter_dataset())


def build_stage(config: ConfigDict) -> tuple[Stage, Mesh, Rules]:
    """The stage of a configuration, and where it runs."""
    mesh, rules = make_mesh(config.mesh), make_rules(config.rules)
    with jax.set_mesh(mesh):
        return make_stage(Experiment.from_config(config), mesh), mesh, rules


def train_tiny(config: ConfigDict, workdir: Path) -> Record:
    """The real loop on synthetic batches."""
    return train(
        Experiment.from_config(config), build_stage(config)[0], tiny_loader(config), workdir
    )


def save_untrained(config: ConfigDict, workdir: Path) -> Params:
    """A checkpoint of step 0 and its parameters: what a run leaves, without compiling a step."""
    stage, mesh, _ = build_stage(config)
    optimizer, abstract, _ = assemble(Experiment.from_config(config), stage, mesh)
    with jax.set_mesh(mesh), Store(workdir, keep=1) as store:
        state = create_state(stage, optimizer, abstract, config.training.seed)
        store.save(0, state, None, describe(Experiment.from_config(config), stage, {}))
    return state.params


def five_steps(stage: str, backbone: Path | str = "", **mesh: int) -> ConfigDict:
    """Five steps with a checkpoint after each."""
    config = tiny_config(stage, steps=5)
    config.training.update(checkpoint_every=1, keep=5)
    config.mesh.update(mesh)
    if stage == "action":
        config.backbone.checkpoint = str(backbone)
    return config


def main(out: Path, mesh: dict[str, int]) -> None:
    """Five steps of both stages; the second reads the backbone of the first, and takes every batch
    in two parts.
    """
    action = five_steps("action", out / "video", **mesh)
    action.training.accumulate = 2
    with quick_compiles():
        train_tiny(five_steps("video", **mesh), out / "video")
        train_tiny(action, out / "action")


if __name__ == "__main__":
    sizes = dict(entry.split("=") for entry in sys.argv[2:])
    main(Path(sys.argv[1]), {axis: int(size) for axis, size in sizes.items()})
