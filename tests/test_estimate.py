"""Planning a run for a TPU pod that is not here: topologies, exchanges, the command itself."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from configs import quickstart_video
from mvjax.experiment import Experiment
from mvjax.pods.collectives import Collective, collectives
from mvjax.pods.hlo import HLO
from mvjax.pods.topology import NoCompiler, pod_devices

ROOT = Path(__file__).parents[1]
VIDEO = "--config=configs/quickstart_video.py:smoke"
ACTION = "--config=configs/quickstart_action.py:smoke"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -r requirements-aot.txt",
)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e", "'v5e' is not known; it is a TPU generation (v4, v5e, v5p, v6e, tpu7x)"),
        ("v5p-128", "'v5p-128' is not known"),
        ("v9:4x4", "'v9:4x4' is not known"),
        ("v5p:4x4", "v5p has 3 axes, but 'v5p:4x4' gives 2; e.g. v5p:4x4x4."),
        ("v6e:2x2x2", "v6e has 2 axes"),
    ],
)
def test_a_topology_that_does_not_exist_is_explained(topology, words):
    with pytest.raises(ValueError) as error:
        pod_devices(topology)
    assert words in str(error.value)


def test_no_slices():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pod_devices("v5e:4x4", slices=0)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoCompiler, match=r"pip install -r requirements-aot\.txt"):
        pod_devices("v5e:4x4")


def test_exchanges_of_a_program_on_eight_devices():
    """Each device has [8, 32] float32, 1 KiB; `b` joins four, the loop runs five times."""
    said = forked.run("exchanges", devices=8)
    assert said.code == 0, said.err
    found = {line.split()[0]: line.split()[1:] for line in said.out.splitlines()}
    assert found == {
        "all-gather": ["False", "5", str(5 * 3 * 1024.0)],
        "reduce-scatter": ["False", "5", str(5 * 3 * 1024.0)],
        "collective-permute": ["False", "1", "1024.0"],
        "all-to-all": ["False", "1", str(0.75 * 1024)],
        "all-reduce": ["False", "1", str(2 * 7 / 8 * 1024)],
    }


# As libtpu writes a step of two slices of four devices, shortened.
TPU_PROGRAM = """
%all-reduce-scatter.1 (input.1: f32[8,128]) -> f32[2,128] {
  %all-reduce.7 = f32[8,128]{1,0:T(8,128)} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3}}
}

%fused.1 (param_0.1: bf16[2,128]) -> bf16[8,128] {
  ROOT %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, CHAIN
}

%fused.2 (param_0.2: bf16[2,128]) -> bf16[8,128] {
  ROOT %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, CHAIN
}

%body.1 (param.0: (s32[], bf16[2,128])) -> (s32[], bf16[2,128]) {
  %async-collective-start = (bf16[2,128], bf16[8,128]) fusion(%c), kind=kCustom, calls=%fused.1
  %async-collective-done = bf16[8,128]{1,0} fusion(%get.1), kind=kCustom, calls=%fused.2
  %all-gather.9 = f32[4]{0} all-gather(%c), channel_id=1, replica_groups=mesh['a'=4] {'a':(1)2}
  %while.2 = (bf16[2,128]{1,0}, u32[]) while(%t), condition=%condition.2, body=%body.2
  %one.1 = s32[]{:T(128)} constant(1)
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.2, %one.1)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[2,128]{1,0}) tuple(%add.1, %get.2)
}

%body.2 (param.2: (bf16[2,128], u32[])) -> (bf16[2,128], u32[]) {
  %two.1 = u32[]{:T(128)} constant(2)
  %add.2 = u32[]{:T(128)} add(%get-tuple-element.4, %two.1)
  %permute.1 = (bf16[2,128]{1,0}, bf16[2,128]{1,0}, u32[], u32[]) collective-permute-start(%p)
  ROOT %tuple.2 = (bf16[2,128]{1,0}, u32[]{:T(128)}) tuple(%permute.2, /*index=1*/%add.2)
}

%condition.2 (param.3: (bf16[2,128], u32[])) -> pred[] {
  %four.1 = u32[]{:T(128)} constant(4)
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%param.3), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%get-tuple-element.3, %four.1), direction=LT
}

%condition.1 (param.1: (s32[], bf16[2,128])) -> pred[] {
  %constant.13 = s32[]{:T(128)} constant(28)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.13), direction=LT
}

