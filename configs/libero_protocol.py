"""How mimic-video's release evaluates on LIBERO: the `evaluation` section of a configuration.

A suite's ten tasks, initial states 0, 1, ... of LIBERO's fifty, 220, 280 or 300 control steps of
which five are executed per query. The release's default is 5 episodes per task; the paper's tables
are of 50: `--config.evaluation.episodes_per_task=50`.
"""

from ml_collections import config_dict

from mvjax.evaluation.suites.libero_scene import suite_tasks


def libero_protocol(suite: str, workers: int = 8) -> dict:
    """The section for a suite: spatial, object, goal, 10 or 90.

    Args:
        suite: its name.
        workers: simulator processes, which is also how many queries are answered at once.
    """
    return dict(
        suite="libero",
        tasks=suite_tasks(suite),
        episodes_per_task=5,
        first_seed=0,
        execute=5,
        max_steps=config_dict.placeholder(int),  # the suite's own
        workers=workers,
        videos_per_task=1,
    )
