"""Episodes that were skipped and have been repaired since: their shards are made again."""

from collections.abc import Mapping
from pathlib import Path

from data_pipelines.encoding.shard import Cut, finished_rows, forget, is_finished


def forget_repaired(shards: Mapping[Path, range], cut: Cut) -> None:
    """Makes shards unfinished that have a skipped episode which can be read now.

    Killed on the way, the encoding job goes on with what is unfinished.

    Args:
        shards: the files, and the numbers of the episodes in each.
        cut: gives the windows of an episode.
    """
    for shard, span in shards.items():
        if is_finished(shard):
            skipped = (i for i, row in zip(span, finished_rows(shard)) if "reason" in row)
            if any("reason" not in cut(index)[0] for index in skipped):
                forget(shard)
