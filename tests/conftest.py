"""Trained runs that several test files read, and commands run as at the keyboard."""

import os
import signal
import tempfile

import forked
import jax
import pytest
from page_checks import NoBrowser, chromium
from tiny_stages import five_steps, quick_compiles, tiny_config, train_tiny

COMPILED = pytest.StashKey[tempfile.TemporaryDirectory]()
CORPUS = [
    "pick up the red mug and put it on the left plate",
    "open the top drawer of the wooden cabinet, then close it",
    "move the gripper 10 cm forward; slowly lower it over the pan!",
    "The video shows a robot arm in a kitchen. It grasps the handle of the moka pot.",
    "turn on the stove and put both cream cheese boxes into the basket",
]


# A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """What is compiled once serves all tests, of this process, of pytest-xdist's others, and of the
    processes that they start.
    """
    if hasattr(config, "workerinput"):
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"]  # of the process that started this one
    else:
        config.stash[COMPILED] = tempfile.TemporaryDirectory(prefix="mvjax_compiled_")
        folder = config.stash[COMPILED].name
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_unconfigure(config):
    if COMPILED in config.stash:
        config.stash[COMPILED].cleanup()


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


@pytest.fixture(scope="session")
def command():
    """command("launch.train", "--flag=1") -> Said, like `python -m` in a shell but sooner."""
    return forked.run


@pytest.fixture
def complains(command):
    """Runs a command that must end with code 2 and one line with the given words."""

    def check(words: str, module: str, *arguments: object) -> None:
        said = command(module, *arguments)
        assert said.code == 2, said
        assert said.err.startswith(f"{module}: ") and said.err.count("\n") == 1, said.err
        assert words in said.err

    return check


@pytest.fixture(scope="module")
def browser():
    """A Chromium for the checks of `page_checks.py`."""
    try:
        with chromium() as found:
            yield found
    except NoBrowser as missing:
        pytest.skip(str(missing))
