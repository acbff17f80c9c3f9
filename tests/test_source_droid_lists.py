"""DROID's public lists: which episodes and steps they choose, in RLDS and LeRobot, and damage."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_folders import write_v3

from data_pipelines.sources.droid_lists import recording
from data_pipelines.sources.formats import open_dataset

DROID = Path(__file__).parent / "fixtures/droid/droid/1.0.1"
LISTS = DROID.parent.parent / "lists"
PLACE = "AUTOLab/success/2023-07-07/Fri_Jul__7_09:42:23_2023"


def opened(path=DROID, format="rlds", **droid):
    return list(open_dataset(format, path, "droid", "droid_franka", {"droid": droid}))


def wanted(episodes) -> list[int]:
    """The lengths of the episodes that are wanted."""
    return sorted(len(first_times(e)) for e in episodes if not e.unwanted)


def first_times(episode) -> np.ndarray:
    return next(iter(episode.streams.values())).timestamps


def list_file(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_recording_is_the_same_in_every_list():
    root = "gs://xembodiment_data/r2d2/r2d2-data-full"
    for path in (
        PLACE,
        f"{root}/{PLACE}/trajectory.h5",
        f"{root}/{PLACE}/recordings/MP4--{root}/{PLACE}/trajectory.h5",
    ):
        assert recording(path) == PLACE


def test_wishes_leave_out_whole_episodes():
    assert wanted(opened()) == [20, 24, 24, 30, 40]
    assert wanted(opened(success_only=True)) == [24, 24, 30, 40]
    assert wanted(opened(need_language=True)) == [24, 24, 40]
    (failed,) = (episode for episode in opened(success_only=True) if episode.unwanted)
    assert failed.unwanted in failed.findings and len(first_times(failed)) == 20


def test_ranges_hold_exactly_their_steps(tmp_path):
    file = str(LISTS / "ranges.json")
    for trim, kept in ((0, [*range(3, 20), *range(25, 40)]), (10, [*range(3, 10), *range(25, 30)])):
        episodes = opened(ranges=file, trim_ranges=trim)
        (episode,) = (e for e in episodes if len(first_times(e)) == 40)
        times = first_times(episode)
        for jitter in (-20_000_000, 0, 20_000_000):  # of a camera; a step is 67 ms
            inside = [any(a <= t + jitter < b for a, b in episode.ranges) for t in times]
            assert np.flatnonzero(inside).tolist() == kept
    longer = list_file(tmp_path / "longer.json", {PLACE: [[30, 90]]})
    (episode,) = (e for e in opened(ranges=longer) if not e.unwanted)
    assert "longer.json keeps more steps than the episode has" in episode.findings[0]
    assert episode.ranges[0][1] > first_times(episode)[-1]
    both = {PLACE: [[0, 9]], f"/elsewhere/{PLACE}/trajectory.h5": [[0, 8]]}
    episodes = opened(ranges=list_file(tmp_path / "both.json", both))
    assert any("both.json has several entries for the episode" in e.unwanted for e in episodes)


def test_annotations_take_the_place_of_the_instructions(tmp_path):
    files = {name: str(LISTS / f"{name}.json") for name in ("annotations", "episode_paths")}
    by_length = {len(first_times(e)): e for e in opened(need_language=True, **files)}
    assert by_length[30].instructions == ("close the drawer", "push the drawer")
    assert not by_length[30].unwanted and by_length[30].findings == ()
    assert by_length[40].instructions == ("put it in", "fill the cup")
    assert "annotations.json has no instruction for the episode" in by_length[40].findings[0]
    other = {"x": {"language_instruction1": "something else"}}
    annotations = list_file(tmp_path / "other.json", other)
    paths = list_file(tmp_path / "paths.json", {"x": PLACE})
    episodes = opened(annotations=annotations, episode_paths=paths)
    (episode,) = (e for e in episodes if e.instructions == ("something else",))
    assert "of other.json are not those of the dataset" in episode.findings[0]


def test_lerobot_finds_its_episodes_by_episode_id(tmp_path):
    """As in the LeRobot version of NVIDIA's Cosmos."""
    ids = [PLACE, PLACE.replace("success", "failure"), PLACE.replace("09:42:23", "11:11:11")]
    root = write_v3(tmp_path / "droid", [8, 6, 7], listed={"episode_id": ids})
    ranges = list_file(tmp_path / "ranges.json", {f"gs://a/{PLACE}/trajectory.h5": [[2, 5]]})
    chosen = opened(root, "lerobot", success_only=True, ranges=ranges)
    assert [bool(episode.unwanted) for episode in chosen] == [False, True, True]
    assert "failed" in chosen[1].unwanted and "does not list" in chosen[2].unwanted
    for stream in chosen[0].streams.values():
        inside = [any(a <= t < b for a, b in chosen[0].ranges) for t in stream.timestamps]
        assert np.flatnonzero(inside).tolist() == [2, 3, 4]


