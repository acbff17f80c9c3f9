import pickle

import h5py
import numpy as np
import pytest

from data_pipelines.sources.egodex import open_egodex
from data_pipelines.sources.formats import detect
from data_pipelines.video import write_video

JOINTS = ("leftHand", "rightHand", "leftIndexFingerTip")
COUNT = 9


def write_pair(path, seed: int, count: int = COUNT, confidences: bool = True, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.full((16, 32, 3), 20 * seed + 5 * i, np.uint8) for i in range(count)]
    write_video(path.with_suffix(".mp4"), pictures, 30, crf=10)
    rng = np.random.default_rng(seed)
    arrays = {"camera/intrinsic": np.diag([736.6, 736.6, 1]).astype(np.float32)}
    for joint in ("camera", *JOINTS):
        arrays[f"transforms/{joint}"] = rng.normal(size=(count, 4, 4)).astype(np.float32)
        if confidences and joint != "camera":
            arrays[f"confidences/{joint}"] = rng.random(count).astype(np.float32)
    with h5py.File(path.with_suffix(".hdf5"), "w") as file:
        for key, values in arrays.items():
            file[key] = values
        file.attrs.update(attributes)
    return arrays


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "egodex"
    arrays = {
        "part1/add_remove_lid/0": write_pair(
            root / "part1/add_remove_lid/0",
            0,
            llm_description="Put the lid on.",
            llm_description2="Take the lid off.",
            llm_type="reversible",
            which_llm_description="2",
        ),
        "part1/add_remove_lid/2": write_pair(
            root / "part1/add_remove_lid/2",
            1,
            llm_description="Put the lid on.",
            llm_description2="Take the lid off.",
            llm_type="reversible",
            which_llm_description="1",
        ),
        "part1/add_remove_lid/10": write_pair(
            root / "part1/add_remove_lid/10", 2, confidences=False, description="Fold – a towel."
        ),
        "part2/pour/0": write_pair(
            root / "part2/pour/0", 3, llm_description=np.bytes_("Pour."), llm_type="simple"
        ),
    }
    return root, arrays


def open_it(path):
    return open_egodex(path, name="egodex", embodiment="human")


def test_every_number_is_read_exactly(folder):
    root, arrays = folder
    assert detect(root) == "egodex"
    episodes = pickle.loads(pickle.dumps(open_it(root)))
    assert [episode.id for episode in episodes] == list(arrays)
    assert [e.instructions for e in episodes] == [
        ("Take the lid off.",),
        ("Put the lid on.",),
        ("Fold – a towel.",),
        ("Pour.",),
    ]
    times = np.round(np.arange(COUNT) / 30 * 1e9).astype(np.int64)
    for episode, expected in zip(episodes, arrays.values()):
        assert episode.streams.keys() == {"video", *expected}
        for key, values in expected.items():
            stream = episode.streams[key]
            if key == "camera/intrinsic":
                np.testing.assert_array_equal(stream.values, values[None])
                assert stream.timestamps.tolist() == [0]
            else:
                np.testing.assert_array_equal(stream.values, values)
                np.testing.assert_array_equal(stream.timestamps, times)
            assert stream.values.dtype == values.dtype
        np.testing.assert_array_equal(episode.streams["video"].timestamps, times)
    level = episodes[3].streams["video"].values.read([4]).mean()
    assert level == pytest.approx(80, abs=2)


def test_a_part_and_a_task_open_by_themselves(folder):
    root, _ = folder
    assert [e.id for e in open_it(root / "part1")][-1] == "add_remove_lid/10"
    assert [e.id for e in open_it(root / "part1/add_remove_lid")] == ["0", "2", "10"]
    assert detect(root / "part2") == detect(root / "part2/pour") == "egodex"


