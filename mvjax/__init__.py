"""mimic-video in JAX/Flax. Importing this package alone imports nothing else."""

__version__ = "0.1.0"
