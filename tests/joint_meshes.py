"""A joint run that one device began goes on with eight, in another arrangement.

python tests/joint_meshes.py RECORDS WORKDIR
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from test_joint import run_config
from tiny_stages import quick_compiles

from mvjax.experiment import Experiment
from mvjax.training.run import run

if __name__ == "__main__":
    config = run_config(Path(sys.argv[1]))
    config.mesh.update(data=1, fsdp=2, context=2, tensor=2)
    with quick_compiles():
        run(Experiment.from_config(config), Path(sys.argv[2]))
