"""One training run from its configuration: records, normalizer, stage and loop put together."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from data_pipelines.atomic import wait_until
from data_pipelines.episode import PerTask
from data_pipelines.loader import Batches, make_loader
from data_pipelines.lock import run_lock
from data_pipelines.normalize import (
    Normalizers,
    data_fingerprint,
    load_normalizers,
    make_normalizers,
)
from data_pipelines.provenance import open_records
from data_pipelines.records import RecordDataset
from data_pipelines.settings import other_networks
from mvjax.experiment import Experiment
from mvjax.identity import digest_of_json
from mvjax.parallel import spec
from mvjax.training.bridge import (
    backbone_checkpoint,
    backbone_identity,
    load_backbone,
    trained_backbone,
)
from mvjax.training.directory import Checkpoint
from mvjax.training.metrics import Record, require_wandb
from mvjax.training.objectives import make_stage
from mvjax.training.prefetch import local_rows
from mvjax.training.train import train
from mvjax.training.validation import make_validation


def run(experiment: Experiment, workdir: Path, *, profile: bool = False) -> Record:
    """Trains the stage of an experiment on its encoded datasets; see `train`.

    Stage 1 and joint training read every dataset. Stage 2 reads those with actions, since its video
    model is frozen and a window without actions would teach nothing. Where actions are learned,
    `normalizer.json` is written beside the checkpoints, of the datasets that have them.
    """
    config, settings, workdir = experiment.config, experiment.config.training, Path(workdir)
    acting, chosen = experiment.learns_actions, experiment.datasets
    if config.wandb and jax.process_index() == 0:  # the only process that writes there
        require_wandb(config.wandb)
    tell = jax.process_index() == 0
    datasets = [open_records(config, d, acting=acting, tell=tell) for d in chosen]
    identity = _identity(datasets)
    _check_encoders(config, identity)
    trained, frozen = trained_backbone(workdir), not experiment.learns_video
    backbone = backbone_checkpoint(experiment, trained, str(workdir)) if frozen else None
    if backbone is not None:
        _check_backbone(backbone, identity)
    mesh, rules = experiment.mesh(), experiment.rules
    experiment.check_batch(mesh)  # before any data is read
    mask_padding = acting and config.policy_io.action.get("mask_padding", False)
    choice = (settings.episodes_per_task, settings.seed, mask_padding)
    with_actions = [d for d in datasets if "actions" in d.shapes]
    normalizers = _normalizers(with_actions, choice, workdir) if acting else None

    def batches(split: str, batch_size: int, **reading: int) -> Batches:
        return make_loader(
            datasets,
            [d.weight for d in chosen],
            batch_size,
            settings.seed,
            split,
            normalizers,
            settings.episodes_per_task if split == "train" else None,
            mask_padding=mask_padding,
            max_bad_share=config.max_bad_share,
            rows=local_rows(NamedSharding(mesh, spec(("batch",), rules)), batch_size),
            **reading,
        )

    with jax.set_mesh(mesh):
        # The step is fixed here: stage 1 may write newer checkpoints meanwhile.
        step = None if backbone is None else backbone.step
        stage = make_stage(experiment, mesh, partial(load_backbone, step=step))
    meta = {"data_fingerprint": [d.fingerprint for d in datasets], "identity": identity}
    if normalizers is not None:
        meta["normalizer_fingerprint"] = normalizers.fingerprint
        meta["normalizer_digest"] = digest_of_json(workdir / "normalizer.json")
    if frozen:
        meta["backbone"] = backbone_identity(experiment, backbone)
    return train(
        experiment,
        stage,
        batches("train", settings.batch_size),
        workdir,
        meta,
        validation=make_validation(experiment, stage, mesh, batches, identity, workdir),
        profile=profile,
    )


def _identity(datasets: Sequence[RecordDataset]) -> dict[str, str]:
    """The tokenizer and text encoder that made the records: the same for all, or an error."""
    first, *others = datasets
    for other in others:
        different = other_networks(first.settings["identity"], other.settings["identity"])
        if different:
            raise ValueError(
                f"The records of {first.name!r} and {other.name!r} were made with different "
                f"networks: {'; '.join(different)}. Encode both with the same."
            )
    return first.settings["identity"]


def _check_encoders(config: Any, identity: dict[str, str]) -> None:
    """Compares what is quick to tell; a policy compares the rest when it loads its networks."""
    ours = {}
    if Path(config.tokenizer).is_file():
        ours["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    if not config.text_encoder:
        ours["text_encoder"] = f"ngram {config.text.length}x{config.text.dim}"
    # It is unknown which network made the embeddings that a dataset stores.
    made = {k: v for k, v in identity.items() if k in ours and not v.startswith("stored ")}
    if different := other_networks(made, {name: ours[name] for name in made}):
        raise ValueError(
            f"The records were encoded with another tokenizer or text encoder than this "
            f"configuration names: {'; '.join(different)}. Set config.tokenizer and "
            "config.text_encoder to those, or encode again into another folder."
        )


def _check_backbone(backbone: Checkpoint, identity: dict[str, str]) -> None:
    trained = backbone.meta.get("identity")
    different = other_networks(trained, identity) if trained else ()  # weights lack it
    if different:
        raise ValueError(
            f"The backbone in {backbone.directory} was trained on other latents or text than these "
            f"records hold: {'; '.join(different)}. Encode with the tokenizer it was trained with, "
            "or train stage 1 again."
        )


def _normalizers(
    datasets: Sequence[RecordDataset], choice: tuple[PerTask, int, bool], workdir: Path
) -> Normalizers:
    """Reads `normalizer.json`; process 0 makes it first where it is missing.

    `choice` is what `make_normalizers` takes beside the datasets.
    """
    path = workdir / "normalizer.json"
    if jax.process_index() == 0 and not path.exists():
        with run_lock(workdir):  # two runs would spoil each other's scratch
            made = make_normalizers(datasets, *choice, scratch=workdir / "normalizer.unfinished")
            made.save(path)
    wait_until(path.exists)
    normalizers = load_normalizers(path)
    if normalizers.fingerprint != data_fingerprint(datasets, *choice):
        raise ValueError(
            f"{path} was made from other data, or with another training.episodes_per_task, "
            "training.seed, policy_io.action.mask_padding or normalize; restore these, or use a "
            "new --workdir."
        )
    return normalizers
