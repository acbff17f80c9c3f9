"""Moments of held-out episodes, as observations with their true future and what was done there."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.clips import cut_episode
from data_pipelines.episode import Episode
from data_pipelines.selection import split_of
from mvjax.policy.observation import Observation


@dataclass(frozen=True)
class Moment:
    """A moment of a held-out episode.

    Attributes:
        dataset: the dataset's name.
        episode: the episode's number in it.
        id: the episode's id.
        at: how much of the episode lies before it, a share.
    """

    dataset: str
    episode: int
    id: str
    at: Fraction


@dataclass(frozen=True)
class Window:
    """What a demonstration shows at a moment.

    Attributes:
        moment: which one.
        observation: with the true future.
        actions: what was done, raw units [horizon, dim].
    """

    moment: Moment
    observation: Observation
    actions: np.ndarray


def held_out_episodes(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float
) -> dict[int, str]:
    """Number and id of the episodes that no training has seen.

    One that cannot be opened is left out and said: the encoding job has left it out as well.

    Args:
        episodes: of the dataset.
        dataset: its config section.
        validation_share: share of the episodes that training holds out.

    Raises:
        ValueError: if there is none.
    """
    held_out = {}
    for number in range(len(episodes)):
        try:
            id = episodes[number].id
        except Exception as error:  # readers and decoders raise types of their own
            print(f"{dataset.name}: skipped episode number {number}: {error}", file=sys.stderr)
            continue
        if split_of(id, validation_share) == "validation":
            held_out[number] = id
    if not held_out:
        raise ValueError(
            f"Dataset {dataset.name!r} has no held-out episode: config.validation_share is "
            f"{validation_share}; train with a larger one."
        )
    return held_out


def held_out_moments(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float, count: int
) -> list[Moment]:
    """So many moments, spread over the held-out episodes and over their length.

    Args:
        episodes, dataset, validation_share: as in `held_out_episodes`.
        count: how many.

    Returns:
        Moments in the order of their episodes.
    """
    held_out = held_out_episodes(episodes, dataset, validation_share)
    numbers = list(held_out)
    chosen = Counter(numbers[n * len(numbers) // count] for n in range(count))
    return [
        Moment(dataset.name, number, held_out[number], Fraction(2 * n + 1, 2 * many))
        for number, many in chosen.items()
        for n in range(many)
    ]


def windows_at(
    episode: Episode, moments: Sequence[Moment], dataset: ConfigDict, config: ConfigDict
) -> list[Window]:
    """Reads moments of one episode.

    Args:
        episode: theirs.
        moments: which.
        dataset: its config section, with actions.
        config: `clip` and `policy_io`.

    Raises:
        ValueError: if the episode cannot be cut.
    """
    cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
    windows = []
    for moment in moments:
        index = int(moment.at * len(cuts.clips))
        past, future = np.split(cuts.frames[cuts.clips[index]], [config.clip.observed_frames])
        proprio = cuts.columns["proprio"][index]
        observation = Observation(past, proprio, episode.instructions[0], future)
        windows.append(Window(moment, observation, cuts.columns["actions"][index]))
    return windows
