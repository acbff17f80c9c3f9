"""Records opened for a configuration that says something else by now."""

import json
import shutil

import numpy as np
import pytest
from encode_toys import CLIP, POLICY_IO, ROBOT, Tokenizer, encode, episode
from ml_collections import ConfigDict

from data_pipelines.atomic import write_json
from data_pipelines.normalize import data_fingerprint, make_normalizers
from data_pipelines.provenance import open_records
from data_pipelines.representations import Mode
from data_pipelines.sources.formats import open_config
from data_pipelines.video import write_video

FORMAT = dict(format="lerobot", options=dict(fps=40), anchor_fps=None)


def _config(**more):
    text = dict(length=8, dim=4)
    base = dict(clip=CLIP, policy_io=POLICY_IO, text=text, validation_share=0.3)
    return ConfigDict(base | more)


def _dataset(records, **change):
    return ConfigDict(ROBOT.to_dict() | FORMAT | dict(records=str(records), weight=1.0) | change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    encode([episode(i) for i in range(4)], folder, _dataset(folder))
    return folder


def _part(**more):
    return (dict(stream="action", **more),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(action="state"), "dataset.action is 'action' there, 'state' here"),
        (dict(action=_part(columns=(1, 0, 2, 3))), "dataset.action is"),
        (dict(action=_part(represent="delta", base="state")), "dataset.action is"),
        (dict(action=_part(shift=-0.1)), "dataset.action is"),
        (dict(proprio="action"), "dataset.proprio is 'state' there, 'action' here"),
        (dict(video="side"), "dataset.video is"),
        (dict(video=("front", "side")), "dataset.video is"),
        (dict(embodiment="giant"), "dataset.embodiment is 'arm' there, 'giant' here"),
        (dict(name="other"), "dataset.name is 'robot' there, 'other' here"),
        (dict(anchor_fps=10.0), "anchor_fps is None there, 10.0 here"),
        (dict(format="rlds"), "dataset.format is 'lerobot' there, 'rlds' here"),
        (dict(options=dict(fps=10)), "dataset.options.fps is 40 there, 10 here"),
        (dict(options={}), "dataset.options.fps is 40 there, None here"),
        (dict(crop=3), "dataset.crop is None there, 3 here"),  # whatever settings there will be
    ],
)
def test_a_dataset_that_means_something_else_by_now_is_refused(folder, change, words):
    with pytest.raises(ValueError, match="encoded with other settings") as error:
        open_records(_config(), _dataset(folder, **change), acting=True)
    assert words in str(error.value) and "encode them again into another folder" in str(error.value)
    with pytest.raises(ValueError, match="was begun with other settings"):  # so does the job
        new = _dataset(folder, **change)
        encode([episode(i) for i in range(4)], folder, new, anchor_fps=new.anchor_fps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(validation_share=0.1), "validation_share is 0.3 there, 0.1 here"),
        (dict(text=dict(length=4, dim=4)), "text.length is 8 there, 4 here"),
        (dict(clip=dict(CLIP, fps=10)), "clip.fps is 20 there, 10 here"),
        (
            dict(policy_io=dict(POLICY_IO, proprio=dict(horizon=2, fps=80, dim=4))),
            "policy_io.proprio.horizon is 1 there, 2 here",
        ),
    ],
)
def test_a_configuration_that_means_something_else_by_now_is_refused(folder, change, words):
    with pytest.raises(ValueError, match="encoded with other settings") as error:
        open_records(_config(**change), _dataset(folder), acting=True)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(weight=7.0),
        dict(action=[dict(stream="action", represent="values")]),
        dict(video=("front",)),
        dict(video=[["front"]]),
        dict(options=dict(fps=40.0)),
        dict(options=dict(fps=40, texts=())),  # a default
        dict(note=""),
    ],
)
def test_the_same_in_other_words_is_the_same(folder, change):
    records = open_records(_config(), _dataset(folder, **change), acting=True)
    assert records.normalization == ""
    tokenizer = Tokenizer()
    encode([episode(i) for i in range(4)], folder, _dataset(folder, **change), tokenizer)
    assert tokenizer.calls == 0


def test_a_video_stage_does_not_read_actions(folder):
    dataset = _dataset(folder, action="state", proprio="")
    wide = dict(POLICY_IO, action=dict(horizon=9, fps=80, dim=4))
    open_records(_config(policy_io=wide), dataset, acting=False)


