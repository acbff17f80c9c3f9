"""Two robots and videos without actions, encoded, trained in both stages, and each one's policy."""

from dataclasses import replace

import numpy as np
import pytest
from encode_toys import SIZE, episode, random_tokenizer
from tiny_stages import quick_compiles, tiny_config

from data_pipelines.records import RecordDataset
from data_pipelines.statistics import compute_statistics
from mvjax.encode import encode_dataset
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.stand_ins import save_linear_tokenizer
from mvjax.policy.load import load_policy, load_text_encoder, load_video_tokenizer
from mvjax.policy.observation import Observation
from mvjax.training.run import run

# What their actions and states are in: metres here, millimetres around another origin there.
UNITS = {"arm": dict(scale=1.0), "giant": dict(scale=1000.0, offset=500.0)}


def config_of(stage, folder):
    """A stage on the records of both robots, and of people."""
    config = tiny_config(stage, steps=2, sample_every=0, ema_decay=0.0)
    robot = dict(config.datasets.robot, video="front", anchor_fps=20.0, weight=1.0)
    robot |= dict(action="action", proprio="state")
    config.datasets = {
        name: dict(robot, name=name, embodiment=name, records=str(folder / name)) for name in UNITS
    }
    nothing = dict(action="", proprio="")
    config.datasets.human = dict(
        robot, name="human", embodiment="human", records=str(folder / "human"), **nothing
    )
    config.tokenizer, config.validation_share = str(folder / "tokenizer.npz"), 0.0
    if stage == "action":
        config.backbone.checkpoint = str(folder / "video")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the records of the three, and a directory of either stage."""
    folder = tmp_path_factory.mktemp("embodiments")
    encode(config_of("video", folder), folder)
    with quick_compiles():
        for stage in ("video", "action"):
            run(Experiment.from_config(config_of(stage, folder)), folder / stage)
    return folder


def encode(config, folder):
    """Writes the records of the datasets of a configuration, and the tokenizer."""
    save_linear_tokenizer(folder / "tokenizer.npz", random_tokenizer())
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    for number, (name, dataset) in enumerate(config.datasets.items()):
        encode_dataset(
            [episode(10 * number + i, **UNITS.get(name, {"acting": False})) for i in range(2)],
            dataset,
            config.clip,
            config.policy_io,
            tokenizer,
            text_encoder,
            dataset.records,
            identity={"tokenizer": tokenizer_identity, "text_encoder": text_identity},
            batch_size=16,
            anchor_fps=dataset.anchor_fps,
            validation_share=config.validation_share,
        )


def test_a_run_that_says_otherwise_than_its_records_is_refused(folder, tmp_path):
    """Before anything is trained, although all widths are the same."""
    save_linear_tokenizer(tmp_path / "other.npz", random_tokenizer(1))
    for stage, change, words in (
        ("action", {"datasets.arm.action": "state"}, r"datasets?\.action is 'action' there"),
        ("action", {"datasets.giant.embodiment": "arm"}, "embodiment is 'giant' there, 'arm' here"),
        ("video", {"datasets.human.anchor_fps": 10.0}, r"anchor_fps is 20\.0 there, 10\.0 here"),
        ("video", {"validation_share": 0.1}, "validation_share is 0.0 there"),
        ("video", {"tokenizer": str(tmp_path / "other.npz")}, r"identity\.tokenizer is"),
    ):
        config = config_of(stage, folder)
        config.update_from_flattened_dict(change)
        with pytest.raises(ValueError, match=words):
            run(Experiment.from_config(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _policy(folder, embodiment):
    config = config_of("action", folder)
    config.embodiment = embodiment
    return load_policy(
        Experiment.from_config(config),
        folder / "action",
        Sampling(video_steps=2, action_steps=2),
        1,
    )


def test_each_policy_reads_and_answers_in_its_own_units(folder, quickly):
    """In the same situation, told in either's units, both decide the same and say it in theirs."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    situation, decided = rng.uniform(-1, 1, (1, 4)), {}
    policies = {name: _policy(folder, name) for name in UNITS}
    for name, policy in policies.items():
        policy = replace(policy, model=policies["arm"].model)  # equal, and compiled once
        statistics, records = policy.normalizer.statistics, RecordDataset(folder / name)
        for key in ("actions", "proprio"):
            theirs = compute_statistics(records.columns(key)[key])
            for which, values in statistics[key].items():
                np.testing.assert_allclose(values, theirs[which], rtol=1e-6)
        proprio = policy.normalizer.unnormalize("proprio", situation)
        query = Observation(frames, proprio, "open the drawer", noise_key=("drawer", 0))
        (chunk,) = policy.act([query])
        mean, spread = (statistics["actions"][which] for which in ("mean_clamped", "std_clamped"))
        decided[name] = (chunk - mean) / spread
    assert np.abs(decided["arm"]).max() > 0.1
    np.testing.assert_allclose(decided["giant"], decided["arm"], atol=1e-4)


@pytest.mark.parametrize(
    ("embodiment", "said"),
    [
        ("", r"several robots, 'arm', 'giant': choose .* --config\.embodiment=NAME"),
        ("human", r"is 'human', but .* of 'arm', 'giant': --config\.embodiment=NAME"),
    ],
)
def test_a_policy_of_several_embodiments_needs_one_named(folder, embodiment, said):
    with pytest.raises(ValueError, match=said) as error:
        _policy(folder, embodiment)
    assert "\n" not in str(error.value)
