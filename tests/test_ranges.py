"""Every number of every configuration has a range, and what is outside is refused by name."""

import importlib
import math

import pytest
from ml_collections import ConfigDict
from test_configs import NAMES, SIZES
from test_published_configs import ALL
from tiny_stages import tiny_config

from mvjax.experiment import Experiment
from mvjax.ranges import RULES, Choice, Number, Numbers, check_ranges, rule_of, settings

CONFIGS = [*ALL, *((name, size) for name in NAMES for size in SIZES)]
CONFIGS += [(f"libero_small{stage}", "smoke") for stage in ("", "_video", "_action")]
CONFIGS += [("quickstart", "smoke,augmented")]


def config_with(name: str, value: object) -> dict:
    """A configuration of one setting; * is some dataset or stream."""
    config = value
    for part in reversed(name.replace("*", "some").split(".")):
        config = {part: config}
    return config


def around(rule: Number) -> tuple[list, list]:
    """Values at the bounds of a range, and just outside of it."""
    step = 1 if rule.whole else 1e-9
    inside, outside = list(rule.also), [math.nan, math.inf, -math.inf, True, "", [1], "two"]
    for bound, excluded, out in ((rule.low, rule.above, -step), (rule.high, rule.below, step)):
        if math.isfinite(bound):
            bound = int(bound) if rule.whole else bound
            inside.append(bound - out if excluded else bound)
            outside += [bound + out, bound] if excluded else [bound + out]
    if rule.whole:
        outside += [float(inside[-1]), 1.5]
    if None not in rule.also:
        outside.append(None)
    return inside or [-0.5, 3], [value for value in outside if value not in rule.also]


@pytest.mark.parametrize("name", RULES)
def test_below_at_and_above_the_range_of_each_setting(name):
    rule = RULES[name]
    if isinstance(rule, Number):
        inside, outside = around(rule)
    elif isinstance(rule, Numbers):
        good, bad = around(rule.each)
        count = rule.count or 2
        inside = [(good[0],) * count, [good[0]] * count]
        outside = [(value, *[good[0]] * (count - 1)) for value in bad] + [(), good[0], None]
        outside += [(good[0],) * (count + 1)] if rule.count else []
    else:
        inside, outside = rule.values, [None, "other", 2, *([0, 1] if True in rule.values else [])]
    for value in inside:
        check_ranges(config_with(name, value))
    shown = name.replace("*", "some").replace(".", r"\.")
    for value in outside:
        with pytest.raises(ValueError, match=f"^{shown} must be .*, got ") as error:
            check_ranges(config_with(name, value))
        assert repr(value) in str(error.value), value


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("optimizer.clip_norm", -1.0, "a number of at least 0, got -1.0"),  # the loss would climb
        ("optimizer.learning_rate", -1e-4, "between 0 and 1, got -0.0001"),
        ("optimizer.learning_rate", 1e4, "between 0 and 1, got 10000.0"),  # 1e-4 was meant
        ("optimizer.learning_rate", math.nan, "got nan"),
        ("optimizer.weight_decay", -0.1, "got -0.1"),
        ("optimizer.b2", 1.0, "at least 0 and below 1, got 1.0"),
        ("optimizer.eps", 0.0, "a number above 0, got 0.0"),
        ("optimizer.schedule", "cosin", "one of 'constant', 'linear', 'cosine', got 'cosin'"),
        ("optimizer.mu_dtype", "float16", "one of '', 'float32', 'bfloat16', got 'float16'"),
        ("training.ema_decay", 1.0, "below 1"),  # the average would never move
        ("training.ema_decay", -0.5, "at least 0"),
        ("training.seed", 2**32, "between 0 and 4294967295"),  # the same random numbers as 0
        ("training.sample_count", -1, "a whole number of at least 0"),
        ("flow.loss_scale", -1.0, "a number above 0"),
        ("flow.sigma_tail", 1.5, "between 0 and 1"),
        ("lora.alpha", -32.0, "at least 0"),
        ("policy_io.action.fps", 0.0, "above 0"),
        ("policy_io.action.shift", math.inf, "a number, got inf"),
        ("datasets.robot.anchor_fps", 0.0, "above 0"),
        ("mesh.fsdp", 0, "a whole number of at least 1 or -1, got 0"),
        ("evaluation.workers", 0, "at least 1"),
        ("max_bad_share", 5.0, "between 0 and 1"),  # per cent
        ("video_model.rope_ratio_thw", (1.0, 3.0), "3 values, each a number above 0"),
    ],
)
def test_what_no_run_can_want_is_refused_before_anything_runs(setting, value, words):
    config = tiny_config("video")
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ValueError, match=words) as error:
        Experiment.from_config(config)
    assert str(error.value).startswith(f"{setting} must be ")


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("optimizer.lerning_rate", "learning_rate"),
        ("training.bacth_size", "batch_size"),
        ("policy_io.action.horizn", "horizon"),
        ("datasets.robot.wieght", "weight"),
        ("lora.target", "targets"),
        ("clip.hight", "height"),
    ],
)
def test_a_misspelt_setting_of_a_file_is_not_ignored(setting, meant):
    """A configuration in Python takes any name; the run would have had the default."""
    for stage in ("video", "action"):
        config = tiny_config(stage)
        *sections, name = setting.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = 3
        with pytest.raises(ValueError, match=f"no setting '{setting}'; did you mean '{meant}'"):
            Experiment.from_config(config)
    config = tiny_config("video")
    config.notes = dict(author="me", number=3)  # a section of one's own
    config.datasets.robot.options = dict(flip="rotate", more=dict(fps=3))
    Experiment.from_config(config)


@pytest.mark.parametrize(("name", "argument"), CONFIGS)
def test_configurations_are_in_range_and_none_of_their_numbers_was_forgotten(name, argument):
    config = importlib.import_module(f"configs.{name}").get_config(*[argument] if argument else [])
    config = ConfigDict(config).copy_and_resolve_references()
    check_ranges(config)

    def is_number(value: object) -> bool:
        values = value if isinstance(value, tuple | list) else [value]
        return bool(values) and all(isinstance(v, int | float) for v in values)

    forgotten = [
        name
        for name, value in settings(config)
        if is_number(value) and rule_of(name) is None and ".options." not in name  # the format's
    ]
    assert not forgotten, f"give these a rule in mvjax/ranges.py: {forgotten}"


def test_rules_are_in_use():
    """A misspelt name in the table would check nothing."""
    known = set()
    for name, argument in CONFIGS:
        module = importlib.import_module(f"configs.{name}")
        config = module.get_config(*[argument] if argument else [])
        known |= {n for n, _ in settings(ConfigDict(config).copy_and_resolve_references())}
    patterns = {n for n in known if n in RULES} | {
        ".".join([n.split(".")[0], "*", *n.split(".")[2:]]) for n in known
    }
    optional = {"policy_io.*.mask_padding", "video_model.text_dim"}
    optional |= {"clip.views.*.height", "clip.views.*.width"}
    assert set(RULES) - patterns == optional
    assert isinstance(RULES["sampler.fresh_noise"], Choice)
