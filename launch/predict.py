r"""Writes predicted and true future video of held-out episodes, as pairs of mp4 files.

    python -m launch.predict --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/predictions
"""

from pathlib import Path

from absl import flags

from data_pipelines.sources.formats import open_config
from launch.entry import config_flag, path_flag, run
from mvjax.evaluation.offline import write_predictions
from mvjax.experiment import Experiment
from mvjax.policy.load import load_policy

CONFIG = config_flag()
CHECKPOINT = path_flag("checkpoint", "Training directory of the stage-2 run.")
OUT = path_flag("out", "Folder of the videos.")
COUNT = flags.DEFINE_integer("count", 4, "Pairs per dataset.", lower_bound=1)


def main() -> None:
    """Predicts `--count` clips of every dataset."""
    config = CONFIG.value
    experiment = Experiment.from_config(config)
    policy = load_policy(experiment, Path(CHECKPOINT.value), experiment.sampling(), batch_size=1)
    for dataset in config.datasets.values():
        write_predictions(
            policy, open_config(dataset), dataset, config, Path(OUT.value), COUNT.value
        )


if __name__ == "__main__":
    run(main)
