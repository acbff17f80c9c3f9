"""The train step of a configuration with its arguments as shapes: nothing is allocated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mvjax.checkpoints.backbone import Backbone, load_backbone
from mvjax.clip import Clip
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import make_rules, sharding_tree
from mvjax.training import stages
from mvjax.training.optimizer import make_optimizer, make_schedule
from mvjax.training.stage import Batch, Stage
from mvjax.training.state import TrainState, abstract_state
from mvjax.training.step import Step, compile_step, make_step


@dataclass(frozen=True)
class Program:
    """A train step and its arguments as shapes with shardings.

    Attributes:
        mesh: of the devices.
        stage, optimizer: what is trained, and how.
        step: not compiled.
        state, batch: its arguments, beside `stage.frozen`.
    """

    mesh: Mesh
    stage: Stage
    optimizer: optax.GradientTransformation
    step: Step
    state: TrainState
    batch: Batch

    @property
    def argument_bytes(self) -> int:
        """Of state, frozen network and batch, per device."""
        return _bytes((self.state, self.stage.frozen, self.batch))

    def compile(self) -> Callable[..., Any]:
        """The compiled step (state, frozen, batch) -> (state, metrics)."""
        with jax.set_mesh(self.mesh):
            return compile_step(self.step, self.state, self.stage.frozen, self.batch)


def make_program(
    config: Any, devices: Sequence[jax.Device], backbone_of: Backbone = load_backbone
) -> Program:
    """The step that `loop.train` would run on these devices, not compiled yet.

    Args:
        config: of a training run; no data is read.
        devices: which may be those of a pod that is not here.
        backbone_of: `abstract_backbone` where only the shapes of the frozen network are needed.

    Raises:
        ValueError: if batch, mesh, network and devices do not go together.
    """
    settings, rules = config.training, make_rules(config.rules)
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optimizer)
    stage = stages.build(config, mesh, rules, backbone_of)
    state = abstract_state(stage, optimizer, settings.ema_decay > 0, mesh, rules)
    batch = _abstract_batch(config, stage, sharding_tree(stage.batch_axes, mesh, rules))
    step = make_step(
        stage,
        optimizer,
        make_schedule(config.optimizer),
        rules,
        seed=settings.seed,
        ema_decay=settings.ema_decay,
        accumulate=settings.accumulate,
    )
    return Program(mesh, stage, optimizer, step, state, batch)


def _abstract_batch(config: Any, stage: Stage, shardings: Any) -> Batch:
    """Shapes and shardings of a batch of all processes together, as the loader gives it.

    Raises:
        ValueError: if `training.batch_size` cannot be split as the mesh asks.
    """
    samples, text = config.training.batch_size, config.text
    shapes = {"latents": Clip(**config.clip).latent_shape, "text": (text.length, text.dim)}
    if stage.name == "action":
        streams = {"actions": config.policy_io.action, "proprio": config.policy_io.proprio}
        streams["action_mask"] = config.policy_io.action
        shapes |= {name: (io.horizon, io.dim) for name, io in streams.items()}
    batch = {}
    for name, sharding in shardings.items():
        shape = (samples, *shapes[name])
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(
                f"a batch of {samples} samples cannot be split over the mesh "
                f"{dict(sharding.mesh.shape)}: make it a multiple of data x fsdp "
                "(--batch_per_chip, config.training.batch_size), or raise config.mesh.context."
            ) from error
        batch[name] = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)  # as loaded
    return batch


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
