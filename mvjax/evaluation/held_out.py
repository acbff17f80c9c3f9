"""Moments of held-out episodes: an observation, its true future, and the demonstrated actions."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.clip import VIDEO
from data_pipelines.cutting import cut_episode
from data_pipelines.episode import Episode, split_of
from mvjax.policy.observation import Observation
from mvjax.training.directory import Checkpoint, find_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """A moment of a held-out episode."""

    dataset: str
    episode: int  # index in the dataset
    id: str
    at: Fraction  # position as a fraction of the episode's length


@dataclass(frozen=True)
class Window:
    """The policy's input at a moment, and the demonstrated actions."""

    moment: Moment
    observation: Observation  # with the true future
    actions: np.ndarray  # raw units [horizon, dim]


def check_held_out(config: ConfigDict, checkpoint: Checkpoint) -> None:
    """Compares `config.validation_share` with what a decoder and its backbone were trained with.

    Raises:
        ValueError: the decoder learned from episodes that would count as held out. A backbone that
            did is a warning, since some are trained on all video. Converted weights pass. Or two
            datasets have one name, by which their episodes are told apart.
    """
    named: dict[str, str] = {}
    for key, dataset in config.datasets.items():
        if (other := named.setdefault(dataset.name, key)) != key:
            raise ValueError(
                f"config.datasets.{other} and .{key} have the same name, {dataset.name!r}: rename "
                f"one of them with --config.datasets.{key}.name=NAME."
            )
    if share := _larger_share(config, checkpoint):
        raise ValueError(
            f"config.validation_share is {config.validation_share}, but {checkpoint.directory} was "
            f"trained with {share[0]}: it learned from episodes that would count as held out. Use "
            "that share, or train again with this one."
        )
    # In a joint run it is the same checkpoint.
    if directory := config.get("backbone", {}).get("checkpoint"):
        backbone = find_checkpoint(directory)
        if share := _larger_share(config, backbone):
            log.warning(
                "config.validation_share is %s, but the video model in %s was trained with %s: it "
                "has seen videos of the held-out episodes.",
                *(config.validation_share, backbone.directory, share[0]),
            )


def _larger_share(config: ConfigDict, checkpoint: Checkpoint) -> list[float]:
    """The share of its training, if fewer episodes of these datasets were held out there."""
    trained = checkpoint.meta["config"]
    if not set(trained.get("datasets", ())) & set(config.datasets):
        return []
    share = trained.get("validation_share", config.validation_share)
    return [share] if share < config.validation_share else []


def held_out_episodes(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float
) -> dict[int, str]:
    """Returns index and id of the episodes that training holds out; ValueError if there is none.

    An episode that cannot be opened is skipped with a warning, as the encoding job skips it.
    """
    held_out = {}
    for index in range(len(episodes)):
        try:
            id = episodes[index].id
        except Exception as error:  # readers and decoders raise types of their own
            log.warning("%s: skipped episode number %d: %s", dataset.name, index, error)
            continue
        if split_of(id, validation_share) == "validation":
            held_out[index] = id
    if not held_out:
        raise ValueError(
            f"Dataset {dataset.name!r} has no held-out episode: config.validation_share is "
            f"{validation_share}; train with a larger one."
        )
    return held_out


def held_out_moments(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float, count: int
) -> list[Moment]:
    """Returns `count` moments, spread evenly over the held-out episodes and along each of them."""
    held_out = held_out_episodes(episodes, dataset, validation_share)
    indices = list(held_out)
    chosen = Counter(indices[n * len(indices) // count] for n in range(count))
    return [
        Moment(dataset.name, index, held_out[index], Fraction(2 * n + 1, 2 * moments))
        for index, moments in chosen.items()
        for n in range(moments)
    ]


def content_of(episode: Episode) -> str:
    """A digest of an episode's numbers, timestamps and texts: data that changed are other data."""
    digest = hashlib.sha256(repr((episode.instructions, episode.sections)).encode())
    for name, stream in sorted(episode.streams.items()):
        digest.update(f"{name} {len(stream.values)} ".encode())
        digest.update(stream.timestamps.tobytes())
        if isinstance(stream.values, np.ndarray):
            digest.update(f"{stream.values.dtype} {stream.values.shape} ".encode())
            digest.update(np.ascontiguousarray(stream.values).tobytes())
    return digest.hexdigest()


def windows_at(
    episode: Episode, moments: Sequence[Moment], dataset: ConfigDict, config: ConfigDict
) -> list[Window]:
    """Reads the windows at moments of one episode."""
    cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
    windows = []
    for moment in moments:
        index = int(moment.at * len(cuts.texts))
        past, future = np.split(cuts.video.window(index), [config.clip.observed_frames])
        seen = {VIDEO: past} | {name: view.window(index) for name, view in cuts.views.items()}
        proprio = cuts.columns["proprio"][index]
        anchor = int(cuts.columns["anchor"][index])
        text, name = episode.instructions_at(anchor)[0], (f"{moment.dataset}/{moment.id}", anchor)
        observation = Observation(seen, proprio, text, {VIDEO: future}, name, arranged=True)
        windows.append(Window(moment, observation, cuts.columns["actions"][index]))
    return windows