ENTRY %main.1 (p.1: bf16[2,128]) -> f32[2,128] {
  %while.1 = (s32[]{:T(128)}, bf16[2]{0}) while(%t), condition=%condition.1, body=%body.1
  %fusion.1 = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %all-reduce.3 = (f32[128]{0:T(128)}, f32[]) all-reduce(%a, %b), replica_groups=[2,2]<=[4]
  %all-reduce.4 = f32[128]{0} all-reduce(%c), channel_id=1, replica_groups={{0},{1},{2},{3}}
  %send.1 = (f32[64]{0:T(128)}, u32[]{:S(2)}, token[]) send(%b, %after-all.1), MEGASCALE
}
""".replace(
    "CHAIN",
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}, "
    'frontend_attributes={chain_id="0"}',
).replace(
    "MEGASCALE",
    "is_host_transfer=true, frontend_attributes={"
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
)


def test_habits_of_the_tpu_compiler():
    assert collectives(HLO(TPU_PROGRAM), 4) == [
        # Of the two gatherings only the one with a chain_id is hidden.
        Collective("all-gather", False, 56, 28 * (8 * 128 * 2 * 3 / 4 + 16 / 2), 28 * 16 / 2),
        Collective("collective-permute", False, 56, 28 * 2 * 2 * 128 * 2.0),
        Collective("reduce-scatter", False, 1, 8 * 128 * 4 * 3 / 4, 8 * 128 * 4 * 3 / 4),
        Collective("all-reduce", False, 1, 2 * (128 * 4 + 4) / 2, 2 * (128 * 4 + 4) / 2),
        Collective("all-reduce", True, 1, 256.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([VIDEO], "--topology must be given."),
        ([VIDEO, "--topology=v5e"], "'v5e' is not known"),
        (["--topology=v5e:4x4"], "--config must be given."),
        ([ACTION, "--topology=v5e:4x4", "--policy", "--batches=0"], "must be numbers of queries"),
        ([ACTION, "--topology=v5e:4x4", "--policy", "--search"], "not with --slices, --search"),
        ([VIDEO, "--topology=v5e:4x4", "--slices=0"], "at least 1, got 0"),
        ([VIDEO, "--topology=v5e:4x4", "--hlo=nowhere/a.hlo"], "in no folder that exists"),
    ],
)
def test_mistakes_in_the_command(complains, arguments, words):
    complains(words, "launch.estimate", *arguments)


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:3x5"], "libtpu knows no slice v5e:3x5"),
        (["--topology=v5e:4x4", "--batch_per_chip=0.3"], "makes 4.8 clips on 16 chips"),
        (["--topology=v5e:4x4", "--batch_per_chip=0.5"], "is 8; it must be a multiple of 16"),
        (
            ["--topology=v5e:4x4", "--config.mesh.fsdp=3"],
            "the product 3, which does not divide the number of devices",
        ),
        (
            ["--topology=v5e:2x2", "--slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=8"],
            "only data can span slices: set config.mesh.data to a multiple of 2",
        ),
    ],
)
def test_mistakes_about_a_pod(complains, arguments, words):
    complains(words, "launch.estimate", VIDEO, *arguments)


SLICES = """
import launch.estimate  # its environment
from mvjax.parallel import make_mesh
from mvjax.pods.topology import pod_devices

