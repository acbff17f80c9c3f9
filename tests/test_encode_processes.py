"""The encoding command itself, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.records.dataset import RecordDataset
from data_pipelines.video import write_video
from mvjax.models.linear_tokenizer import fit_linear_tokenizer, save_tokenizer

ROOT = Path(__file__).parents[1]
CONFIG = """
from configs.quickstart import get_config as quickstart

def get_config(folder):
    config = quickstart("smoke")
    config.run_dir = folder
    video = config.datasets.video
    video.anchor_fps = 10.0
    config.datasets = {"video": video}
    config.clip.update(height=32, width=32)
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos (a fifth of them broken), a tokenizer, and a configuration file."""
    folder = tmp_path_factory.mktemp("encode")
    (folder / "config.py").write_text(CONFIG)
    rng = np.random.default_rng(0)
    clips = rng.uniform(-1, 1, (4, 5, 32, 32, 3)).astype(np.float32)
    save_tokenizer(folder / "tokenizer.npz", fit_linear_tokenizer([clips]))
    for part in ("video", "metas"):
        (folder / "data" / "video" / part).mkdir(parents=True)
    for i in range(70):  # two shards
        file = folder / "data" / "video" / "video" / f"{i:03d}.mp4"
        write_video(file, rng.integers(0, 256, (8, 32, 32, 3), np.uint8), 20)
        (file.parents[1] / "metas" / f"{i:03d}.txt").write_text(f"task {i % 3}\n")
    broken = folder / "data" / "video" / "video" / "007.mp4"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


def encode(folder, records, *flags, processes=0, devices=1):
    """The command, in the shell's way; 0 processes are one without a launcher."""
    command = ["launch.encode", f"--config={folder / 'config.py'}:{folder}"]
    command += [f"--config.datasets.video.records={folder / records}", *flags]
    if processes:
        command = ["launch.local", f"--processes={processes}", "--", *command]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_leave_the_same_bytes_as_one_and_texts_are_made_again(folder):
    code, said, errors = encode(folder, "one")
    assert code == 0, errors
    assert said == "video: 276 windows of 70 episodes, 1 skipped, 3 instructions.\n"
    assert "skipped episode number 7: ValueError: " in errors and "007.mp4" in errors
    code, again, errors = encode(folder, "two", processes=2)
    assert code == 0 and again == said, errors
    assert contents(folder / "one") == contents(folder / "two")

    before = contents(folder / "two")
    code, said, errors = encode(folder, "two", "--only=text", "--config.text.length=6")
    assert code == 0, errors
    after = contents(folder / "two")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"texts.npz", "plan.json", "manifest.json"}
    one, two = RecordDataset(folder / "one"), RecordDataset(folder / "two")
    assert two.text(0).shape == (6, 64) and one.fingerprint != two.fingerprint


def test_a_batch_is_split_over_the_devices_of_the_process(folder):
    assert encode(folder, "devices", devices=4)[0] == 0
    one, four = RecordDataset(folder / "one"), RecordDataset(folder / "devices")
    assert one.fingerprint == four.fingerprint
    for index in range(0, len(one), 17):
        latents = [np.asarray(d[index]["latents"], np.float32) for d in (one, four)]
        np.testing.assert_allclose(*latents, atol=0.02)  # bfloat16
