"""The libraries a checkpoint was written with."""

import importlib.metadata

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def library_versions() -> dict[str, str]:
    """Package name -> installed version, stored beside every checkpoint."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
