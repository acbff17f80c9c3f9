"""RLDS datasets that TFDS wrote (fixtures/make_rlds.py), against what it reads, and damage."""

import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from data_pipelines.episode import FrameReader
from data_pipelines.sources.formats import detect, open_dataset
from data_pipelines.sources.record_files import RecordFiles, read_index, read_record

FIXTURES = Path(__file__).parent / "fixtures/rlds"
ARM, ARM_ARRAY, CELL = (FIXTURES / n for n in ("arm/1.0.0", "arm_array/1.0.0", "cell/0.1.0"))
COUNTS = {"train": 4, "val": 2}
IMAGE, WRIST = "steps/observation/image_0", "steps/observation/wrist_image"
LEFT_OUT = {"steps/observation/depth", "steps/observation/ragged"}


def open_rlds(path: Path, fps: float = 5.0, **options):
    return open_dataset("rlds", path, "robots", "arm", {"fps": fps, **options})


def truth(name: str, split: str, number: int) -> dict[str, np.ndarray]:
    """What TFDS reads of one episode, by the names of the streams."""
    head = f"{split}/{number}/"
    with np.load(FIXTURES / f"{name}.npz") as file:
        return {f"steps/{k[len(head) :]}": file[k] for k in file.files if k.startswith(head)}


def digest(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def check_episode(episode, expected: dict[str, np.ndarray]) -> None:
    """Every stream is what TFDS reads, and no value of a step is lost."""
    expected.pop("steps/file_path")
    language = {key for key in expected if "language" in key}
    assert set(episode.streams) == expected.keys() - language - LEFT_OUT
    for key, stream in episode.streams.items():
        if hasattr(stream.values, "encoded"):
            found = np.stack([digest(stream.values.encoded(i)) for i in range(len(stream.values))])
        elif isinstance(stream.values, np.ndarray):
            found = stream.values
        else:
            found = stream.values.read(range(len(stream.values)))
        np.testing.assert_array_equal(found, expected[key], err_msg=key, strict=True)


def copy(source: Path, tmp_path: Path, **info) -> Path:
    """A copy to damage; `info` replaces entries of dataset_info.json."""
    target = tmp_path / "copy/1.0.0"
    shutil.copytree(source, target)
    file = target / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))
    return target


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shards(folder: Path, split: str = "train") -> list[Path]:
    return sorted(folder.glob(f"*-{split}.*-of-*"))


def readable(episodes) -> tuple[list[int], list[str]]:
    good, reasons = [], []
    for i in range(len(episodes)):
        try:
            good.append(i if episodes[i].id else -1)
        except ValueError as error:
            reasons.append(str(error))
    return good, reasons


def rewrite(path: Path, change) -> None:
    """Change every payload of a TFRecord file, with right checksums."""

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    index = read_index(path)
    payloads = [change(read_record(path, index, i)) for i in range(len(index[0]))]
    sizes = [len(payload).to_bytes(8, "little") for payload in payloads]
    path.write_bytes(b"".join(s + masked(s) + p + masked(p) for s, p in zip(sizes, payloads)))


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
    known = {
        "droid_100": 66_666_667,
        "bridge_dataset": 200_000_000,
        "libero_10_no_noops": 50_000_000,
    }
    for name, expected in known.items():
        folder = copy(ARM_ARRAY, tmp_path / name, name=name)
        (file,) = folder.glob("*.array_record-*")
        file.rename(folder / file.name.replace("arm_array", name))
        assert period(folder) == expected
        assert period(folder, fps=4) == 250_000_000


def test_a_rate_that_nothing_tells_is_not_guessed(tmp_path):
    for name in ("arm", "bridge_assembly", "libero_of_my_own", "droidlet", "fractal"):
        folder = copy(ARM_ARRAY, tmp_path / name, name=name)
        (file,) = folder.glob("*.array_record-*")
        file.rename(folder / file.name.replace("arm_array", name))
        episode = open_dataset("rlds", folder, "robots", "arm")[0]
        assert re.search(rf"\({name}\) does not say .*options\.fps", episode.unknown_rate)
    for wrong in (0, -5, "5 Hz", float("nan"), True):
        with pytest.raises(ValueError, match=r"the option fps is .*; give a positive number"):
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


