"""The toy run of `toy_training` as one of several processes.

python -m launch.local --processes=2 -- toy_processes WORKDIR STEPS [fsdp=2 context=2 ...]
"""

import logging
import sys
from pathlib import Path

from jax.sharding import NamedSharding, PartitionSpec
from toy_training import toy_config, toy_loader, train_toy

from mvjax import parallel
from mvjax.parallel import make_mesh
from mvjax.training.prefetch import local_rows


class Rows:
    """The part of each batch that this process reads."""

    def __init__(self, loader, rows):
        self._loader, self._rows = loader, rows
        self.get_state, self.set_state = loader.get_state, loader.set_state

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._loader)
        return {k: v[self._rows] for k, v in batch.items() if k != "unused"}


def train_toys(workdir: str | Path, steps: int, *mesh: str) -> None:
    config = toy_config(steps=steps, checkpoint_every=5)
    config.mesh.update({name: int(size) for name, size in (entry.split("=") for entry in mesh)})
    sharding = NamedSharding(make_mesh(config.mesh), PartitionSpec(("data", "fsdp")))
    loader = Rows(toy_loader(), local_rows(sharding, config.training.batch_size))
    train_toy(workdir, config, loader=loader, meta={"data_fingerprint": "toy"})


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")  # as `launch.entry.run` does for a command
    logging.getLogger("mvjax").setLevel("INFO")
    with parallel.initialized():
        train_toys(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
