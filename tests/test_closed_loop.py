"""Success rates with their intervals, and the suites that a policy is evaluated in."""

import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from mvjax.evaluation import closed_loop
from mvjax.evaluation.closed_loop import mean_success, success_table, wilson_interval
from mvjax.evaluation.suites.suite import SUITES, Simulator


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


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_follows_the_protocol_and_knows_its_tasks(name):
    suite = SUITES[name]
    for member in (*vars(Simulator), *Simulator.__annotations__):
        if not member.startswith("_") and member not in ("instruction", "max_steps"):
            assert hasattr(suite.make_simulator, member), member
    assert suite.control_hz == suite.make_simulator.control_hz
    with pytest.raises(ValueError, match=r"unknown .* task 'fly'"):
        suite.check_task("fly")
