"""Trained runs that several test files read."""

import pytest
from tiny_stages import five_steps, quick_compiles, tiny_config, train_tiny


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


def lora_config(init_from):
    config = tiny_config("video", steps=2)
    config.lora.update(rank=4, alpha=8.0)
    config.init_from = str(init_from)
    return config
