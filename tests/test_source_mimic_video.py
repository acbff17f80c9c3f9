import json
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from safetensors.numpy import save_file
from zarr.codecs import ShardingCodec

from data_pipelines.episode import FrameReader
from data_pipelines.sources.formats import detect
from data_pipelines.sources.mimic_video import open_mimic_episodes, recognises

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = "put the bowl on the plate – now."
STEPS, TOKENS = 70, 6
STREAMS = ("workspace_rgb", "eef_rot_lowdim", "gripper_lowdim", "eef_pose_lowdim")
BLOSC = numcodecs.Blosc(cname="lz4", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)


def stored(seed: int = 0) -> dict[str, np.ndarray]:
    """An episode's streams; no zeros, because zarr 3 leaves chunks of zeros out."""
    rng = np.random.default_rng(seed)
    return {
        "workspace_rgb": rng.integers(1, 256, (STEPS, 4, 6, 3)).astype(np.uint8),
        "eef_rot_lowdim": rng.normal(size=(STEPS, 4)).astype(np.float32),
        "gripper_lowdim": rng.normal(size=STEPS),
        "eef_pose_lowdim": rng.normal(size=(STEPS, 4, 4)),
    }


def embedding() -> np.ndarray:
    rows = np.zeros((1, 512, 1024), np.float16)
    rows[:, :TOKENS] = np.random.default_rng(5).integers(1, 9, (1, TOKENS, 1024))
    return rows


TIMES = np.arange(STEPS) * 50_000_000


