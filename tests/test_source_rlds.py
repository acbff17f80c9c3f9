"""RLDS datasets that TFDS wrote (fixtures/make_rlds.py), against what TFDS itself reads."""

import io
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rlds_datasets import (
    ARM,
    ARM_ARRAY,
    CELL,
    COUNTS,
    FIXTURES,
    check_episode,
    copy,
    open_rlds,
    truth,
)

from data_pipelines.episode import FrameReader
from data_pipelines.sources.formats import open_dataset
from data_pipelines.sources.rlds import UnknownRate

IMAGE, WRIST = "steps/observation/image_0", "steps/observation/wrist_image"


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("name", ["arm", "cell"])
def test_what_tfds_wrote_is_read_as_tfds_reads_it(name, split):
    episodes = open_rlds(FIXTURES / name, split=split)
    assert len(episodes) == COUNTS[split]
    assert len({episode.id for episode in episodes}) == len(episodes)
    for number in reversed(range(len(episodes))):
        episode = episodes[number]
        assert (episode.source, episode.embodiment) == ("robots", "arm")
        check_episode(episode, truth(name, split, number))


def test_array_record_files_are_read_like_tfrecord_files():
    (first, second) = open_rlds(ARM_ARRAY)
    arm = list(open_rlds(ARM))
    for episode in (first, second):
        twin = next(
            e
            for e in arm
            if len(e.streams["steps/action"].timestamps)
            == len(episode.streams["steps/action"].timestamps)
        )
        assert episode.instructions == twin.instructions
        assert set(episode.streams) == set(twin.streams)
        for key, stream in episode.streams.items():
            if isinstance(stream.values, np.ndarray):
                found = twin.streams[key].values
                np.testing.assert_array_equal(stream.values, found, err_msg=key, strict=True)
        pictures, others = (e.streams[IMAGE].values for e in (episode, twin))
        assert [pictures.encoded(i) for i in range(3)] == [others.encoded(i) for i in range(3)]


def test_values_keep_the_dtype_of_the_dataset():
    streams = open_rlds(ARM)[0].streams
    assert streams["steps/action_dict/joint_position"].values.dtype == np.float64
    assert streams["steps/is_first"].values.dtype == bool
    streams = open_rlds(CELL)[0].streams
    dtypes = {key: s.values.dtype.name for key, s in streams.items() if hasattr(s.values, "dtype")}
    assert dtypes["steps/action/world_vector"] == "float32"
    assert dtypes["steps/action/terminate_episode"] == "int32"
    assert dtypes["steps/observation/packed"] == "int16"
    assert streams["steps/observation/clock"].values[0] == 2**64 - 1
    assert streams["steps/observation/count"].values[1] == -(2**40)


def test_frames_are_decoded_when_asked_for():
    episode = open_rlds(ARM)[1]
    assert episode.cameras == (IMAGE, WRIST)
    for camera in episode.cameras:
        frames = episode.streams[camera].values
        assert isinstance(frames, FrameReader)
        found = frames.read([6, 0, 6, 2])
        assert found.shape == (4, 12, 16, 3)
        for picture, index in zip(found, [6, 0, 6, 2]):
            expected = np.asarray(Image.open(io.BytesIO(frames.encoded(index))))
            np.testing.assert_array_equal(picture, expected)
        with pytest.raises(IndexError, match="frame 7 asked for, but there are 7"):
            frames.read([7])
    assert open_rlds(CELL)[0].cameras == (
        "steps/observation/image",
        "steps/observation/raw_image",
    )


