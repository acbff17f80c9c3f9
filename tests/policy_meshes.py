"""The same queries on one device and on meshes of eight: prints the largest difference of each,
of a policy of a single camera, of one with an observed view, and of one of that kind that reads
nothing but the observed frames.

python tests/policy_meshes.py 8,1,1,1 1,2,2,2 ...   (with eight devices)
"""

import dataclasses
import sys

import jax
import numpy as np
from tiny_policy import random_observation, tiny_policy
from tiny_stages import quick_compiles

from mvjax.parallel import MESH_AXES, make_mesh, sharding_tree, split_ways


def on_mesh(policy, sizes):
    """The policy with its parameters split over a mesh."""
    mesh = make_mesh(dict(zip(MESH_AXES, sizes)))
    tokenizer, *params = policy.weights
    networks = policy.model.backbone, policy.model.decoder
    placed = [
        jax.device_put(p, sharding_tree(network.axes, mesh, policy.rules, network.abstract))
        for p, network in zip(params, networks)
    ]
    ways = split_ways("batch", mesh, policy.rules)
    return dataclasses.replace(policy, weights=(tokenizer, *placed), mesh=mesh, batch_size=ways)


if __name__ == "__main__":
    for kind in ("single", "observed", "observed context"):
        cameras, _, context = kind.partition(" ")
        policy, _ = tiny_policy(cameras=cameras)
        if context:
            model = dataclasses.replace(policy.model, context_frames="observed")
            policy = dataclasses.replace(policy, model=model)
        number = 1 if cameras == "single" else 2
        queries = [random_observation(seed, cameras=number) for seed in range(5)]
        with quick_compiles():
            expected = np.concatenate([policy.act([query]) for query in queries])
            for argument in sys.argv[1:]:
                ours = on_mesh(policy, [int(size) for size in argument.split(",")]).act(queries)
                difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
                print(f"{argument}/{kind}", difference)
