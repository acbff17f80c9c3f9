import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.pickles import PickleRefused, read_array_pickle
from data_pipelines.shards import StoredTexts
from data_pipelines.sources.formats import detect, open_dataset
from data_pipelines.sources.video_folder import open_video_folder
from data_pipelines.video import write_video

NUMPY1 = Path(__file__).parent / "fixtures/t5_pickles"  # written by make_t5_pickles.py


def ramp(count: int, first: int = 0) -> list[np.ndarray]:
    return [np.full((16, 32, 3), first + 8 * i, np.uint8) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    (root / "video").mkdir(parents=True)
    (root / "metas").mkdir()
    for number, name in enumerate(("b", "a", "c")):
        write_video(root / f"video/{name}.mp4", ramp(5 + number, 20 * number), 10, crf=10)
        (root / f"metas/{name}.txt").write_text(f"clip {name}\n", encoding="utf-8")
    return root


def open_it(root: Path, **options):
    return open_video_folder(root, name="people", embodiment="human", **options)


def test_videos_are_episodes_in_the_order_of_their_names(folder):
    assert detect(folder) == "video_folder"
    episodes = pickle.loads(pickle.dumps(open_it(folder)))
    assert [episode.id for episode in episodes] == ["a", "b", "c"]
    assert [episode.instructions for episode in episodes] == [("clip a",), ("clip b",), ("clip c",)]
    assert [len(episode.streams["video"].values) for episode in episodes] == [6, 5, 7]
    shown = episodes[2].streams["video"].values.read(range(7)).mean((1, 2, 3))
    np.testing.assert_allclose(shown, 40 + 8 * np.arange(7), atol=2)
    assert episodes[0].embeddings == {}


def test_a_broken_episode_leaves_the_others_usable(folder):
    (folder / "metas/a.txt").unlink()
    (folder / "metas/b.txt").write_bytes("naïve".encode("latin-1"))
    content = (folder / "video/c.mp4").read_bytes()
    (folder / "video/c.mp4").write_bytes(content[: len(content) // 2])
    write_video(folder / "video/d.mp4", ramp(4), 10)
    (folder / "metas/d.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (folder / "video/.d.mp4.1234.part").touch()
    (folder / "video/._d.mp4").touch()
    episodes = open_it(folder)
    assert len(episodes) == 4
    with pytest.raises(ValueError, match=r"metas/a\.txt: the text cannot be read \(No such file"):
        episodes[0]
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 text \(byte 2 is 0xef\)"):
        episodes[1]
    with pytest.raises(ValueError, match=r"c\.mp4: not a readable video"):
        episodes[2]
    assert episodes[3].instructions == ("with a mark",)


def test_a_caption_that_is_no_file_is_named(folder):
    (folder / "metas/a.txt").unlink()
    (folder / "metas/a.txt").mkdir()
    with pytest.raises(ValueError, match=r"a\.txt: the text cannot be read \(Is a directory\)"):
        open_it(folder)[0]


def test_cameras_share_a_caption_without_their_number(folder):
    for camera in range(2):
        os.link(folder / "video/a.mp4", folder / f"video/pick{camera}.mp4")
    (folder / "metas/pick.txt").write_text("pick it up")
    episodes = open_it(folder, camera_in_name=True)
    assert [(e.id, e.instructions) for e in (episodes[3], episodes[4])] == [
        ("pick0", ("pick it up",)),
        ("pick1", ("pick it up",)),
    ]
    with pytest.raises(ValueError, match=r"metas/\.txt: .*No such file"):
        episodes[0]  # "a" is all number


def test_other_containers_keep_their_ending_in_the_id(folder):
    (folder / "video/a.mp4").rename(folder / "video/a.mov")
    (folder / "video/b.mp4").rename(folder / "video/b.MP4")
    assert [episode.id for episode in open_it(folder)] == ["a.mov", "b.MP4", "c"]


def refused(episode) -> str:
    """Why an episode has no stored embedding: it costs nothing unless that is asked for."""
    assert len(episode.streams["video"].values) and not episode.embeddings
    with pytest.raises(ValueError, match="stores no embedding") as error:
        StoredTexts(512, 4).check(episode)
    assert episode.left_out["language_embedding"] in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_stored_embeddings_are_trimmed(folder, protocol):
    padded = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float16)
    padded[6:] = 0
    (folder / "t5_xxl").mkdir()
    (folder / "t5_xxl/a.pickle").write_bytes(pickle.dumps([padded], protocol))
    first, second, _ = open_it(folder)
    (text,) = first.embeddings
    assert text == first.instructions[0]
    assert first.embeddings[text].dtype == np.float16
    np.testing.assert_array_equal(first.embeddings[text], padded[:6])
    assert second.embeddings == {}  # none is stored for it
    assert open_it(folder, embeddings=False)[0].embeddings == {}


def test_the_newer_form_is_preferred(folder):
    stored = np.eye(5, 4, dtype=np.float32)  # the fifth row is zero
    (folder / "t5_xxl").mkdir()
    (folder / "language_embeddings").mkdir()
    (folder / "t5_xxl/a.pickle").write_bytes(pickle.dumps([2 * stored]))
    (folder / "t5_xxl/b.pickle").write_bytes(pickle.dumps([2 * stored]))
    save_file({"encoded_text": stored[None]}, folder / "language_embeddings/a.safetensors")
    save_file({"text": stored}, folder / "language_embeddings/c.safetensors")
    episodes = open_it(folder)
    np.testing.assert_array_equal(episodes[0].embeddings["clip a"], stored[:4])
    np.testing.assert_array_equal(episodes[1].embeddings["clip b"], 2 * stored[:4])
    assert "c.safetensors has the keys ['text']" in refused(episodes[2])
    rounded = stored.astype(ml_dtypes.bfloat16)
    save_file({"encoded_text": rounded}, folder / "language_embeddings/a.safetensors")
    assert open_it(folder)[0].embeddings["clip a"].dtype == ml_dtypes.bfloat16
    os.truncate(folder / "language_embeddings/a.safetensors", 70)
    assert "a.safetensors: not a readable" in refused(open_it(folder)[0])


@pytest.mark.parametrize("protocol", range(1, 6))
def test_what_numpy_1_has_pickled_is_read(protocol):
    path = NUMPY1 / f"numpy1_protocol{protocol}.pickle"
    assert b"numpy._core" not in path.read_bytes()
    (array,) = read_array_pickle(path.read_bytes(), path)
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, np.load(NUMPY1 / "expected.npy"))


def test_arrays_of_all_kinds_come_back():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 4))
    value = {
        "c": array,
        "fortran": np.asfortranarray(array.astype(np.float32)),
        "big-endian": array.astype(">f8"),
        "part": array[:, ::2],
        "whole": np.arange(6).reshape(1, 2, 3),
        "empty": np.zeros((0, 5), np.uint8),
        "same": [array, array, (True, None, -(2**70), 0.5, b"bytes", "text")],
        "scalar": np.float32(1.5),
        "bool": np.array([True, False]),
    }
    for protocol in range(1, 6):
        found = read_array_pickle(pickle.dumps(value, protocol), "x")
        assert found.keys() == value.keys()
        for key in value.keys() - {"same"}:
            np.testing.assert_array_equal(found[key], value[key])
            assert found[key].dtype == value[key].dtype
        np.testing.assert_array_equal(found["same"][1], array)
        assert found["same"][2] == value["same"][2]


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path):
    mark = tmp_path / "executed"
    (folder / "t5_xxl").mkdir()
    for protocol in range(6):
        bad = pickle.dumps([Malicious(os.system, f"touch {mark}")], protocol)
        (folder / "t5_xxl/b.pickle").write_bytes(bad)
        said = refused(open_it(folder)[1])
        assert "b.pickle would call posix.system; only NumPy" in said
        assert open_it(folder)[0].id == "a"
    for function in (eval, exec, __import__, getattr, np.load):
        with pytest.raises(PickleRefused, match="would call"):
            read_array_pickle(pickle.dumps(Malicious(function, "1")), "x")
    # The names of NumPy, called with something else.
    with pytest.raises(PickleRefused, match="holds an array of type 'O8'"):
        read_array_pickle(pickle.dumps(np.array([{}], object)), "x")
    assert not mark.exists()