def test_instructions_are_the_distinct_ones_and_keep_their_embeddings():
    for number, episode in enumerate(open_rlds(ARM)):
        assert sorted(episode.instructions) == ["close it — gently", "open the drawer"]
        embedding = truth("arm", "train", number)["steps/language_embedding"]
        for text, rows in episode.embeddings.items():
            assert text == episode.instructions[0]  # the others have none beside them
            np.testing.assert_array_equal(rows, embedding[:1], strict=True)
    episode = open_rlds(CELL)[0]
    embeddings = truth("cell", "train", 0)["steps/observation/natural_language_embedding"]
    first, later = episode.instructions  # the text changes at the third step
    assert first == "push" and later.startswith("push ")
    np.testing.assert_array_equal(episode.embeddings[first], embeddings[:1])
    np.testing.assert_array_equal(episode.embeddings[later], embeddings[2:3])
    only = [e.instructions for e in open_rlds(ARM, instruction="steps/language_instruction_2")]
    assert sorted(only) == [("",), ("",), ("close it — gently",), ("open the drawer",)]
    with pytest.raises(ValueError, match=r"no text 'task', but \['steps/language_instruction'"):
        open_rlds(ARM, instruction="task")


def test_steps_are_as_far_apart_as_the_name_or_the_config_says(tmp_path):
    def period(path, **options) -> int:
        episode = open_dataset("rlds", path, "robots", "arm", options)[0]
        return int(np.diff(episode.streams["steps/action"].timestamps)[0])

    assert period(ARM, fps=10) == 100_000_000
    for name, expected in {"droid_100": 66_666_667, "bridge_dataset": 200_000_000}.items():
        folder = copy(ARM_ARRAY, tmp_path / name, name=name)
        (file,) = folder.glob("*.array_record-*")
        file.rename(folder / file.name.replace("arm_array", name))
        assert period(folder) == expected
        assert period(folder, fps=4) == 250_000_000


def test_a_rate_that_nothing_tells_is_not_guessed():
    with pytest.raises(UnknownRate) as caught:
        open_dataset("rlds", ARM, "robots", "arm")
    assert "name 'arm' is not one of those known (5 for bridge*, 15 for droid*" in str(caught.value)
    assert str(caught.value).endswith("set dataset.options.fps")
    for wrong in (0, -5, "5 Hz", float("nan")):
        with pytest.raises(ValueError, match=r"the option fps is .*; give a number above 0"):
            open_dataset("rlds", ARM, "robots", "arm", {"fps": wrong})


def test_an_opened_dataset_can_be_sent_and_shared():
    opened = open_rlds(ARM)
    sent = pickle.loads(pickle.dumps(opened))
    assert (
        [e.id for e in sent]
        == [e.id for e in opened]
        == ["train/00000/00000", "train/00000/00001", "train/00001/00000", "train/00001/00001"]
    )
    episode = pickle.loads(pickle.dumps(opened[1]))
    frames = opened[1].streams[IMAGE].values.read([3])
    np.testing.assert_array_equal(episode.streams[IMAGE].values.read([3]), frames)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: opened[i % 4].streams["steps/action"].values, range(40)))
    for i, values in enumerate(found):
        np.testing.assert_array_equal(values, truth("arm", "train", i % 4)["steps/action"])


def test_features_in_the_form_of_tfds_before_2022(tmp_path):
    import tensorflow_datasets as tfds

    folder = copy(CELL, tmp_path)
    old = tfds.builder_from_directory(CELL).info.features.to_json()
    assert old["type"].endswith("FeaturesDict")
    (folder / "features.json").write_text(json.dumps(old))
    check_episode(open_rlds(folder)[0], truth("cell", "train", 0))


def test_tensorflow_is_not_imported_and_tfds_only_where_it_is_needed():
    code = (
        "import sys; from pathlib import Path;"
        "from data_pipelines.sources.formats import detect, open_dataset;"
        f"path = Path({str(ARM_ARRAY)!r}); detect(path);"
        "assert not {'tensorflow', 'tensorflow_datasets', 'google.protobuf'} & set(sys.modules);"
        "open_dataset('rlds', path, 'a', 'b', dict(fps=5))[0];"
        "assert not {'tensorflow', 'jax', 'torch', 'pandas', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