def test_a_broken_pair_leaves_the_others_usable(folder):
    root, _ = folder
    task = root / "part1/add_remove_lid"
    (task / "0.hdf5").unlink()
    (task / "2.mp4").unlink()
    (task / "10.hdf5").write_bytes((task / "10.hdf5").read_bytes()[:3000])
    write_pair(task / "11", 4, llm_description="Too long.")
    write_video(task / "11.mp4", [np.zeros((16, 32, 3), np.uint8)] * 40, 30)
    write_pair(task / "12", 5)
    write_pair(task / "16", 7, llm_description=5)
    (task / ".17.mp4").touch()
    episodes = open_it(root)
    for index, message in enumerate(
        [
            r"0\.hdf5: the file is missing",
            r"2\.mp4: .*No such file",
            r"10\.hdf5: not a readable HDF5 file",
            r"11\.hdf5 has poses of 9 frames, but the video has 40",
            r"12\.hdf5 has no attribute 'description'",
            r"16\.hdf5: the attribute 'llm_description' is .*5.*, expected text",
        ]
    ):
        with pytest.raises(ValueError, match=message):
            episodes[index]
    assert episodes[6].instructions == ("Pour.",)
    assert len(episodes) == 7


def test_what_is_no_egodex_says_why(tmp_path):
    (tmp_path / "a").mkdir()
    write_video(tmp_path / "a/0.mp4", [np.zeros((16, 32, 3), np.uint8)] * 3, 30)
    with pytest.raises(ValueError, match=r"is not an EgoDex folder: it has no pair <n>\.hdf5"):
        open_it(tmp_path)


def test_a_part_that_is_broken_is_named_and_costs_nothing(tmp_path):
    arrays = write_pair(tmp_path / "task/0", 1, llm_description="Pour.")
    for key in ("camera/intrinsic", "transforms/leftHand", "confidences/rightHand"):
        arrays.pop(key)
    with h5py.File(tmp_path / "task/0.hdf5", "a") as file:
        del file["transforms/leftHand"], file["camera/intrinsic"], file["confidences/rightHand"]
        file["transforms/leftHand"] = np.zeros((COUNT, 3))
        file["camera/intrinsic"] = "wide"
        file["confidences/rightHand"] = np.zeros(COUNT - 2)
        file["gaze/left"] = np.zeros((COUNT, 2))
        file["transforms/head"] = h5py.ExternalLink("gone.hdf5", "head")
    (episode,) = open_it(tmp_path)
    assert episode.streams.keys() == {"video", *arrays}
    reasons = {
        "transforms/leftHand": "float64 [9, 3], where numbers of the shape ['N', 4, 4]",
        "camera/intrinsic": "where numbers of the shape ['N', 3]",
        "confidences/rightHand": "it has 7 values, the other poses 9",
        "gaze/left": "a dataset that EgoDex does not describe",
        "transforms/head": "to head in the file gone.hdf5, leads nowhere",
    }
    assert episode.left_out.keys() == reasons.keys()
    assert all(said in episode.left_out[key] for key, said in reasons.items())


@pytest.mark.parametrize("fps", [30, 60, 24])
def test_poses_have_the_times_of_the_frames(tmp_path, fps):
    """Also where the video is longer or shorter by a few frames, which is said."""
    for number, frames in enumerate((COUNT, COUNT + 2, COUNT - 3)):
        write_pair(tmp_path / f"task/{number}", 1, llm_description="Pour.")
        pictures = [np.full((16, 32, 3), 9 * i, np.uint8) for i in range(frames)]
        write_video(tmp_path / f"task/{number}.mp4", pictures, fps)
    expected = np.round(np.arange(COUNT) / fps * 1e9)
    for episode in open_it(tmp_path):
        times = episode.streams["transforms/leftHand"].timestamps
        assert np.abs(times - expected).max() <= 3
        shared = min(COUNT, len(episode.streams["video"].timestamps))
        np.testing.assert_array_equal(times[:shared], episode.streams["video"].timestamps[:shared])
        differs = "the video and the poses differ in length; both are taken to begin together"
        assert episode.findings == ((differs,) if episode.id != "task/0" else ())
