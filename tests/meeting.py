"""A process that meets those of its job and says so; JAX finds out by itself which they are."""

import jax

from mvjax.parallel import distributed

with distributed.initialized():
    assert distributed.everywhere(True) and not distributed.everywhere(jax.process_index() == 0)
    devices = f"{jax.device_count()} devices"
    print(f"process {jax.process_index()} of {jax.process_count()}, {devices}")
