"""Encodes every dataset once into records of latents, text, actions and proprioception.

python -m launch.encode --config=configs/quickstart.py
"""

from data_pipelines.encode import encode_dataset
from data_pipelines.sources.open import open_config
from launch.entry import config_flag, run
from mvjax.checkpoints.encoders import load_text_encoder, load_video_tokenizer
from mvjax.clip import Clip

CONFIG = config_flag()


def main() -> None:
    """Writes `records` of every dataset; goes on where an earlier call was stopped."""
    config = CONFIG.value
    Clip(**config.clip)  # wrong lengths are said before any data is read
    for stream, io in config.policy_io.items():
        if io.horizon < 1:
            raise ValueError(f"policy_io.{stream}.horizon must be at least 1, got {io.horizon}.")
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    identity = {"tokenizer": tokenizer_identity, "text_encoder": text_identity}
    for dataset in config.datasets.values():
        records = encode_dataset(
            open_config(dataset),
            dataset,
            config.clip,
            config.policy_io,
            tokenizer,
            text_encoder,
            dataset.records,
            identity=identity,
            anchor_fps=dataset.anchor_fps,
            validation_share=config.validation_share,
        )
        print(f"{dataset.name}: {len(records)} windows of {len(records.episodes)} episodes.")


if __name__ == "__main__":
    run(main)
