"""What the entry points say to the person at the keyboard: one sentence and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import trained
from data_pipelines.video import write_video
from mvjax.parallel import make_rules
from mvjax.training.directory import read_meta
from mvjax.training.step import make_schedule

ROOT = Path(__file__).parents[1]
VIDEO = "--config=configs/quickstart_video.py:smoke"
ACTION = "--config=configs/quickstart_action.py:smoke"
TINY_CONFIG = """
from configs import quickstart_video

def get_config(run_dir):
    config = quickstart_video.get_config("smoke")
    config.run_dir = run_dir
    del config.datasets["robot"]
    config.clip.height = config.clip.width = 32
    config.text.update(length=4, dim=16)
    config.video_model.update(width=48, num_blocks=1, num_heads=2, adaln_rank=4)
    config.validation_share = 0.0
    config.training.sample_every = 0  # nothing is held out
    config.training.update(steps=1, batch_size=2)
    return config
"""


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([VIDEO, "--config.optimizer.lerning_rate=1"], "'lerning_rate'; did you mean 'learning_ra"),
        ([VIDEO, "--config.optimizer.xyz=1"], "there is no setting 'xyz'."),
        ([VIDEO, "--config.optimzer.eps=1"], "'optimzer'; did you mean 'optimizer'?"),
        ([VIDEO, "--config.training.steps=ten"], "--config.training.steps=ten: invalid literal"),
        ([VIDEO, "--config.sampler.fresh_noise=2"], "fresh_noise=2: Non-boolean argument"),
        ([VIDEO, "--workdri=x"], "flag 'workdri'. Did you mean: workdir"),
        ([VIDEO], "--workdir must be given."),
        ([VIDEO, "--workdir="], "--workdir must be given."),
        (["--workdir=x"], "--config must be given."),
        ([VIDEO, "--workdir=x", "extra"], "unexpected argument 'extra'"),
        ([VIDEO + "st", "--workdir=x"], "size must be full or smoke, got 'smokest'"),
        (["--config=configs/video.py", "--workdir=x"], "No such file or directory: 'configs/video"),
        (["--config=configs", "--workdir=x"], "--config cannot be read: Is a directory"),
        (["--config=quickstart_vido", "--workdir=x"], "did you mean quickstart_video"),
        (["--config=nothing", "--workdir=x"], "there is no configuration 'nothing'"),
        (
            ["--config", "quickstart_video:smokest", "--workdir", "x"],
            "full or smoke, got 'smokest'",
        ),
        (["--config=data_pipelines/clip.py", "--workdir=x"], "with a function get_config"),
        (["--config=pyproject.toml", "--workdir=x"], "pyproject.toml, line "),
        (["--config=configs/quickstart.py", "--workdir=x"], "configuration has no setting 'stage'"),
        (
            [VIDEO, "--workdir=x", "--config.clip.future_frames=7"],
            "clip.future_frames must be a positive",
        ),
        (
            [ACTION, "--workdir=x", "--config.policy_io.action.horizon=0"],
            "policy_io.action.horizon must be a whole number of at least 1, got 0",
        ),
        ([VIDEO, "--workdir=x", "--config.run_dir=nothing"], "nothing/records/robot holds no rec"),
    ],
)
def test_mistakes_in_training_commands(complains, arguments, words):
    complains(words, "launch.train", *arguments)
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "code, words",
    [
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError: No module named 'nothing_"),
        ("def get_config():\n    return {}['a']", "line 2: KeyError: a"),
        ("def get_config():\n    raise ValueError('one sentence')", "launch.train: one sentence"),
        ("def get_config(:", "line 1: invalid syntax"),
    ],
)
def test_mistakes_in_a_configuration_file_say_the_line(complains, tmp_path, code, words):
    (tmp_path / "own.py").write_text(code)
    complains(words, "launch.train", f"--config={tmp_path / 'own.py'}", "--workdir=x")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--modes=expert,plicy"], "mode must be policy, oracle, expert or none, got 'plicy'"),
        (["--modes="], "--modes must name at least one mode"),
        (["--checkpoint=x", "--stop_steps=0,11"], "between 0 and sampler.video_steps = 10, got 11"),
        (
            ["--checkpoint=x", "--stop_steps=-1"],
            "whole numbers such as 0,5,10; got '-",
        ),
        (["--checkpoint=x", "--stop_steps=half"], "whole numbers such as 0,5,10"),
        (["--stop_steps=0"], "--checkpoint must be given"),
        (["--checkpoint=nothing"], "nothing is not a training directory"),
    ],
)
def test_mistakes_in_evaluation_commands(complains, tmp_path, arguments, words):
    out = tmp_path / "out"
    complains(words, "launch.evaluate", ACTION, f"--out={out}", *arguments)
    assert not out.exists()  # nothing was played before the mistake was noticed


def test_a_run_brings_its_own_configuration(complains, video_run):
    config = trained.get_config(str(video_run))
    assert config.to_json() == ConfigDict(read_meta(video_run)["config"]).to_json()
    assert make_rules(config.rules) and make_schedule(config.optimizer)
    for checkpoint in ([f"--checkpoint={video_run}"], ["--checkpoint", video_run]):
        misspelt = "--config.sampler.video_step=1"
        complains("did you mean 'video_steps'?", "launch.evaluate", *checkpoint, misspelt)
    # JSON keeps tuples as lists, which no command line could change.
    assert config.lora.targets == tuple(read_meta(video_run)["config"]["lora"]["targets"])
    complains("nothing is not a training directory", "launch.evaluate", "--checkpoint=nothing")


def test_mistakes_in_the_other_commands(complains):
    shared = "--config=configs/quickstart.py:smoke"
    encode, fit = ("launch.encode", shared), ("launch.encode", shared, "--only=tokenizer")
    for words in (encode, fit):
        complains("clip.height must be a multiple of 16", *words, "--config.clip.height=40")
    complains("nothing/data/robot", *fit, "--config.run_dir=nothing")
    complains("is fitted into a .npz file", *fit, "--config.tokenizer=weights/nothing")
    complains("nothing/tokenizer.npz", *encode, "--config.run_dir=nothing")
    complains("leave --retry_skipped out", *fit, "--retry-skipped")
    record = "launch.record", "--out=x", "--kind=robot", "--tasks=door-open-v3", "--episodes=1"
    for value in ("nan", "inf"):  # bounds let NaN pass
        complains(f"--noise must be a finite number, got {value}", *record, f"--noise={value}")
    predictions = "launch.evaluate", ACTION, "--suite=predictions"
    complains("0 is not a positive", *predictions, "--moments=0")
    complains("--checkpoint must be given", *predictions, "--out=y")
    complains("there is no such folder", *predictions, "--checkpoint=x", "--out=y")


def test_help_lists_every_flag_of_a_command(command):
    said = command("launch.train", "--help").out
    assert command("launch.train", "-h") == (0, said, "")
    assert "Trains the video model" in said and "--config:" in said and "--workdir:" in said


def test_shipped_configurations_are_found_from_any_folder(tmp_path):
    program = [sys.executable, "-m", "launch.train", "--config=quickstart_video:smoke"]
    result = subprocess.run(
        [*program, "--workdir=x", "--config.clip.height=40"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "clip.height must be a multiple of 16" in result.stderr


def test_who_asks_for_the_traceback_gets_it(command, tmp_path):
    asks = "import os\nos.environ['MVJAX_TRACEBACK'] = '1'\n"  # in that process only
    (tmp_path / "own.py").write_text(asks + "def get_config():\n    return {}['a']")
    said = command("launch.train", f"--config={tmp_path / 'own.py'}", "--workdir=x")
    assert said.code == 1 and "Traceback" in said.err and "KeyError: 'a'" in said.err


def test_the_commands_are_the_same_in_a_shell(command):
    result = subprocess.run(
        [sys.executable, "-m", "launch.train", VIDEO, "--config.optimizer.lerning_rate=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    words = "launch.train: there is no setting 'lerning_rate'; did you mean"
    assert result.returncode == 2 and not result.stdout and words in result.stderr.splitlines()[-1]
    said = command("launch.quickstart", "--size=huge")
    assert said.code == 2 and not said.out
    assert "--size=huge: value should be one of <full|smoke>" in said.err.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, command):
    """Flags of a stage-1 configuration whose records, of three short videos, are encoded."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(TINY_CONFIG)
    (folder / "data/video/metas").mkdir(parents=True)
    (folder / "data/video/video").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        frames = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
        write_video(folder / f"data/video/video/{name}.mp4", list(frames), 20)
        (folder / f"data/video/metas/{name}.txt").write_text("press the button\n")
    flag = f"--config={folder / 'tiny.py'}:{folder}"
    for only in (["--only=tokenizer"], []):
        said = command("launch.encode", flag, *only)
        assert said.code == 0, said.err
    assert "is already fitted" in command("launch.encode", flag, "--only=tokenizer").out
    return flag


