"""Success rates with their intervals, the suites that a policy is evaluated in, and the folders of
their results."""

import dataclasses
import json
import math
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_policy import run_config, save_run
from tiny_stages import quick_compiles, save_untrained
from toy_simulator import Rail

from data_pipelines.lock import run_lock
from data_pipelines.video import VideoFile
from mvjax.evaluation import closed_loop
from mvjax.evaluation.closed_loop import mean_success, success_table, wilson_interval
from mvjax.evaluation.report import build_evaluation_report
from mvjax.evaluation.rollout import read_results
from mvjax.evaluation.suites.suite import SUITES, Simulator, Suite
from mvjax.experiment import Experiment
from mvjax.identity import digest_of, read_identity


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # Computed from the formula of Wilson 1927.
        (111, 120, 0.863591, 0.960043),
        (20, 20, 0.838875, 1.0),
    ],
)
def test_known_intervals(successes, trials, low, high):
    got = wilson_interval(successes, trials)
    assert got == pytest.approx((low, high), abs=6e-5)


def test_ends_solve_the_score_equation():
    """Each end p is z standard errors of p itself away from the observed rate."""
    z = 2.5758293035489  # 99 %
    for end in wilson_interval(7, 23, confidence=0.99):
        assert abs(7 / 23 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 23))


def test_no_trials_and_impossible_counts():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 3 trials"):
        wilson_interval(5, 3)
    with pytest.raises(ValueError, match=r"confidence_level \(95\)"):
        wilson_interval(1, 3, confidence=95)


def test_table_and_mean_over_tasks():
    outcomes = [("push", True), ("pull", False), ("push", False), ("pull", False)]
    outcomes += [("push", True)] * 2
    table = success_table(outcomes)
    assert [(row.name, row.successes, row.trials) for row in table] == [
        ("push", 3, 4),
        ("pull", 0, 2),
    ]
    mean = mean_success(table)
    assert mean.rate == pytest.approx((3 / 4 + 0) / 2)  # tasks weigh the same
    assert (mean.low, mean.high) == wilson_interval(3, 6)  # episodes pooled
    assert mean_success([]).trials == 0


def test_a_misspelt_task_is_named_before_the_policy_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(closed_loop, "load_policy", lambda *_: pytest.fail("it was loaded"))
    protocol = {"suite": "metaworld", "tasks": ("door-open-v3, fly",)}
    config = ConfigDict({"evaluation": protocol, "policy_io": {"action": {"fps": 80.0}}})
    evaluated = closed_loop.evaluate(
        SimpleNamespace(config=config),
        tmp_path / "action",
        tmp_path,
        closed_loop.settings_for("policy", [0], 10),
    )
    with pytest.raises(ValueError, match=r"unknown .* task 'fly'"):
        next(evaluated)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tasks", [(), "", ("push-v3", "push-v3"), ("push-v3,push-v3",)])
def test_a_task_counts_once_and_there_is_one(tasks, tmp_path):
    """A task named twice would be played once and counted twice, in a narrower interval."""
    protocol = {"suite": "metaworld", "tasks": tasks}
    config = ConfigDict({"evaluation": protocol, "policy_io": {"action": {"fps": 80.0}}})
    run = SimpleNamespace(config=config), tmp_path / "action", tmp_path
    with pytest.raises(ValueError, match=r"evaluation\.tasks must be one or more"):
        next(closed_loop.evaluate(*run, closed_loop.settings_for("expert", [0], 10)))
    config.evaluation = {"suite": "metaworld", "tasks": "fly"}  # and no tuple of letters
    with pytest.raises(ValueError, match="task 'fly'"):
        next(closed_loop.evaluate(*run, closed_loop.settings_for("expert", [0], 10)))


