"""The encoding command itself, in one process and in two, on video files that are cut off."""

import shutil
import socket
import time

import numpy as np
import pytest
from encode_toys import random_tokenizer
from forked import Program, run

import mvjax.encode
from data_pipelines.atomic import wait_until
from data_pipelines.lock import LOCK
from data_pipelines.records import RecordDataset
from data_pipelines.video import write_video
from mvjax.models.stand_ins import save_linear_tokenizer

CONFIG = """
from configs.quickstart import get_config as quickstart

def get_config(argument):
    folder, *records = argument.split(",")
    config = quickstart("smoke")
    config.run_dir = folder
    video = config.datasets.video
    video.anchor_fps = 10.0
    config.datasets = {name: dict(video, records=f"{folder}/{name}") for name in records}
    config.clip.update(height=32, width=32)
    return config
"""
SAID = "video: 276 windows of 70 episodes, 1 skipped (1.43 %), 3 instructions.\n"
EPISODES = 70  # two shards
BROKEN, REPAIRED = 7, 68  # in one of them each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos (one of them cut off), a tokenizer, a configuration file; encoded in "one"."""
    folder = tmp_path_factory.mktemp("encode")
    (folder / "config.py").write_text(CONFIG)
    rng = np.random.default_rng(0)
    save_linear_tokenizer(folder / "tokenizer.npz", random_tokenizer())
    for part in ("video", "metas"):
        (folder / "data" / "video" / part).mkdir(parents=True)
    for i in range(EPISODES):
        if i < 10:
            write_video(video(folder, i), rng.integers(0, 256, (8, 32, 32, 3), np.uint8), 20)
        else:
            shutil.copy(video(folder, i % 10), video(folder, i))
        text = folder / "data" / "video" / "metas" / f"{i:03d}.txt"
        text.write_text(f"task {i % 3}\n")
    cut_off(video(folder, BROKEN))
    said = encode(folder, "one")
    assert said.out == SAID and f"{BROKEN:03d}.mp4" in said.err
    return folder


def video(folder, i):
    return folder / "data" / "video" / "video" / f"{i:03d}.mp4"


def cut_off(file):
    file.write_bytes(file.read_bytes()[:200])


def arguments(folder, *records):
    return f"--config={folder / 'config.py'}:{','.join([str(folder), *records])}"


def encode(folder, records, *flags, devices=1):
    said = run("launch.encode", arguments(folder, records), *flags, devices=devices)
    assert said.code == 0, said.err
    return said


def in_two_processes(folder, records, *flags):
    """What they say; they meet as those of `launch.local` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"MVJAX_COORDINATOR": coordinator, "MVJAX_PROCESS_COUNT": "2"}
    command = ("launch.encode", arguments(folder, *records), *flags)
    programs = [
        Program(*command, environment={**variables, "MVJAX_PROCESS_ID": str(process)})
        for process in range(2)
    ]
    with programs[0], programs[1]:
        said = [program.finish() for program in programs]
    assert [s.code for s in said] == [0, 0], said
    lines = "".join(s.out for s in said).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))  # a library's


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_leave_the_same_bytes_as_one_and_try_repaired_episodes_again(folder):
    cut_off(video(folder, REPAIRED))
    said = encode(folder, "repaired")
    assert said.out == "video: 272 windows of 70 episodes, 2 skipped (2.86 %), 3 instructions.\n"
    for i in (BROKEN, REPAIRED):
        assert f"skipped episode number {i}: ValueError: " in said.err
        assert f"{i:03d}.mp4" in said.err
    shutil.copy(video(folder, REPAIRED % 10), video(folder, REPAIRED))

    assert in_two_processes(folder, ["two", "repaired"], "--retry_skipped") == 2 * SAID
    assert contents(folder / "one") == contents(folder / "two") == contents(folder / "repaired")


def _slowly():
    windows = mvjax.encode.EpisodeCutter.windows

    def slow(self, episode):
        time.sleep(0.1)
        return windows(self, episode)

    mvjax.encode.EpisodeCutter.windows = slow


def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(folder):
    """Also one with other settings, which would rewrite the plan while no shard is finished."""
    path, command = folder / "owned", ("launch.encode", arguments(folder, "owned"))
    other = "--config.validation_share=0.3"
    with Program(*command, other, prepare=_slowly) as killed:
        wait_until((path / "plan.json").exists)
        killed.kill()
        killed.wait()
    assert (path / LOCK).exists()
    with Program(*command, prepare=_slowly) as first:  # at once, and with settings of its own
        wait_until(lambda: f'"process": {first.pid}' in (path / LOCK).read_text())
        for flags in ([], [other], ["--retry_skipped"]):
            refused = run(*command, *flags)
            assert refused.code != 0 and f"process {first.pid} on" in refused.err
            assert f"is writing to {path}" in refused.err
        assert first.poll() is None
        assert first.finish().out == SAID
    assert contents(folder / "one") == contents(path)


def test_finished_records_may_be_read_only(folder):
    shutil.copytree(folder / "one", folder / "sealed")
    (folder / "sealed" / LOCK).mkdir()  # also root cannot write a file here
    assert encode(folder, "sealed").out == SAID


def test_texts_alone_are_made_again(folder):
    shutil.copytree(folder / "one", folder / "texts")
    encode(folder, "texts", "--only=text", "--config.text.length=6")
    one, texts = contents(folder / "one"), contents(folder / "texts")
    changed = {name for name in one if one[name] != texts[name]}
    assert changed == {"texts.npz", "plan.json", "manifest.json"}
    before, after = RecordDataset(folder / "one"), RecordDataset(folder / "texts")
    assert after.text(0).shape == (6, 64) and before.fingerprint != after.fingerprint


def test_a_batch_is_split_over_the_devices_of_the_process(folder):
    encode(folder, "devices", devices=4)
    one, four = RecordDataset(folder / "one"), RecordDataset(folder / "devices")
    assert one.fingerprint == four.fingerprint
    for index in range(0, len(one), 17):
        latents = [np.asarray(d[index]["latents"], np.float32) for d in (one, four)]
        np.testing.assert_allclose(*latents, atol=0.02)  # bfloat16