def write_zarr(path, arrays=None, times=None, **options):
    """With zarr 3, in the release's format; see make_mimic_zarr.py for what zarr 2 writes."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    for key, array in (arrays or stored()).items():
        chunks = (65 if array.dtype == np.uint8 else 1024, *array.shape[1:])
        kept = dict(compressors=BLOSC, config={"write_empty_chunks": True}) | options
        root.create_array(key, data=array, chunks=chunks, **kept)
        at = (TIMES if times is None else times).astype(np.uint64)
        root.create_array(f"{key}_timestamps", data=at, chunks=at.shape, **kept)
    return path


def write_safetensors(path, text: bytes = TEXT.encode(), **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = stored() | {"language_embedding": embedding()}
    arrays |= {f"{key}_timestamps": TIMES.astype(np.uint64) for key in STREAMS}
    arrays["language_instruction"] = np.frombuffer(text, np.uint8)[None]
    arrays["language_instruction_timestamps"] = np.zeros(1, np.uint64)
    arrays["workspace_rgb_embedding"] = np.ones((2, 16, 4), np.float32)
    arrays["workspace_rgb_embedding_timestamps"] = TIMES[:2].astype(np.uint64)
    arrays["num_conditional_frames"] = np.array([5])
    save_file({k: np.ascontiguousarray(v) for k, v in (arrays | changes).items()}, path)
    return path


def open_it(path, **options):
    return open_mimic_episodes(path, name="libero", embodiment="panda", **options)


def lost(episode, key: str) -> str:
    """Why a stream cannot be used; the others can."""
    check(episode, {name: values for name, values in stored().items() if name != key})
    return episode.left_out[key]


def check(episode, expected, times=TIMES):
    """Every stream, whole, and pictures across the border of two chunks."""
    assert set(episode.streams) == set(expected)
    for key, array in expected.items():
        stream = episode.streams[key]
        np.testing.assert_array_equal(stream.timestamps, times)
        if key not in episode.cameras:
            assert stream.values.dtype == array.dtype
            np.testing.assert_array_equal(stream.values, array)
            continue
        assert isinstance(stream.values, FrameReader)
        for chosen in ([66, 3, 64, 3, 65], [69], list(range(STEPS))):
            np.testing.assert_array_equal(stream.values.read(chosen), array[chosen])
        with pytest.raises(IndexError, match="frame 70 asked for, but there are 70"):
            stream.values.read([70])


def test_an_episode_written_by_zarr_2_is_read_exactly():
    expected = dict(np.load(FIXTURES / "mimic_zarr.npz"))
    assert recognises(FIXTURES / "mimic_zarr")
    (episode,) = open_it(FIXTURES / "mimic_zarr")
    assert episode.id == "libero_goal/put_the_bowl_on_the_plate_0"
    assert (episode.source, episode.embodiment) == ("libero", "panda")
    assert episode.cameras == ("workspace_rgb",)
    text = expected["language_instruction"].tobytes().decode()
    assert episode.instructions == (text,) == (TEXT,)
    assert episode.embeddings[TEXT].dtype == np.float16
    np.testing.assert_array_equal(
        episode.embeddings[TEXT], expected["language_embedding"][0, :TOKENS]
    )
    np.testing.assert_array_equal(expected["gripper_lowdim_timestamps"], TIMES)
    check(
        episode,
        {k: v for k, v in expected.items() if not k.startswith("lang") and "_times" not in k},
    )


def test_neighbouring_pictures_are_unpacked_once(tmp_path):
    path = write_zarr(tmp_path / "a.zarr")
    frames = open_it(path)[0].streams["workspace_rgb"].values
    expected = stored()["workspace_rgb"]
    np.testing.assert_array_equal(frames.read([0, 1]), expected[:2])
    (path / "workspace_rgb/0.0.0.0").unlink()  # so that what is read now was kept
    np.testing.assert_array_equal(frames.read([64, 2]), expected[[64, 2]])
    np.testing.assert_array_equal(frames._store.rows("workspace_rgb", np.array([3])), expected[3:4])
    sent = pickle.loads(pickle.dumps(frames))
    for reader in (sent, frames):
        with pytest.raises(ValueError, match=r"chunk 0\.0\.0\.0 is missing"):
            reader.read([66, 0])


def test_safetensors_hold_the_same_and_latents_are_left_out(tmp_path):
    write_safetensors(tmp_path / "a/b/traj0.safetensors")
    save_file({"encoded_text": np.ones((3, 4))}, tmp_path / "unrelated.bin")
    assert recognises(tmp_path) and recognises(tmp_path / "a/b/traj0.safetensors")
    (episode,) = open_it(tmp_path)
    assert "latents" in episode.left_out["workspace_rgb_embedding"]
    assert "_timestamps" in episode.left_out["num_conditional_frames"]
    assert (episode.id, episode.instructions) == ("a/b/traj0", (TEXT,))
    assert episode.cameras == ("workspace_rgb",)
    np.testing.assert_array_equal(episode.embeddings[TEXT], embedding()[0, :TOKENS])
    check(episode, stored())


def test_a_folder_of_both_kinds_has_stable_ids(tmp_path):
    write_zarr(tmp_path / "toykitchen/b_1.zarr")
    write_zarr(tmp_path / "a_10.zarr")
    write_safetensors(tmp_path / "a_2.safetensors")
    (tmp_path / "paths.pkl").write_bytes(b"cos\nsystem\n")
    (tmp_path / ".statistics_cache/x.zarr").mkdir(parents=True)
    episodes = open_it(tmp_path)
    assert [e.id for e in episodes] == ["a_10", "a_2", "toykitchen/b_1"]
    check(episodes[2], stored())
    assert episodes[0].instructions == ("",) and not episodes[0].embeddings
    assert open_it(tmp_path / "a_10.zarr")[0].id == "a_10"
    write_safetensors(tmp_path / "a_10.safetensors")
    with pytest.raises(ValueError, match=r"has a_10 as \.zarr and as \.safetensors"):
        open_it(tmp_path)


def test_times_of_the_newer_bridge_episodes_are_floats(tmp_path):
    at = TIMES + 0.3
    changes = {f"{key}_timestamps": at for key in STREAMS}
    (episode,) = open_it(write_safetensors(tmp_path / "a.safetensors", **changes))
    check(episode, stored())
    changes = {f"{key}_timestamps": at * np.nan for key in STREAMS}
    with pytest.raises(ValueError, match=r"a\.safetensors \(\w+\)"):
        open_it(write_safetensors(tmp_path / "a.safetensors", **changes))[0]


ZARR_FAULTS = {
    "missing chunk of pictures": (
        lambda p: (p / "workspace_rgb/1.0.0.0").unlink(),
        r"\(workspace_rgb\): chunk 1.0.0.0 is missing",
    ),
    "missing chunk of numbers": (
        lambda p: (p / "eef_rot_lowdim/0.0").unlink(),
        r"\(eef_rot_lowdim\): chunk 0.0 is missing",
    ),
    "missing times": (
        lambda p: (p / "gripper_lowdim_timestamps/0").unlink(),
        r"\(gripper_lowdim\): \(gripper_lowdim_timestamps\): chunk 0 is missing",
    ),
    "empty chunk": (
        lambda p: (p / "eef_rot_lowdim/0.0").write_bytes(b""),
        r"\(eef_rot_lowdim\): chunk 0.0 is truncated after 0 bytes",
    ),
    "cut chunk": (
        lambda p: os.truncate(p / "workspace_rgb/1.0.0.0", 100),
        r"\(workspace_rgb\): chunk 1.0.0.0 is truncated after 100 bytes",
    ),
    "chunk that was not fetched": (
        lambda p: (p / "workspace_rgb/1.0.0.0").write_text(POINTER),
        r"\(workspace_rgb\): chunk 1.0.0.0: it is a placeholder of Git LFS",
    ),
    "no times": (
        lambda p: shutil.rmtree(p / "gripper_lowdim_timestamps"),
        r"\(gripper_lowdim\): there is no array gripper_lowdim_timestamps",
    ),
    "description that was not fetched": (
        lambda p: (p / "gripper_lowdim/.zarray").write_text(POINTER),
        r"\(gripper_lowdim\): .*gripper_lowdim/\.zarray: it is a placeholder of Git LFS",
    ),
    "no description": (
        lambda p: (p / "gripper_lowdim/.zarray").write_text("{"),
        r"\(gripper_lowdim\): .*/\.zarray: E",
    ),
    "nothing": (lambda p: shutil.rmtree(p) or p.mkdir(), r"a\.zarr is not an episode.* no arrays"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.mark.parametrize("fault", ZARR_FAULTS)
def test_what_zarr_would_read_as_zeros_or_cannot_read_is_named(tmp_path, fault):
    damage, message = ZARR_FAULTS[fault]
    write_zarr(tmp_path / "a.zarr")
    write_zarr(tmp_path / "b.zarr")
    damage(tmp_path / "a.zarr")
    episodes = open_it(tmp_path)
    assert len(episodes) == 2
    check(episodes[1], stored())
    if found := re.search(r"\\\((\w+?)(_timestamps)?\\\)", message):
        said = f"({found[1]}): {lost(episodes[0], found[1])}"
        assert re.search(message, said)
    else:
        with pytest.raises(ValueError, match=message):
            episodes[0]


def test_a_chunk_with_other_bytes_is_named_when_it_is_read(tmp_path):
    path = write_zarr(tmp_path / "a.zarr")
    chunk = path / "workspace_rgb/1.0.0.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:16] + b"\xff" * (len(content) - 16))
    frames = open_it(path)[0].streams["workspace_rgb"].values
    assert len(frames.read([64, 0])) == 2
    with pytest.raises(ValueError, match=r"a\.zarr \(workspace_rgb\)"):
        frames.read([65])


def test_chunks_of_zeros_that_zarr_3_leaves_out_need_the_option(tmp_path):
    arrays = stored() | {"gripper_lowdim": np.zeros(STEPS)}
    path = write_zarr(tmp_path / "a.zarr", arrays, config=None)
    said = lost(open_it(path)[0], "gripper_lowdim")
    assert re.search("^chunk 0 is missing.*sparse=True", said)
    check(open_it(path, sparse=True)[0], arrays)


@pytest.mark.parametrize("location", ["start", "end"])
def test_chunks_that_a_shard_lacks_are_no_zeros(tmp_path, location):
    """A writer that was stopped; what is beyond the array's end is rightly not there."""
    path = write_zarr(tmp_path / "a.zarr")
    for name, steps in {"whole": STEPS, "part": STEPS - 22}.items():
        shards = ShardingCodec(chunk_shape=(8, 3), index_location=location)
        array = zarr.create_array(
            path / name,
            shape=(STEPS, 3),
            dtype="f4",
            chunks=(32, 3),
            serializer=shards,
            compressors=None,
        )
        array[:steps] = 1 + np.arange(steps * 3).reshape(steps, 3)
        shutil.copytree(path / "gripper_lowdim_timestamps", path / f"{name}_timestamps")
    episode = open_it(path)[0]
    assert episode.streams["whole"].values[-1].tolist() == [208, 209, 210]
    assert "2 chunks in the shard c/1/0 are missing" in episode.left_out["part"]
    assert not open_it(path, sparse=True)[0].streams["part"].values[-1].any()


