"""The offline evaluation as a job: shared by processes, and continued where it was stopped.

What was computed at a moment is kept in a file of its own, `moments/<digest>.npz`; the digest is of
all that decides it. So a file that is there is what is wanted, whoever has written it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.encoding.shared_folder import wait_until
from data_pipelines.records.writer import write_npz
from data_pipelines.sources.open import open_config
from mvjax.evaluation.held_out import Moment, Window, held_out_moments, windows_at
from mvjax.evaluation.offline import WindowErrors, window_errors
from mvjax.evaluation.offline_report import summarise, write_offline
from mvjax.policy.load import load_policy, policy_identity
from mvjax.policy.sampling import Sampling

_UNREADABLE = "unreadable"  # in place of errors: why the episode could not be read
Files = Mapping[Moment, Path]


def evaluate_offline(
    config: Any, checkpoint: Path, folder: Path, stop_steps: Sequence[int], count: int, batch: int
) -> dict[str, Any]:
    """Evaluates a policy on the held-out episodes of every dataset with actions.

    The processes of a job share the episodes and the folder; each has the whole policy on its own
    devices. An episode that cannot be read is left out and named.

    Args:
        config: configuration of the stage-2 run.
        checkpoint: its training directory.
        folder: where the results go.
        stop_steps: at which to read the video.
        count: moments per dataset.
        batch: moments computed at once.

    Returns:
        What `summarise` gives, in every process.

    Raises:
        ValueError: if nothing is held out, or none of it can be read.
    """
    sampling = Sampling(**config.sampler)
    sections = {d.name: d for d in config.datasets.values() if d.action}
    episodes = {name: open_config(section) for name, section in sections.items()}
    measured = [policy_identity(config, checkpoint), str(sampling), list(stop_steps)]
    files: dict[Moment, Path] = {}
    for name, section in sections.items():
        moments = held_out_moments(episodes[name], section, config.validation_share, count)
        files |= _files(folder / "moments", moments, [*measured, *_settings(section, config)])

    def windows(moments: Iterable[Moment]) -> Iterator[Window]:
        for (name, number), of_one in groupby(moments, _episode):
            of_one = list(of_one)
            try:
                read = windows_at(episodes[name][number], of_one, sections[name], config)
            except Exception as error:  # decoders raise types of their own
                for moment in of_one:
                    reason = f"{moment.id}: {type(error).__name__}: {error}"
                    write_npz(files[moment], **{_UNREADABLE: np.array(reason)})
            else:
                yield from read

    ours = _share(files)
    left = [moment for moment in ours if not files[moment].exists()]
    if left:
        policy = load_policy(config, checkpoint, sampling, batch)
        found = window_errors(policy, windows(left), stop_steps)
        bar = dict(total=len(ours), initial=len(ours) - len(left), unit="moment")
        for window, errors in tqdm(found, **bar, disable=jax.process_index() > 0):
            write_npz(files[window.moment], **asdict(errors))
    wait_until(lambda: all(file.exists() for file in files.values()))

    label = f"{checkpoint} on {', '.join(sections)}"
    summary = summarise(*_read(files.values()), stop_steps, sampling.sigmas, label)
    if jax.process_index() == 0:
        write_offline(folder, summary)
    return summary


def _episode(moment: Moment) -> tuple[str, int]:
    return moment.dataset, moment.episode


def _settings(section: ConfigDict, config: ConfigDict) -> list[dict]:
    """What decides how a dataset's episodes are read."""
    return [part.to_dict() for part in (section, config.clip, config.policy_io)]


def _files(folder: Path, moments: Iterable[Moment], decides: Sequence[Any]) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for moment in moments:
        text = json.dumps([*decides, moment.id, str(moment.at)], sort_keys=True, default=str)
        files[moment] = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    return files


def _share(files: Files) -> list[Moment]:
    """The moments of every n-th episode, n being the number of processes."""
    parts = [list(of_one) for _, of_one in groupby(files, _episode)]
    return [moment for part in parts[jax.process_index() :: jax.process_count()] for moment in part]


def _read(files: Iterable[Path]) -> tuple[list[WindowErrors], list[str]]:
    """The errors on file, and why there are none of the other moments' episodes."""
    errors, unreadable = [], []
    for file in files:
        with np.load(file) as kept:
            if _UNREADABLE in kept:
                unreadable.append(str(kept[_UNREADABLE]))
            else:
                errors.append(WindowErrors(**kept))
    if not errors:
        raise ValueError(
            f"None of the {len(unreadable)} held-out moments could be read: {unreadable[0]}."
        )
    return errors, list(dict.fromkeys(unreadable))