def test_an_own_configuration_trains_and_other_sizes_do_not_fit_it(command, complains, tiny):
    workdir = Path(tiny.rpartition(":")[2]) / "video"
    assert command("launch.train", tiny, f"--workdir={workdir}").code == 0
    said = command(
        "launch.train",
        tiny,
        f"--workdir={workdir}",
        "--config.training.steps=2",
        "--config.video_model.width=96",
    )
    assert said.code == 2 and "has shape" in said.err and "Traceback" not in said.err
    complains(
        "length is 4 there, 8 here", "launch.train", tiny, "--config.text.length=8", "--workdir=x"
    )
    complains("was begun with other settings", "launch.encode", tiny, "--config.clip.height=48")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes) -> an empty folder with so much room."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
        result = subprocess.run(["mount", *options], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
        mounted.append(disk)
        return disk

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a small disk")
    yield mount
    for disk in mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


FULL = ": the disk is full; make room and run the same command again ("


def test_a_full_disk_is_said_and_the_same_command_goes_on_with_room(command, tiny, small_disk):
    for setting, *only in (
        ("tokenizer={}/tokenizer.npz", "--only=tokenizer"),
        ("datasets.video.records={}/records",),
    ):
        disk = small_disk(64)
        words = "launch.encode", tiny, f"--config.{setting.format(disk)}", *only
        said = command(*words)
        assert said.code == 2 and "Traceback" not in said.err
        assert said.err.splitlines()[-1].startswith("launch.encode" + FULL)
        make_room(disk)
        assert command(*words).code == 0


def test_a_full_disk_stops_training_which_goes_on_with_room(command, tiny, small_disk):
    disk = small_disk(300)  # room for the metrics, not for a checkpoint
    flags = tiny, f"--workdir={disk}/video"
    said = command("launch.train", *flags)
    assert said.code == 2
    assert any(line.startswith("launch.train" + FULL) for line in said.err.splitlines())
    assert "Traceback" not in said.err
    make_room(disk)
    assert command("launch.train", *flags).code == 0
    record = json.loads((disk / "video/metrics.jsonl").read_text())
    assert record["step"] == 1