def test_a_truncated_chunk_that_is_not_compressed_is_called_so(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", compressors=None)
    os.truncate(path / "gripper_lowdim/0", 10)
    assert "chunk 0 is truncated after 10 bytes" in lost(open_it(path)[0], "gripper_lowdim")


def test_chunks_in_folders_are_found_and_missed(tmp_path):
    nested = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    path = write_zarr(tmp_path / "a.zarr", **nested)
    check(open_it(path)[0], stored())
    (path / "workspace_rgb/1/0/0/0").unlink()
    assert "chunk 1/0/0/0 is missing" in lost(open_it(path)[0], "workspace_rgb")


def test_wrong_times_are_named(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", times=TIMES[:-3])
    with pytest.raises(ValueError, match=r"a\.zarr \(\w+\): .*67 timestamps and 70 values"):
        open_it(path)[0]
    path = write_zarr(tmp_path / "b.zarr", times=TIMES[::-1])
    with pytest.raises(ValueError, match=r"b\.zarr \(\w+\): timestamps must strictly increase"):
        open_it(path)[0]


@pytest.mark.filterwarnings("ignore:.*Zarr V3 spec", "ignore:Consolidated metadata")
@pytest.mark.parametrize("shards", [False, True], ids=["chunks", "shards"])
@pytest.mark.parametrize("packed", ["zstd", "blosc"])
def test_episodes_of_zarr_format_3_are_read_whole_or_named(tmp_path, shards, packed):
    path, expected = tmp_path / "a.zarr", stored()
    root = zarr.open_group(path, mode="w", zarr_format=3)
    for key, array in expected.items():
        chunks = (5 if array.dtype == np.uint8 else 35, *array.shape[1:])
        kept = {"shards": (35, *array.shape[1:])} if shards else {}
        kept["compressors"] = zarr.codecs.BloscCodec() if packed == "blosc" else "auto"
        root.create_array(key, data=array, chunks=chunks, **kept)
        at = (TIMES + 1).astype(np.uint64)  # no zeros
        root.create_array(f"{key}_timestamps", data=at, chunks=at.shape)
    text = root.create_array("language_instruction", shape=(1,), dtype="variable_length_bytes")
    text[:] = np.array([TEXT.encode()], object)
    zarr.consolidate_metadata(path)
    assert recognises(tmp_path)
    (episode,) = open_it(tmp_path)
    assert episode.instructions == (TEXT,) and episode.cameras == ("workspace_rgb",)
    check(episode, expected, TIMES + 1)

    chunk = path / f"workspace_rgb/c/{1 if shards else 13}/0/0/0"
    content = chunk.read_bytes()
    os.truncate(chunk, len(content) - 9)
    if packed == "blosc" and not shards:
        assert "truncated" in open_it(tmp_path)[0].left_out["workspace_rgb"]
    else:
        with pytest.raises(ValueError, match=r"a\.zarr \(workspace_rgb\)"):
            open_it(tmp_path)[0].streams["workspace_rgb"].values.read([STEPS - 1])
    chunk.unlink()
    said = open_it(tmp_path)[0].left_out["workspace_rgb"]
    assert re.search(r"^chunk c/\d+/0/0/0 is missing", said)


class Tell:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("inside", [False, True], ids=["chunk", "shard"])
def test_code_in_a_chunk_of_format_3_is_not_run(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    for key in ("x", "x_timestamps"):
        root.create_array(key, data=np.arange(1, 5), chunks=(2,), shards=(4,) if inside else None)
    about = json.loads((tmp_path / "a.zarr/x/zarr.json").read_text())
    codecs = about["codecs"][0]["configuration"]["codecs"] if inside else about["codecs"]
    codecs[-1] = {"name": "numcodecs.pickle", "configuration": {}}
    (tmp_path / "a.zarr/x/zarr.json").write_text(json.dumps(about))
    for chunk in (tmp_path / "a.zarr/x/c").iterdir():
        chunk.write_bytes(pickle.dumps(Tell()))
    with pytest.raises(ValueError, match=r"a\.zarr \(x\): the codec 'pickle'"):
        open_it(tmp_path)[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["language_instruction", "gripper_lowdim"])
@pytest.mark.parametrize("dtype", ["|O", "<f4"])
@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_code_in_a_chunk_is_not_run(tmp_path, monkeypatch, key, dtype, place):
    """numcodecs has a codec that unpickles; only its newest versions refuse that themselves."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "copy.zarr"
    shutil.copytree(next(FIXTURES.glob("mimic_zarr/*/*.zarr")), path)
    (path / key / "0").write_bytes(pickle.dumps(Tell()))
    codecs = {"filters": [{"id": "pickle"}]} if place == "filters" else {}
    codecs |= {"compressor": {"id": "pickle"}} if place == "compressor" else {"compressor": None}
    about = json.loads((path / key / ".zarray").read_text()) | {"dtype": dtype} | codecs
    (path / key / ".zarray").write_text(json.dumps(about))
    message = "(the codec|it has objects)"
    if key == "gripper_lowdim":
        assert re.match(message, open_it(path)[0].left_out[key])
    else:
        with pytest.raises(ValueError, match=rf"copy\.zarr \({key}\): {message}"):
            open_it(path)[0]
    assert not (tmp_path / "ran").exists()


def test_broken_safetensors_and_text_are_named(tmp_path):
    write_safetensors(tmp_path / "b.safetensors")
    path = write_safetensors(tmp_path / "a.safetensors", text="schließe".encode("latin-1"))
    episodes = open_it(tmp_path)
    with pytest.raises(ValueError, match=r"a\.safetensors.* not UTF-8 text \(byte 6 is 0xdf\)"):
        episodes[0]
    write_safetensors(path, language_instruction=np.zeros((1, 5), np.float32))
    message = rf"^{path} \(language_instruction\): float32 \[1, 5\] is not text"
    with pytest.raises(ValueError, match=message):
        episodes[0]
    for wrong, message in (
        (np.ones(5, np.float16), "float16 [5] is not an embedding"),
        (np.ones((2, 6, 4), np.float16), "2 embeddings of 1 texts"),
        (np.ones((1, 2, 3, 4), np.float16), "float16 [1, 2, 3, 4] is not an embedding"),
    ):
        write_safetensors(path, language_embedding=wrong)
        assert message in episodes[0].left_out["language_embedding"]
        assert not episodes[0].embeddings and episodes[0].instructions == (TEXT,)
    write_safetensors(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        episodes[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        episodes[0]
    check(episodes[1], stored())


def test_other_files_of_these_kinds_are_not_taken_for_episodes(tmp_path):
    save_file({"encoded_text": np.ones((3, 4))}, tmp_path / "a.safetensors")
    zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2).create_array("x", data=np.ones(3))
    assert not recognises(tmp_path)
    with pytest.raises(ValueError, match=r"a\.safetensors is not an episode.*encoded_text"):
        open_it(tmp_path)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.zarr or \.safetensors episodes"):
        open_it(tmp_path / "empty")


@pytest.mark.parametrize("write", [write_zarr, write_safetensors])
def test_an_opened_dataset_can_be_sent_away_and_shared_by_threads(tmp_path, write):
    suffix = "zarr" if write is write_zarr else "safetensors"
    write(tmp_path / f"a.{suffix}")
    episodes = pickle.loads(pickle.dumps(open_it(tmp_path)))
    expected = stored()["workspace_rgb"]

    def same(i):
        frames = episodes[0].streams["workspace_rgb"].values
        frames = pickle.loads(pickle.dumps(frames)) if i % 3 == 0 else frames
        return np.array_equal(frames.read([i, 69]), expected[[i, 69]])

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(same, range(30)))


@pytest.mark.filterwarnings("ignore:.*Zarr V3 spec")
@pytest.mark.parametrize("dtype", [str, "<U20", "S20"])
@pytest.mark.parametrize("format", [2, 3])
def test_text_of_every_dtype_is_read(tmp_path, dtype, format):
    path = write_zarr(tmp_path / "a.zarr")
    zarr.create_array(path / "language_instruction", shape=(1,), dtype=dtype, zarr_format=format)[
        :
    ] = np.array(["pick it up"], object if dtype is str else dtype)
    (episode,) = open_it(path)
    assert episode.instructions == ("pick it up",) and type(episode.instructions[0]) is str


def test_instructions_with_times_belong_to_them(tmp_path):
    def written(texts, times):
        rows = np.stack([np.frombuffer(text.ljust(9).encode(), np.uint8) for text in texts])
        rows[rows == ord(" ")] = 0
        changes = {"language_instruction": rows, "language_instruction_timestamps": times}
        changes["language_embedding"] = np.repeat(embedding(), len(texts), 0)
        return open_it(write_safetensors(tmp_path / "a.safetensors", **changes))[0]

    half = int(TIMES[STEPS // 2])
    episode = written(["open", "shut", "open"], np.array([0, half, 2 * half]))
    assert episode.instructions == ("open", "shut")
    assert [(part.start, part.instructions[0]) for part in episode.sections] == [
        (0, "open"),
        (half, "shut"),
        (2 * half, "open"),
    ]
    assert set(episode.embeddings) == {"open", "shut"}
    episode = written(["open", "shut"], np.zeros(2, np.int64))  # paraphrases
    assert episode.instructions == ("open", "shut") and not episode.sections
    with pytest.raises(ValueError, match="3 texts, but the times"):
        written(["open", "shut", "open"], np.array([0, half]))
    with pytest.raises(ValueError, match="2 texts, but the times"):
        written(["open", "shut"], np.array([half, 0]))


@pytest.mark.filterwarnings("ignore:.*Zarr V3 spec", "ignore:Consolidated metadata")
@pytest.mark.parametrize("format", [2, 3])
def test_consolidated_metadata_that_disagree_are_a_finding(tmp_path, format):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=format)
    for key in ("x", "x_timestamps", "gone", "gone_timestamps"):
        root.create_array(key, data=np.arange(1, 9), chunks=(8,))
    zarr.consolidate_metadata(tmp_path / "a.zarr")
    assert not open_it(tmp_path)[0].findings
    root.create_array(
        "x", data=np.arange(1, 5), chunks=(4,), overwrite=True
    )  # appended or cut later
    root.create_array("x_timestamps", data=np.arange(1, 5), chunks=(4,), overwrite=True)
    for key in ("gone", "gone_timestamps"):
        shutil.rmtree(tmp_path / "a.zarr" / key)
    (episode,) = open_it(tmp_path)
    assert episode.streams["x"].values.tolist() == [1, 2, 3, 4]
    assert ["array x " in text for text in episode.findings] == [True, False]
    assert list(episode.left_out) == ["gone"] and "missing" in episode.left_out["gone"]


def test_cameras_of_every_shape_are_read_and_other_units_of_time_are_not(tmp_path):
    rng = np.random.default_rng(3)
    arrays = {
        "grey": rng.integers(1, 256, (STEPS, 9, 12)).astype(np.uint8),
        "chw": rng.integers(1, 256, (STEPS, 3, 9, 12)).astype(np.uint8),
        "rgba": rng.integers(1, 256, (STEPS, 9, 12, 4)).astype(np.uint8),
    }
    seen = {
        "grey": np.repeat(arrays["grey"][..., None], 3, -1),
        "chw": arrays["chw"].transpose(0, 2, 3, 1),
        "rgba": arrays["rgba"][..., :3],
    }
    episode = open_it(
        write_zarr(tmp_path / "a.zarr", arrays | {"mixed": arrays["chw"][:, :, :3, :3]})
    )[0]
    assert set(episode.cameras) == {*seen, "mixed"}
    for key, expected in seen.items():
        found = episode.streams[key].values.read([66, 3, 66])
        np.testing.assert_array_equal(found, expected[[66, 3, 66]])
    for unit in (1000, 1_000_000):  # microseconds, milliseconds
        path = write_zarr(tmp_path / "b.zarr", times=TIMES // unit)
        assert "another unit than nanoseconds" in open_it(path)[0].left_out["workspace_rgb"]
    path = write_zarr(tmp_path / "b.zarr")
    zarr.open_array(path / "eef_pose_lowdim_timestamps")[:] = TIMES // 1000
    episode = open_it(path)[0]
    assert "0.001 times as long as workspace_rgb" in episode.left_out["eef_pose_lowdim"]
    assert "eef_pose_lowdim" not in episode.streams and episode.cameras == ("workspace_rgb",)


def test_other_stores_say_what_they_are(tmp_path):
    root = zarr.open_group(tmp_path / "replay.zarr", mode="w", zarr_format=2)
    root.create_array("data/action", shape=(20, 7), dtype="f4")
    root.create_array("meta/episode_ends", shape=(2,), dtype="i8")
    (tmp_path / "a.zarr.zip").write_bytes(b"PK")
    zarr.open_group(tmp_path / "empty.zarr", mode="w", zarr_format=3)
    for name, said in {
        "replay.zarr": "it is a replay buffer, as diffusion policy and UMI",
        "a.zarr.zip": "zipped zarr store; unpack it into a folder a.zarr",
        "empty.zarr": "it has no arrays, but ['zarr.json']",
    }.items():
        with pytest.raises(ValueError) as caught:
            detect(tmp_path / name)
        assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)
