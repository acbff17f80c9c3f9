"""Fits the linear video tokenizer to a sample of all datasets' clips.

python -m launch.fit_tokenizer --config=configs/quickstart.py
"""

from pathlib import Path

from data_pipelines.clip import Clip
from data_pipelines.sources.formats import open_config
from launch.entry import config_flag, run
from mvjax.fit_tokenizer import sample_clips
from mvjax.models.stand_ins import fit_linear_tokenizer, save_linear_tokenizer

CONFIG = config_flag()


def main() -> None:
    """Writes `config.tokenizer`; a tokenizer that is already there stays."""
    config = CONFIG.value
    Clip(**config.clip)  # wrong lengths are said before any data is read
    path = Path(config.tokenizer)
    if path.exists():
        print(f"{path} is already fitted.")
        return
    if path.suffix != ".npz":  # the folder of a converted Wan VAE, which is not there yet
        raise ValueError(
            f"config.tokenizer is {path}: a linear tokenizer is fitted into a .npz file. For a Wan "
            "VAE, convert it into that folder (docs/weights.md)."
        )
    sources = [(open_config(dataset), dataset) for dataset in config.datasets.values()]
    clips = sample_clips(
        sources,
        config.clip,
        config.policy_io,
        episodes_per_source=48,
        clips_per_episode=8,
        max_bad_share=config.max_bad_share,
    )
    save_linear_tokenizer(path, fit_linear_tokenizer(clips))


if __name__ == "__main__":
    run(main)