def test_a_gripper_that_would_always_be_closed_is_not_played():
    for name, least, refused in (
        ("libero", -1, False),
        ("libero", 1, False),  # demonstrations of one grasp
        ("libero", 0, True),
        ("metaworld", 0, False),  # its gripper is a force
    ):
        low = np.array([[-1] * 9 + [least]] * 2, float)
        policy = SimpleNamespace(normalizer=SimpleNamespace(statistics={"actions": {"min": low}}))
        check = pytest.raises(ValueError, match="never below 0: train on -1 to 1")
        with check if refused else nullcontext():
            closed_loop._check_gripper(policy, SUITES[name], name)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_follows_the_protocol_and_knows_its_tasks(name):
    suite = SUITES[name]
    for member in (*vars(Simulator), *Simulator.__annotations__):
        if not member.startswith("_") and member not in ("instruction", "max_steps"):
            assert hasattr(suite.make_simulator, member), member
    assert suite.control_hz == suite.make_simulator.control_hz
    assert suite.cameras == tuple(vars(sys.modules[suite.make_simulator.__module__])["CAMERAS"])
    with pytest.raises(ValueError, match=r"unknown .* task 'fly'"):
        suite.check_task("fly")


# Folders of results, with a toy simulator and a real checkpoint.

VERSIONS = {"python": "3.11.2", "toy": "1.0", "gl_backend": "egl", "gl_renderer": "llvmpipe"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_run(folder)
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    """A run folder of its own, whose policy is evaluated in the toy simulator."""
    shutil.copytree(saved, tmp_path / "run")
    suite = Suite(Rail, lambda task: None, 80, (), (32, 32), "metaworld_sawyer")
    monkeypatch.setitem(closed_loop.SUITES, "metaworld", suite)
    monkeypatch.setattr(closed_loop, "worker_versions", lambda name: VERSIONS)
    return tmp_path / "run"


def play(run, checkpoint="action", mode="policy", video=None, **settings):
    """Evaluates into `run / "out"`; the results by setting's label."""
    config = config_of(run, video)
    config.evaluation.update(suite="metaworld", tasks=("push",), episodes_per_task=2, first_seed=1)
    config.evaluation.update(execute=4, max_steps=8, workers=1, videos_per_task=0)
    config.update_from_flattened_dict(settings)
    with quick_compiles():
        return dict(
            (setting.label, results)
            for setting, results in closed_loop.evaluate(
                Experiment.from_config(config),
                run / checkpoint,
                run / "out",
                closed_loop.settings_for(mode, [0], config.sampler.video_steps),
            )
        )


def config_of(run, video=None):
    """The run's configuration; of the cameras `video`, where they are not its own."""
    config = run_config(run)
    if video:
        with config.ignore_type():
            config.datasets.robot.video = video
    return config


def test_seeds_beyond_the_states_of_a_suite_are_said(run, monkeypatch, caplog):
    """LIBERO has 50: more episodes per task are played from placements of their own."""
    suite = closed_loop.SUITES["metaworld"]
    for states, said in ((3, False), (2, True)):
        suite = dataclasses.replace(suite, states=states)
        monkeypatch.setitem(closed_loop.SUITES, "metaworld", suite)
        play(run, mode="none")
        assert ("1 of the 2 seeds draw new ones" in caplog.text) == said


def test_a_folder_holds_the_results_of_one_policy_in_one_simulator(run, monkeypatch, caplog):
    (first,) = play(run).values()
    folder = run / "out" / "policy_k0"
    identity, lines = read_identity(folder), (folder / "results.jsonl").read_bytes()
    assert {result.config_hash for result in first} == {digest_of(identity["what"])}
    assert identity["what"]["simulator"] == {"toy": "1.0"}
    assert identity["where"][0]["simulator"]["gl_renderer"] == "llvmpipe"
    assert identity["where"][0]["packages"]["jax"] and identity["where"][0]["devices"] == "1 x cpu"

    (run / "moved").symlink_to(run / "action")
    assert play(run, "moved") == {"stop after 0 of 10": first}  # the same weights: nothing to play
    assert (folder / "results.jsonl").read_bytes() == lines

    caplog.clear()
    elsewhere = VERSIONS | {"gl_renderer": "GPU"}
    monkeypatch.setattr(closed_loop, "worker_versions", lambda name: elsewhere)
    play(run)
    assert "simulator.gl_renderer is 'llvmpipe' there, 'GPU' here" in caplog.text

    shutil.rmtree(run / "action" / "checkpoints")
    config = run_config(run)
    config.training.seed = 7
    with quick_compiles():
        save_untrained(config, run / "action")
    monkeypatch.setattr(closed_loop, "worker_versions", lambda name: VERSIONS | {"toy": "1.1"})
    with pytest.raises(ValueError, match=r"the results of another evaluation: .*--out") as refused:
        play(run, **{"sampler.seed": 3, "evaluation.execute": 2})
    for words in (
        "policy.decoder.digest is '",
        "policy.sampling.seed is 0 there, 3 here",
        "protocol.execute is 4 there, 2 here",
        "simulator.toy is '1.0' there, '1.1' here",
    ):
        assert words in str(refused.value), words
    assert (folder / "results.jsonl").read_bytes() == lines
    assert read_identity(folder)["what"] == identity["what"]


TWO = ("observation.images.gripper", "observation.images.corner")


def test_a_policy_of_two_cameras_is_shown_both(run, monkeypatch):
    shutil.rmtree(run / "action" / "checkpoints")
    with quick_compiles():
        save_untrained(config_of(run, TWO), run / "action")
    for mode in ("policy", "oracle"):  # `Policy` refuses frames and futures of other cameras
        (results,) = play(run, mode=mode, video=TWO, **{"evaluation.videos_per_task": 1}).values()
        identity = read_identity(run / "out" / f"{mode}_k0")["what"]
        shown = dict(zip(TWO, ("gripper", "corner")))
        assert identity["cameras"] == {"shown": shown, "tiled": {"video": [[*TWO]]}}
        film = VideoFile(run / "out" / f"{mode}_k0" / results[0].video)
        assert film.size == (32, 96)
    with pytest.raises(ValueError, match=r"trained with other settings .*datasets.robot.video"):
        play(run)
    for cameras, refused in (
        ((TWO[1], "observation.images.wrist"), "'observation.images.wrist', which the suite"),
        ((TWO[1], "corner"), "and 'corner', which are both 'corner' of the suite"),
    ):
        monkeypatch.setattr(closed_loop, "load_policy", lambda *_: pytest.fail("it was loaded"))
        with pytest.raises(ValueError, match=refused):
            play(run, video=cameras)


def test_more_episodes_are_added_and_the_report_says_what_was_evaluated(run, caplog):
    play(run)
    play(run, mode="none", **{"evaluation.first_seed": 9})
    (more,) = play(run, **{"evaluation.episodes_per_task": 3}).values()
    assert [result.seed for result in more] == [1, 2, 3] and "also holds" not in caplog.text
    (fewer,) = play(run).values()
    assert fewer == more[:2] and "also holds 1 episodes" in caplog.text
    text = build_evaluation_report(run / "out").read_text()
    what = read_identity(run / "out" / "policy_k0")["what"]
    for words in (
        f"step 0, {what['policy']['decoder']['digest']}",
        f"step 0, {what['policy']['backbone']['digest']}",
        "metaworld, toy 1.0",
        "llvmpipe",
        "(here) differ in the protocol: first_seed is 1 there, 9 here.",
    ):
        assert words in text, words
    (run / "out" / "policy_k0" / "identity.json").unlink()
    assert "not recorded" in build_evaluation_report(run / "out").read_text()


def test_results_of_earlier_versions_are_read_but_not_continued(run):
    play(run, mode="none")
    (run / "out" / "none" / "identity.json").unlink()
    with pytest.raises(ValueError, match="can be read, but not continued"):
        play(run, mode="none")
    assert len(read_results(run / "out" / "none" / "results.jsonl")) == 2


def test_a_folder_belongs_to_one_evaluation_at_a_time(run, monkeypatch):
    monkeypatch.setattr(closed_loop, "load_policy", lambda *_: pytest.fail("it was loaded"))
    with run_lock(run / "out" / "policy_k0"):
        with pytest.raises(OSError, match=r"is writing to .*policy_k0"):
            play(run)
        play(run, mode="none")  # another setting has a folder of its own


def test_an_episode_counts_once(run, caplog):
    """As two evaluations into one folder left them in earlier versions."""
    (first,) = play(run, mode="none").values()
    path = run / "out" / "none" / "results.jsonl"
    other = dataclasses.replace(first[0], success=True, steps=3)
    with path.open("a") as file:
        file.write("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in (other, first[1])))
    caplog.clear()
    (again,) = play(run, mode="none").values()
    assert again == first == read_results(path)
    (warned,) = caplog.messages
    assert "2 episodes twice (1 of them with different outcomes)" in warned