def test_a_dataset_that_was_moved_since_tfds_wrote_it(tmp_path):
    splits = json.loads((ARM / "dataset_info.json").read_text())["splits"]
    for row in splits:
        row["filepathTemplate"] = "/nowhere/" + row["filepathTemplate"]
    folder = copy(ARM, tmp_path, splits=splits)
    check_episode(open_rlds(folder)[3], truth("arm", "train", 3))
    copied = shutil.copytree(folder, tmp_path / "another folder/latest")
    check_episode(open_rlds(copied, split="val")[1], truth("arm", "val", 1))


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


# Damage: each fault costs its own episodes, and is named.


def test_a_truncated_file_costs_its_last_episodes_only(tmp_path):
    folder = copy(ARM, tmp_path)
    last = shards(folder)[1]
    last.write_bytes(last.read_bytes()[:-5])
    good, reasons = readable(open_rlds(folder))
    assert good == [0, 1, 2]
    assert reasons == [f"{last}: no record 1, the file ends within record 1; copy the file again"]


def test_damaged_bytes_cost_their_episode_only(tmp_path):
    folder = copy(ARM, tmp_path)
    first = shards(folder)[0]
    damage(first, 500)
    good, reasons = readable(open_rlds(folder))
    assert good == [1, 2, 3]
    assert reasons == [f"{first}: record 0 is damaged (checksum); copy the file again"]
    damage(first, 2)  # its length: what follows cannot be found
    good, reasons = readable(open_rlds(folder))
    assert good == [2, 3]
    assert "no record 1, the header of record 0 is damaged" in reasons[1]


def test_a_missing_file_costs_its_episodes_only(tmp_path):
    folder = copy(ARM, tmp_path)
    missing = shards(folder)[0]
    missing.unlink()
    good, reasons = readable(open_rlds(folder))
    assert good == [2, 3]
    assert reasons == [f"{missing} is missing; copy it again"] * 2