def test_normalize_is_that_of_the_configuration(folder):
    """It takes effect after encoding, so the records stay, and a normalizer is made again."""
    before = open_records(_config(), _dataset(folder), acting=True)
    squashed = _dataset(folder, action=_part(normalize="SQUASH"))
    after = open_records(_config(), squashed, acting=True)
    assert after.fingerprint == before.fingerprint
    assert data_fingerprint([after]) != data_fingerprint([before])
    normalizer = make_normalizers([after]).of("arm")
    assert normalizer.modes == {"actions": Mode.SQUASH, "proprio": Mode.VARIANCE}


def test_records_of_earlier_versions_are_read_and_it_is_said_once(folder, tmp_path, caplog):
    old = shutil.copytree(folder, tmp_path / "old")
    for name in ("plan.json", "manifest.json"):
        content = json.loads((old / name).read_text())
        del content.get("settings", content)["source"]
        write_json(old / name, content)
    now = open_records(_config(), _dataset(folder), acting=True)
    caplog.clear()
    then = open_records(_config(), _dataset(old, format="rlds"), acting=True)
    assert then.fingerprint == now.fingerprint  # which does not depend on where data are from
    assert caplog.text.count("do not store their format, options, path") == 1
    with pytest.raises(ValueError, match=r"dataset\.action"):
        open_records(_config(), _dataset(old, action="state"), acting=True)
    assert "several instructions" not in caplog.text
    # The job goes on with what was begun, and the finished records are those of then.
    (old / "shard_00001.npz").unlink()
    again = encode([episode(i) for i in range(4)], old, _dataset(old))
    assert again.fingerprint == then.fingerprint and "source" not in again.settings


def test_several_texts_of_an_episode_in_old_records_are_mentioned(tmp_path, caplog):
    encode([episode(0, instructions=("reach", "lift"))], tmp_path, _dataset(tmp_path))
    open_records(_config(), _dataset(tmp_path), acting=True)
    assert not caplog.text
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["source"]
    write_json(tmp_path / "manifest.json", manifest)
    open_records(_config(), _dataset(tmp_path), acting=True)
    assert "'robot' have episodes with several instructions (1)" in caplog.text


def _videos(path, seeds):
    for part in ("video", "metas"):
        (path / part).mkdir(parents=True)
    for name, seed in zip("abc", seeds):
        frames = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), np.uint8)
        write_video(path / f"video/{name}.mp4", list(frames), 20)
        (path / f"metas/{name}.txt").write_text("go")
    return str(path)


def test_a_moved_dataset_is_the_same_and_another_is_not(tmp_path, caplog):
    def section(path, **change):
        nothing = dict(action="", proprio="", options={}, format="video_folder", video="video")
        return _dataset(tmp_path / "records", path=path, **(nothing | change))

    first = section(_videos(tmp_path / "first", (0, 1, 2)))
    encode(open_config(first), tmp_path / "records", first)
    moved = section(str(shutil.copytree(tmp_path / "first", tmp_path / "moved")))
    for dataset in (first, moved):
        open_records(_config(), dataset, acting=False)
        encode(open_config(dataset), tmp_path / "records", dataset)
    assert not caplog.text
    other = section(_videos(tmp_path / "other", (3, 4, 5)))
    more = section(_videos(tmp_path / "more", (0, 1)))
    named = section(str(shutil.copytree(tmp_path / "first", tmp_path / "named")))
    (tmp_path / "named/video/a.mp4").rename(tmp_path / "named/video/0.mp4")
    (tmp_path / "named/metas/a.txt").rename(tmp_path / "named/metas/0.txt")
    for dataset, words in (
        (other, "'a' is no longer what it was"),
        (more, "it has 2 episodes instead of 3"),
        (named, "number 0 is '0' instead of 'a'"),
    ):
        with pytest.raises(ValueError, match="holds other data") as error:
            open_records(_config(), dataset, acting=False)
        assert words in str(error.value) and dataset.path in str(error.value)
        with pytest.raises(ValueError, match=r"was (made from other data|begun with other)"):
            encode(open_config(dataset), tmp_path / "records", dataset)
    assert not caplog.text
    open_records(_config(), section(str(tmp_path / "away")), acting=False)
    assert caplog.text.count("not on this machine") == 1
    # Training needs the records alone: placeholders and an empty folder are no reason to stop.
    (tmp_path / "empty").mkdir()
    open_records(_config(), section(str(tmp_path / "empty")), acting=False)
    (tmp_path / "moved/video/a.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    open_records(_config(), moved, acting=False)
    assert caplog.text.count("cannot be checked: ") == 3 and "git lfs pull" in caplog.text