def test_damaged_pickles_are_one_error():
    good = pickle.dumps([np.arange(12, dtype=np.float16).reshape(3, 4)])
    for length in range(0, len(good), 7):
        with pytest.raises(PickleRefused, match=r"^here"):
            read_array_pickle(good[:length], "here")
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            read_array_pickle(bytes(bad), "here")
        except PickleRefused:
            pass


def test_what_is_no_embedding_is_named(folder):
    (folder / "t5_xxl").mkdir()
    wrong = {
        "int64 [2, 3]": [np.ones((2, 3), int)],
        "float64 [3]": [np.ones(3)],
        "list": [np.ones((2, 3)), np.ones((2, 3))],
        "holds only zeros": [np.zeros((2, 3))],
    }
    for message, value in wrong.items():
        (folder / "t5_xxl/a.pickle").write_bytes(pickle.dumps(value))
        assert message in refused(open_it(folder)[0])


def test_what_is_no_such_folder_says_why(folder, tmp_path):
    (tmp_path / "empty/video").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no \.mp4, \.webm, \.mkv, \.mov, \.m4v, \.avi files"):
        open_dataset("video_folder", tmp_path / "empty", "a", "human")
    for file in (folder / "metas").iterdir():
        file.unlink()
    (folder / "metas").rmdir()
    with pytest.raises(ValueError, match="has videos but no captions"):
        open_dataset("video_folder", folder, "a", "human")
    with pytest.raises(ValueError, match=r"video has videos without captions; write a text each"):
        detect(folder)
    for path in (folder / "video", folder / "video/a.mp4"):
        with pytest.raises(ValueError, match=r"captions; move them into .*metas/a\.txt"):
            detect(path)


