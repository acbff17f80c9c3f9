"""Encodes every dataset once into records of latents, text, actions and proprioception.

python -m launch.encode --config=configs/quickstart.py
"""

import hashlib
from pathlib import Path

from data_pipelines.encode import encode_dataset
from data_pipelines.sources.open import open_config
from launch.entry import config_flag, run
from mvjax.clip import Clip
from mvjax.models.build import text_encoder
from mvjax.models.linear_tokenizer import load_tokenizer

CONFIG = config_flag()


def main() -> None:
    """Writes `records` of every dataset; goes on where an earlier call was stopped."""
    config = CONFIG.value
    Clip(**config.clip)  # wrong lengths are said before any data is read
    for stream, io in config.policy_io.items():
        if io.horizon < 1:
            raise ValueError(f"policy_io.{stream}.horizon must be at least 1, got {io.horizon}.")
    path = Path(config.tokenizer)
    tokenizer = load_tokenizer(path)
    identity = {
        "tokenizer": hashlib.sha256(path.read_bytes()).hexdigest(),
        "text_encoder": f"ngram {config.text.length}x{config.text.dim}",
    }
    for dataset in config.datasets.values():
        records = encode_dataset(
            open_config(dataset),
            dataset,
            config.clip,
            config.policy_io,
            tokenizer,
            text_encoder(config),
            dataset.records,
            identity=identity,
            anchor_fps=dataset.anchor_fps,
            validation_share=config.validation_share,
        )
        print(f"{dataset.name}: {len(records)} windows of {len(records.episodes)} episodes.")


if __name__ == "__main__":
    run(main)
