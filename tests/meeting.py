"""A process that meets those of its job and says so; JAX finds out by itself which they are."""

import jax

from mvjax import parallel

with parallel.initialized():
    assert parallel.everywhere(True) and not parallel.everywhere(jax.process_index() == 0)
    devices = f"{jax.device_count()} devices"
    print(f"process {jax.process_index()} of {jax.process_count()}, {devices}")