def test_damaged_array_record_files_are_named(tmp_path):
    folder = copy(ARM_ARRAY, tmp_path)
    (file,) = shards(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:70_000])
    good, reasons = readable(open_rlds(folder))
    assert good == [] and all(reason.startswith(f"{file}: record") for reason in reasons)
    file.write_bytes(whole)
    damage(file, 200)
    good, reasons = readable(open_rlds(folder))
    assert len(good) == 1 and "copy the file again" in reasons[0]


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"has no split 'test', but train, val; set"):
        open_rlds(ARM, split="test")
    folder = copy(ARM, tmp_path)
    features = (folder / "features.json").read_text()
    info = (folder / "dataset_info.json").read_text()
    (folder / "features.json").unlink()
    assert detect(folder) == "rlds"
    with pytest.raises(ValueError, match=r"features\.json is missing"):
        open_rlds(folder)
    for damaged, message in {
        features[:100]: "JSONDecodeError",
        features.replace("image_feature.Image", "sound.Sound"): "Unrecognized FeatureConnector",
    }.items():
        (folder / "features.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"{folder}: .* is damaged.*{message}"):
            open_rlds(folder)
    (folder / "features.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(ValueError, match=r"is damaged.*UnicodeDecodeError"):
        open_rlds(folder)
    (folder / "features.json").write_text(features.replace('"steps"', '"frames"'))
    with pytest.raises(ValueError, match="not made of steps"):
        open_rlds(folder)
    (folder / "features.json").write_text(features)
    for damaged in ("{}", info[:100]):
        (folder / "dataset_info.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"dataset_info\.json .*is damaged"):
            open_rlds(folder)
    (folder / "dataset_info.json").write_text(info.replace("shardLengths", "numBytes"))
    with pytest.raises(ValueError, match=r"is damaged|has no split"):
        open_rlds(folder)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="there is none; give <name>/<version>"):
        open_rlds(folder)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_dataset_cannot_name_modules_to_be_imported(tmp_path, monkeypatch, key):
    (tmp_path / "planted.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = copy(ARM, tmp_path)
    node = {key: "planted.Image", "content": {}}
    for features in (node, {"jsonFeature": {"json": json.dumps({"feature": [node]})}}):
        text = json.dumps(features).replace("planted", "\\u0070lanted")
        (folder / "features.json").write_text(text)
        with pytest.raises(ValueError, match=r"'planted\.Image'\] are not classes of TFDS"):
            open_rlds(folder)


def test_several_versions_and_other_formats_are_refused(tmp_path):
    shutil.copytree(ARM, tmp_path / "arm/1.0.0")
    assert detect(tmp_path / "arm") == "rlds"
    shutil.copytree(ARM, tmp_path / "arm/1.1.0")
    with pytest.raises(ValueError, match=r"several versions, \['1\.0\.0', '1\.1\.0'\]"):
        open_rlds(tmp_path / "arm")
    with pytest.raises(ValueError, match="as riegeli; convert it to tfrecord or array_record"):
        open_rlds(copy(ARM, tmp_path, fileFormat="riegeli"))
    (tmp_path / "hub").mkdir()  # the datasets library of Hugging Face has the same file name
    (tmp_path / "hub/dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="has no known format"):
        detect(tmp_path / "hub")


def test_text_in_another_encoding_is_refused(tmp_path):
    folder = copy(ARM, tmp_path)
    rewrite(
        shards(folder)[0],
        lambda data: data.replace("it — gently".encode(), b"it \xe9\xe9\xe9 gently"),
    )
    with pytest.raises(
        ValueError, match=r"record 0: steps/language_instruction\w* of step 0: not UTF-8"
    ):
        open_rlds(folder)[0]


def with_changed(change):
    """A change of the features of a record, for `rewrite`; they are lists by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    def changed(data: bytes) -> bytes:
        example = tf_example_pb2.Example.FromString(data)
        for name, feature in example.features.feature.items():
            if name.startswith("steps/"):
                values = getattr(feature, feature.WhichOneof("kind")).value
                values[:] = change(name.removeprefix("steps/"), list(values))
        return example.SerializeToString()

    return changed


def test_an_episode_without_steps_or_of_unclear_length_is_refused(tmp_path):
    folder = copy(ARM, tmp_path)
    rewrite(shards(folder)[0], with_changed(lambda name, values: []))
    with pytest.raises(ValueError, match="record 0: the episode has no steps"):
        open_rlds(folder)[0]
    half = with_changed(lambda name, values: values[: len(values) // 2] if name > "l" else values)
    rewrite(shards(folder)[1], half)
    with pytest.raises(ValueError, match="the number of steps of the episode is not clear"):
        open_rlds(folder)[2]


def test_a_part_that_is_broken_or_not_read_is_named_and_costs_nothing(tmp_path):
    broken = {
        "reward": lambda values: values[:-1],
        "action_dict/gripper": lambda values: values * 2,  # [2 n, 1]
        "action_dict/joint_position": lambda values: values[:-2],  # [n - 1, 7] and five numbers
        "observation/wrist_image": lambda values: [b"", *values[1:]],
    }
    unchanged = lambda values: values  # noqa: E731
    folder = copy(ARM, tmp_path)
    change = with_changed(lambda name, values: broken.get(name, unchanged)(values))
    rewrite(shards(folder)[1], change)
    rewrite(shards(folder)[1], lambda data: data.replace(b"steps/is_last", b"steps/is_lost"))
    whole, episode = open_rlds(folder)[0], open_rlds(folder)[2]
    assert whole.left_out.keys() == {"steps/observation/depth"}
    assert "uint16" in whole.left_out["steps/observation/depth"]
    reasons = {
        "steps/reward": "it has 2 values for 3 steps",
        "steps/action_dict/gripper": "it has 6 values for 3 steps",
        "steps/action_dict/joint_position": "19 numbers, which is no multiple of 7",
        "steps/observation/wrist_image": "1 of its 3 pictures are empty",
        "steps/is_last": "the record has no 'steps/is_last'",
    }
    for key, said in reasons.items():
        assert said in episode.left_out[key] and key not in episode.streams
    expected = truth("arm", "train", 2)
    for key in ("steps/action", "steps/observation/state"):
        np.testing.assert_array_equal(episode.streams[key].values, expected[key])
    assert episode.cameras == (IMAGE,)
    (episode, *_) = open_rlds(CELL)
    assert "Sequence" in episode.left_out["steps/observation/ragged"]


def test_a_text_that_changes_belongs_to_its_steps(tmp_path):
    episode = open_rlds(CELL, fps=4)[0]  # "push" in its first two steps
    first, later = episode.instructions
    assert [(part.start, part.instructions) for part in episode.sections] == [
        (0, (first,)),
        (500_000_000, (later,)),
    ]
    assert episode.instructions_at(499_999_999) == (first,)
    assert not open_rlds(ARM)[0].sections  # paraphrases, the same in each step

    texts = {"language_instruction": [b"open", b"", b"shut"], "language_instruction_2": []}
    folder = copy(ARM, tmp_path)
    change = lambda name, values: texts.get(name, values)  # noqa: E731
    rewrite(shards(folder)[1], with_changed(change))
    episode = open_rlds(folder, instruction="steps/language_instruction")[2]
    assert episode.instructions == ("open", "", "shut")
    assert [part.instructions for part in episode.sections] == [("open",), ("",), ("shut",)]
    texts["language_instruction"] = [b"open", b"", b""]  # written once: of the whole episode
    rewrite(shards(folder)[1], with_changed(change))
    episode = open_rlds(folder, instruction="steps/language_instruction")[2]
    assert episode.instructions == ("open",) and not episode.sections
    texts["language_instruction"] = [b"open"]  # of which steps?
    rewrite(shards(folder)[1], with_changed(change))
    with pytest.raises(ValueError, match="language_instruction: it has 1 values for 3 steps"):
        open_rlds(folder)[2]


def test_a_text_of_the_whole_episode_is_taken_where_the_steps_have_none(tmp_path):
    path = "episode_metadata/file_path"
    episode = open_rlds(ARM, instruction=path)[0]
    (text,) = episode.instructions
    assert text and not episode.sections and not episode.embeddings
    folder = copy(ARM, tmp_path)
    features = (folder / "features.json").read_text().replace("language_instr", "language_sent")
    (folder / "features.json").write_text(features.replace('"file_path"', '"instruction"'))
    with pytest.raises(ValueError, match=r"no text 'x', but .*'episode_metadata/instruction'"):
        open_rlds(folder, instruction="x")

    def renamed(data: bytes) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(data)
        stored = example.features.feature
        stored["episode_metadata/instruction"].CopyFrom(stored[path])
        return example.SerializeToString()

    for file in shards(folder):
        rewrite(file, renamed)
    assert open_rlds(folder)[0].instructions == (text,)


def test_the_list_of_files_and_the_files_may_disagree(tmp_path):
    splits = json.loads((ARM / "dataset_info.json").read_text())["splits"]
    splits[0]["shardLengths"][0] = "1"  # of two
    episodes = open_rlds(copy(ARM, tmp_path, splits=splits))
    assert len(episodes) == 3
    said = "00000-of-00002 holds 2 records, but dataset_info.json lists 1; the first 1 are taken"
    assert episodes[0].findings[0].endswith(said) and not episodes[1].findings
    folder = copy(ARM, tmp_path / "b")
    for file in shards(folder):
        file.rename(str(file).replace("-of-00002", "-of-00004"))
    with pytest.raises(ValueError, match=r"none of the 2 files .* it has arm-train.*-of-00004"):
        open_rlds(folder)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_descriptions_that_were_not_fetched_are_named(tmp_path, name):
    folder = copy(ARM, tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(ValueError, match=rf"{name}: it is a placeholder of Git LFS"):
        open_rlds(folder)


def test_broken_messages_are_errors_and_nothing_worse(monkeypatch):
    index = read_index(shards(CELL)[0])
    data = read_record(shards(CELL)[0], index, 0)
    episodes, rng = open_rlds(CELL), np.random.default_rng(0)
    whole = 0
    for _ in range(300):
        broken = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        broken[rng.integers(len(broken))] ^= 1 << int(rng.integers(8))
        monkeypatch.setattr(RecordFiles, "read", lambda *_, content=bytes(broken): content)
        try:
            whole += episodes[0].left_out.keys() == {"steps/observation/ragged"}
        except ValueError as error:
            assert str(shards(CELL)[0]) in str(error)
    assert 0 < whole < 150  # where a number or a picture is another one, nothing can tell
