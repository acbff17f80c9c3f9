"""Encodes every dataset once into records of latents, text, actions and proprioception.

    python -m launch.encode --config=configs/quickstart.py --only=tokenizer
    python -m launch.encode --config=configs/quickstart.py

The first command fits the linear tokenizer of small networks (config.tokenizer is a .npz file) to a
sample of the clips of all datasets. A converted Wan VAE does not need it. Afterwards:

    python -m launch.encode --config=... --only=text      # new text embeddings, same latents
    python -m launch.encode --config=... --retry_skipped  # episodes that were repaired since

To continue an encoding that was stopped, run the same command again. Several processes divide the
work, also on several machines that share the folder: start the command in all of them, as for
`launch.train`. Each process uses all of its accelerators.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.episode_cutter import sample_clips
from data_pipelines.records import RecordDataset
from data_pipelines.shards import StoredTexts, TextEncoder, encode_texts
from data_pipelines.sources.formats import open_config
from launch.entry import config_flag, run
from mvjax import parallel
from mvjax.encode import LocalTokenizer, encode_dataset, local_batch_size
from mvjax.experiment import Experiment
from mvjax.models.stand_ins import fit_linear_tokenizer, save_linear_tokenizer
from mvjax.policy.load import load_text_encoder, load_video_tokenizer

CONFIG = config_flag()
ONLY = flags.DEFINE_enum(
    "only",
    "",
    ("", "tokenizer", "text"),
    "tokenizer: only fit the tokenizer; text: only embed the texts of finished records again.",
)
RETRY = flags.DEFINE_bool(
    "retry_skipped", False, "Encode again the shards whose skipped episodes can be read now."
)

_FINDINGS = 20  # told at the end of a job


def main() -> None:
    """Writes `records` of every dataset, or their text embeddings."""
    experiment = Experiment.from_config(CONFIG.value)
    if ONLY.value and RETRY.value:
        raise ValueError(f"--only={ONLY.value} makes no records; leave --retry_skipped out.")
    with parallel.initialized():
        if ONLY.value == "tokenizer":
            _tokenizer(experiment.config)
        elif ONLY.value == "text":
            _texts(experiment.config)
        else:
            _records(experiment)


def _tokenizer(config: ConfigDict) -> None:
    """Fits `config.tokenizer`; one that is there stays."""
    path = Path(config.tokenizer)
    if path.suffix != ".npz" and not path.exists():
        raise ValueError(
            f"config.tokenizer is {path}: a linear tokenizer is fitted into a .npz file. For a Wan "
            "VAE, convert it into that folder (docs/weights.md)."
        )
    if jax.process_index() != 0:  # it is seconds of work, for one process
        return
    if path.exists():
        print(f"{path} is already fitted.")
        return
    clips = sample_clips(
        [(open_config(dataset), dataset) for dataset in config.datasets.values()],
        config.clip,
        config.policy_io,
        episodes_per_source=48,
        clips_per_episode=8,
        max_bad_share=config.max_bad_share,
    )
    # Without a lock: one small file, and its folder is that of a run, which may have an owner.
    save_linear_tokenizer(path, fit_linear_tokenizer(clips))


def _records(experiment: Experiment) -> None:
    config, clip = experiment.config, experiment.clip
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
        texts, count = len(records.instructions), len(records.episodes)
        skipped, share = len(records.skipped), len(records.skipped) / count
        more = f", {skipped} skipped ({100 * share:.3g} %)" if skipped else ""
        each = f" in {records.variants} variants" if records.variants > 1 else ""
        windows = f"{len(records)} windows{each} of {count} episodes"
        print(f"{name}: {windows}{more}, {texts} instructions.")
        found = sorted(records.findings.items(), key=lambda finding: -len(finding[1]))
        for text, episodes in found[:_FINDINGS]:
            print(f"{name}: {text} ({len(episodes)} of {count} episodes)")
        if len(found) > _FINDINGS:
            print(f"{name}: {len(found) - _FINDINGS} more findings: launch.inspect {records.path}")


if __name__ == "__main__":
    run(main)
