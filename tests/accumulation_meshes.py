"""The toy run on eight devices, every batch in two parts, which no sample crosses a device for.

python tests/accumulation_meshes.py WORKDIR   (with eight devices)
"""

import sys

import jax
import numpy as np
from toy_training import toy_config, toy_loader, toy_stage, train_toy

from mvjax.parallel import make_mesh, make_rules, sharding_tree, use_rules
from mvjax.training.step import _split

if __name__ == "__main__":
    config = toy_config(steps=3, batch_size=16, accumulate=2)
    config.mesh.update(data=2, fsdp=2, context=2)
    train_toy(sys.argv[1], config, loader=toy_loader(16))

    mesh, rules, axes = make_mesh(config.mesh), make_rules(), toy_stage().batch_axes
    shardings = sharding_tree(axes, mesh, rules)
    batch = next(toy_loader(16))
    with jax.set_mesh(mesh), use_rules(rules):
        placed = {name: jax.device_put(batch[name], to) for name, to in shardings.items()}
        split = jax.jit(lambda b: _split(b, axes, 2))
        text = split.lower(placed).compile().as_text()
        parts = split(placed)
    moved = [word for word in ("all-", "collective", "reduce-scatter", "send") if word in text]
    assert not moved, moved
    assert parts["tokens"].sharding.spec[:3] == (None, ("data", "fsdp"), "context"), parts
    np.testing.assert_array_equal(parts["index"], batch["index"].reshape(8, 2).T)
