"""Open HDF5 files, and the messages about files that cannot be read."""

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_pipelines.episode import reason
from data_pipelines.sources.formats import open_dataset
from data_pipelines.sources.hdf5 import Hdf5Frames, Hdf5Pool
from data_pipelines.video import VideoFile

FIXTURES = Path(__file__).parent / "fixtures"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
SAID = "it is a placeholder of Git LFS; run git lfs pull to fetch the file"


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("lerobot", "lerobot_v21/data/chunk-000/episode_000000.parquet"),
        ("lerobot", "lerobot_v21/videos/chunk-000/observation.images.front/episode_000000.mp4"),
        ("lerobot", "lerobot_v30/meta/episodes/chunk-000/file-000.parquet"),
        ("robomimic_hdf5", "a/a_demo.hdf5"),
        ("mimic_episodes", "a/a.safetensors"),
    ],
)
def test_files_that_were_not_fetched_are_named(tmp_path, format, file):
    root = tmp_path / Path(file).parts[0]
    if (FIXTURES / root.name).is_dir():
        shutil.copytree(FIXTURES / root.name, root)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(POINTER)
    try:
        said = str(open_dataset(format, root, "set", "arm")[0].left_out)
    except ValueError as error:
        said = str(error)
        assert str(tmp_path / file) in said
    assert SAID in said


def test_files_of_records_that_were_not_fetched_are_named(tmp_path):
    folder = shutil.copytree(FIXTURES / "rlds/arm/1.0.0", tmp_path / "1.0.0")
    file = next(folder.glob("*train.tfrecord-00000*"))
    file.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file}: no record 0, {SAID}"):
        open_dataset("rlds", folder, "set", "arm", {"fps": 5})[0]


def test_what_libraries_say_becomes_one_line(tmp_path):
    assert reason(tmp_path / "a", ValueError("bad\n  thrift\n")) == "bad thrift"
    with pytest.raises(ValueError, match=r"not a readable video \(File name too long\); copy"):
        VideoFile(tmp_path / f"{'a' * 300}.mp4").stream()


def test_few_hdf5_files_stay_open(tmp_path):
    pool, opened, readers = Hdf5Pool(max_open=2), [], []
    for number in range(3):
        path = tmp_path / f"{number}.hdf5"
        with h5py.File(path, "w") as file:
            file["a"] = np.full((4, 2, 2, 3), number, np.uint8)
        with pool.open(path) as file:
            opened.append(file)
        readers.append(Hdf5Frames(path, "a", 4, pool))
    assert [bool(file) for file in opened] == [False, True, True]
    for reader in (*readers, *pickle.loads(pickle.dumps(readers))):
        assert (reader.read([3, 0]) == int(Path(reader.where).stem)).all()
    (tmp_path / "0.hdf5").unlink()
    with pytest.raises(ValueError, match=r"0\.hdf5: the file is missing"):
        pickle.loads(pickle.dumps(readers))[0].read([0])


@pytest.mark.parametrize(
    ("format", "option", "words"),
    [
        ("lerobot", {"texts": "language_instruction_2"}, "a list of names"),  # not of letters
        ("bridge_raw", {"cameras": "images0"}, "a list of names"),
        ("mimic_episodes", {"sparse": "False"}, "True or False"),
        ("video_folder", {"camera_in_name": 1}, "True or False"),
        ("clip_list", {"narration_seconds": -4.0}, "a positive number"),
        ("clip_list", {"fps": float("inf")}, "a positive number"),
    ],
)
def test_an_option_of_another_type_is_refused(tmp_path, format, option, words):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"the option {name} is {value!r}; give {words}"):
        open_dataset(format, tmp_path, "some", "arm", option)
