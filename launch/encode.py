"""Encodes every dataset once into records of latents, text, actions and proprioception.

    python -m launch.encode --config=configs/quickstart.py
    python -m launch.encode --config=... --only=text      # the text embeddings again, latents stay
    python -m launch.encode --config=... --retry_skipped  # episodes that were repaired since

Run the same command again to go on where an earlier call was stopped. Several processes (also of
several machines that share the folder) divide the work among them: start it in all of them, as
`launch.train`. Each uses all of its accelerators.
"""

import jax
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.clip import Clip
from data_pipelines.records import RecordDataset
from data_pipelines.sources.formats import open_config
from launch.entry import config_flag, run
from mvjax import parallel
from mvjax.encode import (
    LocalTokenizer,
    StoredTexts,
    TextEncoder,
    encode_dataset,
    encode_texts,
    local_batch_size,
)
from mvjax.policy.load import load_text_encoder, load_video_tokenizer

CONFIG = config_flag()
ONLY = flags.DEFINE_enum("only", "", ("", "text"), "Of finished records: what to make again.")
RETRY = flags.DEFINE_bool(
    "retry_skipped", False, "Make shards again that have skipped episodes which can be read now."
)


def main() -> None:
    """Writes `records` of every dataset, or their text embeddings."""
    config = CONFIG.value
    if ONLY.value and RETRY.value:
        raise ValueError("--only=text reads no episodes; give --retry_skipped in another call.")
    with parallel.initialized():
        if ONLY.value == "text":
            _texts(config)
        else:
            _records(config)


def _records(config: ConfigDict) -> None:
    clip = Clip(**config.clip)  # wrong lengths are said before any data is read
    for stream, io in config.policy_io.items():
        if io.horizon < 1:
            raise ValueError(f"policy_io.{stream}.horizon must be at least 1, got {io.horizon}.")
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    tokenizer = LocalTokenizer(tokenizer)
    text_encoder, text_identity = _text_encoder(config)
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
            batch_size=local_batch_size(clip.frames, clip.height, clip.width),
            anchor_fps=dataset.anchor_fps,
            validation_share=config.validation_share,
            max_bad_share=config.max_bad_share,
            retry_skipped=RETRY.value,
            process=jax.process_index(),
            processes=jax.process_count(),
            meet=lambda: parallel.everywhere(True),
        )
        _tell(dataset.name, records)


def _texts(config: ConfigDict) -> None:
    if jax.process_index() != 0:  # it is minutes of work, for one process
        return
    text_encoder, identity = _text_encoder(config)
    for dataset in config.datasets.values():
        stored = isinstance(text_encoder, StoredTexts)
        episodes = open_config(dataset) if stored else ()
        _tell(dataset.name, encode_texts(dataset.records, text_encoder, identity, episodes))


def _text_encoder(config: ConfigDict) -> tuple[TextEncoder | StoredTexts, str]:
    if config.text_encoder != "stored":
        return load_text_encoder(config)
    stored = StoredTexts(config.text.length, config.text.dim)
    return stored, stored.identity


def _tell(name: str, records: RecordDataset) -> None:
    if jax.process_index() == 0:
        skipped = f", {len(records.skipped)} skipped" if records.skipped else ""
        texts, count = len(records.instructions), len(records.episodes)
        print(f"{name}: {len(records)} windows of {count} episodes{skipped}, {texts} instructions.")


if __name__ == "__main__":
    run(main)