def test_the_layout_of_cosmos_is_read(folder):
    (folder / "video").rename(folder / "videos")
    assert detect(folder) == "video_folder"
    assert [episode.id for episode in open_it(folder)] == ["a", "b", "c"]
    (folder / "video").mkdir()
    (folder / "video/._a.mp4").touch()
    assert len(open_it(folder)) == 3
    os.link(folder / "videos/a.mp4", folder / "video/a.mp4")
    with pytest.raises(ValueError, match="videos in both video and videos"):
        open_it(folder)


def test_what_is_not_read_is_said(folder, caplog):
    open_it(folder)
    for name in ("._a.mp4", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (folder / "video" / name).touch()
        (folder / "metas" / name).touch()
    open_it(folder)
    assert not caplog.messages  # left by systems, which say nothing about the dataset
    (folder / "video/more/deep").mkdir(parents=True)
    (folder / "video/empty").mkdir()
    os.link(folder / "video/a.mp4", folder / "video/more/deep/x.mp4")
    os.link(folder / "video/a.mp4", folder / "video/a.MKV")
    os.link(folder / "video/a.mp4", folder / "video/d.MP4")
    os.link(folder / "video/a.mp4", folder / "video/e.mp4")
    (folder / "video/f.wmv").touch()
    (folder / "metas/d.TXT").write_text("in capitals")
    (folder / "metas/g.txt").write_text("nothing")
    (folder / "metas/h.json").write_text("{}")
    episodes = open_it(folder)
    assert len(episodes) == 6
    assert [m.split(": ", 1)[1] for m in caplog.messages] == [
        f"1 folders with videos are not read; move the videos up: {folder}/video/more",
        "2 files of unknown endings are not read: video/f.wmv, metas/h.json",
        "1 captions have no video: g",
        "1 videos have no caption, so that they cannot be read: e",
        "1 captions have several videos, which are all read: a",
    ]
    by_id = {episodes[i].id: episodes[i].instructions for i in (0, 1, 4)}
    assert by_id == {"a.MKV": ("clip a",), "a": ("clip a",), "d.MP4": ("in capitals",)}
    (folder / "metas/d.txt").write_text("in small letters")
    with pytest.raises(ValueError, match=r"two captions of d: \['d.TXT', 'd.txt'\]; keep one"):
        open_it(folder)[4]
