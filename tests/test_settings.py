"""What two sets of settings disagree in."""

import json

from ml_collections import ConfigDict

from data_pipelines.settings import differences, other_networks, plain

SETTINGS = {"clip": {"height": 64, "fps": 20.0}, "name": "robot", "columns": (0, 1), "none": None}


def test_a_configuration_equals_what_json_makes_of_it():
    config = ConfigDict(SETTINGS | {"rows": (("front", "side"), ("wrist",))})
    stored = json.loads(config.to_json())
    assert differences(stored, config) == differences(config, stored) == []
    assert plain(config) == stored == json.loads(json.dumps(plain(config)))


def test_each_difference_is_a_sentence_with_its_dotted_name():
    here = {"clip": {"height": 32, "fps": 20.0}, "name": "arm", "columns": [1], "more": {"a": 1}}
    assert differences(SETTINGS, here) == [
        "clip.height is 64 there, 32 here",
        "columns is [0, 1] there, [1] here",
        "more is None there, {'a': 1} here",
        "name is 'robot' there, 'arm' here",
    ]
    assert differences(SETTINGS["clip"], here["clip"], "clip") == [
        "clip.height is 64 there, 32 here"
    ]
    assert differences(1, 2, "context_layer") == ["context_layer is 1 there, 2 here"]
    assert differences("a", {"b": 1}, "text") == ["text is 'a' there, {'b': 1} here"]


def test_a_missing_setting_is_none():
    assert differences({}, {"none": None}) == []
    assert differences({"a": 0}, {}) == ["a is 0 there, None here"]


def test_a_reference_in_a_configuration_is_its_value():
    config = ConfigDict({"width": 8})
    config.height = config.get_ref("width")
    assert differences({"width": 8, "height": 8}, config) == []


def test_networks_of_earlier_versions_compare_by_what_is_said_of_them():
    before, now, other = "wan vae 0a1b", "wan vae 0a1b ffff", "wan vae 0a1b eeee"

    def unlike(a, b):
        return other_networks({"tokenizer": a}, {"tokenizer": b})

    assert unlike(before, now) == unlike(now, before) == unlike(now, now) == []
    assert unlike(now, other) == [f"identity.tokenizer is {now!r} there, {other!r} here"]
    assert unlike("wan vae 0a1c", now) and unlike("stored 8x64", "ngram 8x64")
    assert other_networks({"tokenizer": now}, {})
