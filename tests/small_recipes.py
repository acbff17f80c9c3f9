"""The recipes of DROID and ALOHA with small pictures and networks, on the datasets of the fixtures.

`--config=tests/small_recipes.py:droid_video,RUN_DIR`
"""

import importlib
from pathlib import Path

from ml_collections import ConfigDict

FIXTURES = Path(__file__).parent / "fixtures"
LISTS = FIXTURES / "droid/lists"
DATASETS = {"droid": FIXTURES / "droid/droid/1.0.1", "aloha": FIXTURES / "aloha"}


def get_config(arguments: str) -> ConfigDict:
    """A stage of a recipe, with two steps of training."""
    name, run_dir = arguments.split(",")
    config = smaller(name)
    config.run_dir = run_dir
    config.tokenizer, config.text_encoder = f"{run_dir}/tokenizer.npz", ""
    config.text.update(length=4, dim=16)
    config.video_model.update(width=48, num_blocks=2, num_heads=2, adaln_rank=4, remat="none")
    config.decoder.update(width=32, num_blocks=2, num_heads=2, adaln_rank=4, time_rank=16)
    config.context_layer = 1
    config.sampler.video_steps = 3
    config.training.update(steps=2, batch_size=4, log_every=1, checkpoint_every=2, sample_every=0)
    if config.stage == "video":
        config.lora.update(rank=4, alpha=8.0)
        config.init_from = ""
    return config


def smaller(name: str) -> ConfigDict:
    """A stage of a recipe with small pictures, whose dataset is that of the fixture."""
    config = importlib.import_module(f"configs.{name}").get_config()
    (dataset,) = config.datasets.values()
    dataset.path = str(DATASETS[name.partition("_")[0]])
    if "options" in dataset:
        dataset.options.droid.ranges = str(LISTS / "ranges.json")
    config.clip.update(height=32, width=48)
    for view in config.clip.views.values():
        view.update(height=16, width=32)
    return config