def test_lerobot_says_itself_which_episodes_succeeded(tmp_path):
    feature = {"is_episode_successful": {"dtype": "bool", "shape": [1]}}
    root = write_v3(tmp_path / "droid", [8, 6], features=feature, video=False)
    (file,) = root.glob("data/*/*.parquet")
    table = pq.read_table(file)
    success = [number == 0 for number in table["episode_index"].to_pylist()]
    pq.write_table(table.append_column("is_episode_successful", [success]), file)
    assert wanted(opened(root, "lerobot", success_only=True)) == [8]


@pytest.mark.parametrize(
    ("droid", "message"),
    [
        (dict(ranges="nowhere.json"), r"droid.ranges is 'nowhere.json', but there is no such file"),
        (dict(ranges="{"), r"is not JSON: .*; download it again"),
        (dict(ranges="[]"), r"must be a JSON object with an entry for each episode, got list"),
        (dict(ranges="{}"), r"got an empty one"),
        (dict(ranges='{"a": [[5, 2]]}'), r"the ranges of 'a' must be \[\[start, end\], ...\] in"),
        (dict(ranges='{"a": [3, 5]}'), r"got \[3, 5\]"),
        (dict(ranges='{"a": [[0, 5], [4, 9]]}'), r"in order and not overlapping"),
        (
            dict(annotations='{"a": "x"}', episode_paths='{"a": "b"}'),
            r"instructions of 'a' must be",
        ),
        (dict(annotations='{"a": {}}', episode_paths='{"b": "c"}'), r"has no path for any episode"),
        (
            dict(annotations='{"a": {}}', episode_paths='{"b": 1}'),
            r"the path of 'b' must be a text",
        ),
        (dict(annotations='{"a": {}}'), r"annotations and droid.episode_paths belong together"),
        (dict(trim_ranges=3), r"droid.trim_ranges shortens the ranges of a list"),
        (dict(trim_ranges=-1, ranges="{}"), r"the option droid is .*; it takes success_only and"),
        (dict(succes_only=True), r"the option droid is {'succes_only': True}; it takes success_"),
        (dict(success_only="yes"), r"need_language \(True or False\)"),
    ],
)
def test_a_wrong_list_is_explained(droid, message, tmp_path):
    for key, value in droid.items():
        if isinstance(value, str) and value[:1] in "{[":
            droid[key] = list_file(tmp_path / f"{key}.json", value)
    with pytest.raises(ValueError, match=message) as error:
        opened(**droid)
    assert "\n" not in str(error.value)


def test_a_dataset_that_does_not_say_where_it_was_recorded(tmp_path):
    root = write_v3(tmp_path / "other", [6], video=False)
    ranges = str(LISTS / "ranges.json")
    with pytest.raises(ValueError, match=r"no episode_id in meta/episodes, .*droid.success_only, "):
        opened(root, "lerobot", success_only=True, ranges=ranges)
    with pytest.raises(ValueError, match="the option droid is 'all'; give a dict of settings"):
        open_dataset("rlds", DROID, "droid", "droid_franka", {"droid": "all"})
