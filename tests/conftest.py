"""Trained runs that several test files read, and commands run as at the keyboard."""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_stages import five_steps, quick_compiles, tiny_config, train_tiny

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "data_pipelines.encoding.job",
    "data_pipelines.fit_tokenizer",
    "launch.entry",
    "mvjax.evaluation.closed_loop",
    "mvjax.checkpoints.torch_weights.export",
    "mvjax.evaluation.prediction",
    "mvjax.policy.load_generation",
    "mvjax.training.run",
]
CORPUS = [
    "pick up the red mug and put it on the left plate",
    "open the top drawer of the wooden cabinet, then close it",
    "move the gripper 10 cm forward; slowly lower it over the pan!",
    "The video shows a robot arm in a kitchen. It grasps the handle of the moka pot.",
    "turn on the stove and put both cream cheese boxes into the basket",
]


# A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def quickly():
    """Compiles quickly while a module's tests run."""
    with quick_compiles():
        yield


@pytest.fixture(scope="session")
def video_run(tmp_path_factory):
    """A stage-1 training directory of five steps of full training, moving average included."""
    workdir = tmp_path_factory.mktemp("video")
    with quick_compiles():
        train_tiny(five_steps("video"), workdir)
    return workdir


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, video_run):
    """A stage-1 training directory of a LoRA run started from `video_run`."""
    workdir = tmp_path_factory.mktemp("lora")
    with quick_compiles():
        train_tiny(lora_config(video_run), workdir)
    return workdir


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A folder with a small sentencepiece model, in the way of T5."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "spiece"),
        vocab_size=70,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        minloglevel=2,
    )
    return folder


def lora_config(init_from):
    config = tiny_config("video", steps=2)
    config.lora.update(rank=4, alpha=8.0)
    config.init_from = str(init_from)
    return config


class Said(NamedTuple):
    code: int
    out: str
    err: str


def _run_module(module: str, arguments: list[str], folder: Path, prepare) -> None:
    if prepare:
        prepare()
    os.chdir(ROOT)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles four times faster
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command("launch.train", "--flag=1") -> Said, like `python -m` in a shell.

    The real module runs as `__main__`, in a process forked from one that has imported jax and the
    rest already: about 0.1 s per command instead of 3.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = tmp_path_factory.mktemp("output")

    def run(module: str, *arguments: object, prepare=None) -> Said:
        words = [str(argument) for argument in arguments]
        process = context.Process(target=_run_module, args=(module, words, folder, prepare))
        process.start()
        process.join()
        return Said(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())

    return run


@pytest.fixture
def complains(command):
    """Runs a command that must end with code 2 and one line with the given words."""

    def check(words: str, module: str, *arguments: object) -> None:
        said = command(module, *arguments)
        assert said.code == 2, said
        assert said.err.startswith(f"{module}: ") and said.err.count("\n") == 1, said.err
        assert words in said.err

    return check
