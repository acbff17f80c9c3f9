"""The scripts of launch/cluster, as far as they run without a cluster."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "launch" / "cluster"
SCRIPTS = {"pod.sh", "slurm.sh", "tpu_vm.sh", "xpk.sh"}


@pytest.fixture
def run_script(tmp_path):
    """Runs a script beside programs of the given names, which stand for those of a cluster."""

    def run(script: str, *flags: str, programs: dict[str, str], **variables: str):
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
        return subprocess.run(
            [FOLDER / script, *flags], env=places | variables, capture_output=True, text=True
        )

    return run


def test_the_scripts_are_bash_and_the_job_set_is_yaml():
    assert {script.name for script in FOLDER.glob("*.sh")} == SCRIPTS
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", FOLDER / script], check=True)
        assert os.access(FOLDER / script, os.X_OK), script
    (slices,) = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    machines, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, flags = container["command"][0], dict(f.split("=") for f in container["command"][1:])
    assert (FOLDER.parents[1] / command).exists()
    assert machines["parallelism"] == machines["completions"]
    assert int(flags["--config.mesh.data"]) % slices["replicas"] == 0
    chips = (
        slices["replicas"]
        * machines["completions"]
        * container["resources"]["limits"]["google.com/tpu"]
    )
    assert int(flags["--config.mesh.data"]) * int(flags["--config.mesh.fsdp"]) == chips
    assert flags["--workdir"].startswith(container["volumeMounts"][0]["mountPath"])


SAY = 'printf "%s\\n" "$@"'  # a program that writes down how it was called


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (dict(TPU="pod"), ["tpu-vm", "ssh", "pod"]),
        (dict(QUEUED="four"), ["queued-resources", "ssh", "four", "--node=all"]),
    ],
)
def test_tpu_vms_get_the_flags_as_they_were_given(run_script, names, words):
    flags = ["--config=a.py:x,y", "--config.name=two words"]
    said = run_script("tpu_vm.sh", *flags, programs={"gcloud": SAY}, ZONE="z", PYTHON="py", **names)
    *arguments, command = said.stdout.splitlines()
    assert arguments == ["compute", "tpus", *words, "--zone=z", "--worker=all"], said.stderr
    remote = shlex.split(command.removeprefix("--command="))
    assert remote == ["cd", "mvjax", "&&", "py", "-m", "launch.train", *flags]


def test_slurm_gives_a_task_its_cpus_and_the_flags(run_script):
    said = run_script(
        "slurm.sh", "--config=a b", programs={"srun": SAY}, PYTHON="py", SLURM_CPUS_PER_TASK="8"
    )
    assert said.stdout.splitlines() == [
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
        *("py", "-m", "launch.train", "--config=a b"),
    ]


def test_processes_that_slurm_starts_find_each_other():
    """With the variables that srun sets, and nothing else."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    programs = [forked.Program("meeting", environment=task) for task in tasks]
    for n, said in enumerate([program.finish() for program in programs]):
        assert said.code == 0, said.err
        assert said.out.splitlines()[-1] == f"process {n} of 2, 2 devices"


@pytest.mark.parametrize(
    ("training", "code"),
    [
        ("touch $folder/finished", 0),
        ("exit 0", 143),  # interrupted: everything is saved, but there is more to do
        ("exit 2", 2),
        ("kill -ABRT $$", 128 + signal.SIGABRT),
    ],
)
def test_a_pod_ends_with_0_only_when_the_last_step_is_reached(run_script, tmp_path, training, code):
    program = f"folder={tmp_path}; {training}"
    said = run_script("pod.sh", f"--workdir={tmp_path}", programs={"python": program})
    assert said.returncode == code, said.stderr


def test_a_pod_passes_sigterm_on_and_waits_for_what_it_does(tmp_path):
    training = tmp_path / "python"
    training.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('saved'), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    training.chmod(0o755)
    pod = subprocess.Popen(
        [FOLDER / "pod.sh", f"--workdir={tmp_path}"],
        env=os.environ | {"PYTHON": str(training)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert pod.stdout.readline() == "ready\n"
    pod.terminate()
    assert (pod.stdout.read(), pod.wait()) == ("saved\n", 143)


def test_a_pod_needs_to_know_the_folder(run_script):
    said = run_script("pod.sh", "--config=a.py", programs={})
    assert said.returncode != 0 and "must be given as --workdir=FOLDER" in said.stderr
