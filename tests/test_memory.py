"""What is kept for the backward pass follows from the memory of the devices; and a CPU's own."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from configs import bridge_video, cosmos14b_video, libero_joint
from mvjax.experiment import Experiment
from mvjax.parallel import GB, MESH_AXES
from mvjax.training.memory import chosen_remat, most_kept, step_bytes
from mvjax.training.objectives import make_stage


def pod(kind, **sizes):
    """A mesh of devices of one kind, none of which is here."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.AbstractMesh(tuple(shape), MESH_AXES, types, abstract_device=device)


def published(clips, config=bridge_video, **settings):
    experiment = Experiment.from_config(config.get_config())
    return experiment.changed({"training.batch_size": clips} | settings)


@pytest.mark.parametrize(
    ("kind", "remat"),
    [
        ("TPU v5", "dots"),
        ("TPU v6 lite", "hidden"),
        ("TPU v5 lite", "attention"),
        ("cpu", "attention"),
    ],
)
def test_the_most_that_fits_is_kept(kind, remat):
    assert chosen_remat(published(8), pod(kind, fsdp=8)) == remat


# As the compiler of libtpu 0.0.50 says for one clip per chip of eight.
@pytest.mark.parametrize(
    ("config", "remat", "peak_gb"),
    [
        (bridge_video, "hidden", 23.6),
        (bridge_video, "dots", 31.8),
        (bridge_video, "attention", 9.4),
        (libero_joint, "hidden", 24.9),
    ],
)
def test_the_estimate_is_a_little_above_what_compiled_programs_need(config, remat, peak_gb):
    needed = step_bytes(published(8, config), pod("TPU v6 lite", fsdp=8), remat) / GB
    assert peak_gb <= needed <= 1.25 * peak_gb


def test_more_clips_keep_less_and_more_chips_more():
    kept = [chosen_remat(published(clips), pod("TPU v5", fsdp=8)) for clips in (16, 24, 48, 80)]
    assert kept == ["dots", "hidden", "attention", "full"]
    assert chosen_remat(published(48), pod("TPU v5", fsdp=16)) == "hidden"
    assert chosen_remat(published(48), pod("TPU v5", fsdp=8, context=2)) == "hidden"


def test_the_14b_and_given_memory():
    experiment, mesh = published(16, cosmos14b_video), pod("TPU v5", fsdp=16, context=2)
    assert chosen_remat(experiment, mesh) == "dots"
    assert most_kept(experiment, mesh, 42 * GB) == "outputs"


def test_what_is_configured_stays():
    experiment = published(8, **{"video_model.remat": "full"})
    assert chosen_remat(experiment, pod("TPU v5", fsdp=8)) == "full"


def test_stage_1_is_trained_with_the_choice(caplog):
    caplog.set_level("INFO")
    make_stage(published(8), pod("TPU v5", fsdp=8))
    assert "remat: 'dots' was chosen for 95.7 GB" in caplog.text


STEPS = """
import resource, statistics, sys
import jax, numpy as np
from mvjax.training.memory import keep_freed_memory

assert sys.argv[1] == "as it is" or keep_freed_memory()
step = jax.jit(lambda x: jax.numpy.cumsum(x[::-1]) + x)  # takes temporaries
x = jax.numpy.ones(2**24)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(21):
    before = faults()
    x = step(x).block_until_ready()
    counts.append(faults() - before)
print(int(statistics.median(counts)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is asked")
def test_a_process_that_trains_on_a_cpu_keeps_what_a_step_frees():
    """Counted by the kernel: pages that the median step waits for.

    x alone has 16,384 of 4 kB, and 32 where the kernel gives pages of 2 MB unasked. The median,
    because what is kept still grows now and then: on a busy machine JAX's threads free x in
    another order, and a step finds no hole of its size.
    """

    def faults(how):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        done = subprocess.run(
            [sys.executable, "-c", STEPS, how],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    before = faults("as it is")
    assert before > 32
    assert faults("kept") < before / 20


def test_an_accelerators_host_is_left_alone():
    code = "from mvjax.training.memory import keep_freed_memory as keep; assert not keep()"
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "tpu,cpu"}, check=True
    )