mesh = make_mesh(dict(data=4, fsdp=4), pod_devices("v5p:2x2x2", slices=2))
print(mesh.devices.shape, [sorted({d.slice_index for d in row.flat}) for row in mesh.devices])
"""


@needs_libtpu
def test_slices_are_joined_along_the_data_axis():
    done = subprocess.run(
        [sys.executable, "-c", SLICES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "(4, 4, 1, 1) [[0], [0], [1], [1]]\n"


@needs_libtpu
def test_a_video_too_long_for_the_chip_is_refused_in_one_sentence():
    long = ["--config.clip.height=480", "--config.clip.width=640", "--config.clip.future_frames=56"]
    done = estimated(
        VIDEO,
        "--topology=v5e:1x1",
        "--batch_per_chip=1",
        *long,
        "--config.video_model.attention=xla",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "launch.estimate: the step does not fit a TPU v5e of"
    )
    assert "config.video_model.remat" in done.stderr and "Traceback" not in done.stderr


@needs_libtpu
def test_the_quickstart_on_one_chip_and_its_largest_batch(tmp_path):
    file, text = tmp_path / "estimate.json", tmp_path / "step.hlo"
    done = estimated(
        VIDEO,
        f"--hlo={text}",
        "--topology=v5e:1x1",
        "--search",
        "--max_compiles=2",
        "--config.video_model.attention=splash",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr
    assert "[2/2] data=1 fsdp=1 context=1 tensor=1, 2 clips, remat none" in done.stderr
    assert "TPU v5e" in done.stdout and "fits" in done.stdout and "exchange    none" in done.stdout
    found = json.loads(file.read_text())
    assert re.search(r"largest     --max_compiles=2; \d+ clips were not tried", done.stdout)
    flags = "--config.mesh.tensor=1 --config.video_model.remat=none --config.training.batch_size=2"
    assert flags in done.stdout
    assert found["host_bytes"] == 0
    assert found["devices"] == 1 and found["batch_size"] in (1, 2) and not found["collectives"]
    assert 0 < found["step_seconds"]["low"] < found["step_seconds"]["middle"] < 0.1
    parts = sum(part["middle"] for part in found["parts"].values())
    assert parts == pytest.approx(found["step_seconds"]["middle"])
    share = found["flops"] / found["peak_flops"] / found["step_seconds"]["high"]
    assert found["mfu"]["low"] == pytest.approx(share)
    for word in ("step time", "where", "products"):
        assert re.search(f"^{word} ", done.stdout, re.MULTILINE)
    assert text.read_text().startswith("HloModule")
    assert 0 < found["argument_bytes"] < found["peak_bytes"] < found["hbm_bytes"] / 100
    network = Experiment.from_config(quickstart_video.get_config("smoke")).video_network
    assert found["parameters"] == found["trainable"] == network.num_parameters
    assert found["argument_bytes"] >= 4 * 4 * network.num_parameters  # with moments and average


@needs_libtpu
def test_offloaded_attention_is_kept_in_host_memory(tmp_path):
    file = tmp_path / "estimate.json"
    done = estimated(
        VIDEO,
        "--topology=v5e:1x1",
        "--batch_per_chip=1",
        "--config.video_model.attention=splash",
        "--config.video_model.remat=offload",
        "--config.video_model.width=256",
        "--config.video_model.num_heads=2",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr
    blocks = quickstart_video.get_config("smoke").video_model.num_blocks
    # Per block and head: 64 tokens in one tile of 128, 128 channels and the softmax's sum, float32.
    assert json.loads(file.read_text())["host_bytes"] == blocks * 2 * 128 * (128 + 1) * 4
    assert "GB in the host" in done.stdout or "MB in the host" in done.stdout


@needs_libtpu
def test_stage_two_on_a_pod_with_every_axis_in_use(tmp_path):
    file = tmp_path / "estimate.json"
    done = estimated(
        ACTION,
        "--topology=v5e:4x4",
        "--batch_per_chip=1",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.context=2",
        "--config.mesh.tensor=2",
        "--config.video_model.attention=splash",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 2, "context": 2, "tensor": 2}
    assert found["batch_size"] == 16 and found["frozen"] > found["parameters"] / 2
    kinds = {c["kind"] for c in found["collectives"]}
    assert {"all-gather", "all-reduce"} <= kinds
    assert not any(c["across_slices"] for c in found["collectives"])
    # Parameters are split over fsdp and tensor: a device holds much less than all of them.
    assert found["argument_bytes"] < 0.5 * (4 * 4 * found["parameters"] + 4 * found["frozen"])


@needs_libtpu
def test_the_latency_of_a_query_and_where_it_goes(tmp_path):
    file = tmp_path / "queries.json"
    done = estimated(ACTION, "--topology=v5e:1x1", "--policy", "--batches=1,2", f"--json={file}")
    assert done.returncode == 0, done.stderr
    one, two = json.loads(file.read_text())["queries"]
    assert (one["queries"], two["queries"], one["devices"]) == (1, 2, 1)
    assert list(one["stages"]) == ["encode", "video", "context", "actions"]
    assert 0 < one["seconds"]["low"] <= two["seconds"]["low"] < one["seconds"]["low"] * 2.1
    assert done.stdout.count("latency ") == 2 and "the host's time comes on top" in done.stdout


@needs_libtpu
def test_a_policy_is_of_stage_two():
    done = estimated(VIDEO, "--topology=v5e:1x1", "--policy")
    assert (
        done.returncode == 2
        and "a policy needs a configuration that trains a decoder" in done.stderr
    )


def estimated(*arguments: str) -> subprocess.CompletedProcess:
    """The command as at the keyboard."""
    return subprocess.run(
        [sys.executable, "-m", "launch.estimate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
