"""The train step of a configuration with its arguments as shapes: nothing is allocated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from mvjax.checkpoints.backbone import Backbone, load_backbone
from mvjax.clip import Clip
from mvjax.parallel.rules import Rules, make_rules, sharding_tree
from mvjax.training import stages
from mvjax.training.accumulation import check_batch_size
from mvjax.training.optimizer import make_optimizer, make_schedule
from mvjax.training.stage import Batch, Stage
from mvjax.training.state import TrainState, abstract_state
from mvjax.training.step import Step, compile_step, make_step


@dataclass(frozen=True)
class Program:
    """A train step and its arguments as shapes with shardings.

    Attributes:
        mesh: the devices; abstract (`abstract_mesh`) where only shapes are wanted.
        stage, optimizer: what is trained, and how.
        step: not compiled.
        state, batch: its arguments, beside `stage.frozen`.
    """

    mesh: Mesh | AbstractMesh
    stage: Stage
    optimizer: optax.GradientTransformation
    step: Step
    state: TrainState
    batch: Batch

    @property
    def argument_bytes(self) -> int:
        """Of state, frozen network and batch, per device, without what a compiler pads."""
        return _bytes((self.state, self.stage.frozen, self.batch))

    def compile(self) -> Callable[..., Any]:
        """The compiled step (state, frozen, batch) -> (state, metrics)."""
        with jax.set_mesh(self.mesh):
            return compile_step(self.step, self.state, self.stage.frozen, self.batch)


def make_program(
    config: Any, mesh: Mesh | AbstractMesh, backbone_of: Backbone = load_backbone
) -> Program:
    """The step that `loop.train` would run on this mesh, not compiled yet.

    Args:
        config: of a training run; no data is read.
        mesh: of `make_mesh`, whose devices may be those of a pod that is not here, or of
            `abstract_mesh`, which has none: nothing can be compiled for it.
        backbone_of: `abstract_backbone` where only the shapes of the frozen network are needed.

    Raises:
        ValueError: if batch, mesh, network and devices do not go together.
    """
    rules = make_rules(config.rules)
    stage = stages.build(config, mesh, rules, backbone_of)
    optimizer, state, step = assemble(config, stage, mesh, rules)
    batch = _abstract_batch(config, stage, sharding_tree(stage.batch_axes, mesh, rules))
    return Program(mesh, stage, optimizer, step, state, batch)


def assemble(
    config: Any, stage: Stage, mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[optax.GradientTransformation, TrainState, Step]:
    """What a configuration trains a stage with: the optimizer, the state as shapes, the step.

    Args:
        config: `optimizer` and `training` are read.
        stage: what is trained.
        mesh, rules: where, and how it is sharded.

    Raises:
        ValueError: if batch, mesh and stage do not go together.
    """
    settings = config.training
    check_batch_size(settings.batch_size, settings.accumulate, mesh, rules)
    optimizer = make_optimizer(config.optimizer)
    step = make_step(
        stage,
        optimizer,
        make_schedule(config.optimizer),
        rules,
        seed=settings.seed,
        ema_decay=settings.ema_decay,
        accumulate=settings.accumulate,
    )
    return optimizer, abstract_state(stage, optimizer, settings.ema_decay > 0, mesh, rules), step


def _abstract_batch(config: Any, stage: Stage, shardings: Any) -> Batch:
    """Shapes and shardings of a batch of all processes together, as the loader gives it."""
    samples, text = config.training.batch_size, config.text
    shapes = {"latents": Clip(**config.clip).latent_shape, "text": (text.length, text.dim)}
    if stage.name == "action":
        streams = {"actions": config.policy_io.action, "proprio": config.policy_io.proprio}
        streams["action_mask"] = config.policy_io.action
        shapes |= {name: (io.horizon, io.dim) for name, io in streams.items()}
    return {
        name: jax.ShapeDtypeStruct((samples, *shapes[name]), "float32", sharding=sharding)
        for name, sharding in shardings.items()
    }


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
