import gzip
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.sources.formats import detect, open_dataset
from data_pipelines.sources.webdataset import open_webdataset

FIXTURE = Path(__file__).parent / "fixtures/webdataset"  # written by make_webdataset.py
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


def open_it(path: Path, **options):
    return open_webdataset(path, name="web", embodiment="human", **options)


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


def decoded(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def video() -> bytes:
    return members(FIXTURE / "shard-000.tar")["clips/000.mp4"]


def test_what_the_library_wrote_is_read_as_it_reads_it():
    assert detect(FIXTURE) == "webdataset"
    episodes = pickle.loads(pickle.dumps(open_it(FIXTURE)))
    keys = [(shard, key) for shard in sorted(EXPECTED) for key in EXPECTED[shard]]
    assert [episode.id for episode in episodes] == [f"{shard}/{key}" for shard, key in keys]
    for index in (3, 0, 4, 2, 1):
        shard, key = keys[index]
        episode, expected = episodes[index], EXPECTED[shard][key]
        captions = expected["caption"]
        assert episode.instructions == tuple([captions] if isinstance(captions, str) else captions)
        files = members(FIXTURE / f"{shard}.tar")
        for kind, digest in expected["videos"].items():
            camera = kind.removesuffix("mp4").removesuffix(".") or "video"
            content = files[f"{key}.{kind}"]
            assert hashlib.sha256(content).hexdigest() == digest
            stream = episode.streams[camera]
            np.testing.assert_array_equal(stream.timestamps, np.arange(6) * 100_000_000)
            frames = decoded(content)
            np.testing.assert_array_equal(stream.values.read([5, 0, 3]), frames[[5, 0, 3]])
        assert len(episode.cameras) == len(expected["videos"])


def test_one_tar_or_some_of_a_folder():
    assert len(open_it(FIXTURE / "shard-001.tar")) == 2
    assert len(open_it(FIXTURE, shards="*-000.tar")) == 3
    with pytest.raises(ValueError, match=r"no file is named train-\*\.tar"):
        open_dataset("webdataset", FIXTURE, "web", "human", {"shards": "train-*.tar"})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_kind(tmp_path, video, format):
    long = "folder/" * 14 + "clip" if format == tarfile.USTAR_FORMAT else "folder/" * 40 + "clïp"
    files = {f"./{long}.MP4": video, f"./{long}.txt": b"one", "b/x.mp4": video, "b/x.txt": b"two"}
    path = write_tar(tmp_path / "a.tar", files, format)
    with tarfile.open(path, "a", format=format) as tar:
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("__meta__.json"))
    episodes = open_it(path)
    assert [e.id for e in episodes] == [f"a/./{long}", "a/b/x"]
    assert [e.instructions for e in episodes] == [("one",), ("two",)]
    np.testing.assert_array_equal(
        episodes[1].streams["video"].values.read(range(6)), decoded(video)
    )


def test_shards_that_are_not_read_or_not_there_are_named(tmp_path, video, caplog):
    for name in ("a-000.tar", "a-001.tar", "a-003.tar", "b-7.tar", "deep/b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, {"1.mp4": video, "1.txt": b"go"})
    assert len(open_it(tmp_path)) == 4
    assert [record.args[1] for record in caplog.records] == ["deep", "2"]
    caplog.clear()
    assert len(open_it(tmp_path, shards="a-00[01].tar")) == 2
    assert [record.args[1] for record in caplog.records] == ["deep"]


def test_a_broken_sample_leaves_the_others_usable(tmp_path, video):
    files = {
        "no_text.mp4": video,
        "latin.mp4": video,
        "latin.txt": "naïve".encode("latin-1"),
        "picture.jpg": b"",
        "picture.txt": b"no video",
        "half.mp4": video[: len(video) // 2],
        "half.txt": b"cut off",
        "field.json": b'{"text": "other field"}',
        "field.mp4": video,
        "bad.json": b"{",
        "bad.mp4": video,
        "good.mp4": video,
        "good.txt": b"good",
    }
    episodes = open_it(write_tar(tmp_path / "a.tar", files))
    for index, message in enumerate(
        [
            r"a\.tar/no_text has no \.txt or \.json, only \['mp4'\]",
            r"latin\.txt: not UTF-8 text \(byte 2 is 0xef\)",
            r"picture has no video, only \['jpg', 'txt'\]",
            r"half\.mp4: not a readable video",
            r"field\.json has no text under 'caption' \(it has \['text'\]\); set the option",
            r"bad\.json: not JSON",
        ]
    ):
        with pytest.raises(ValueError, match=message):
            episodes[index]
    assert episodes[6].instructions == ("good",)
    assert open_it(tmp_path / "a.tar", caption="text")[4].instructions == ("other field",)


def test_a_part_that_is_broken_or_not_read_is_named_and_costs_nothing(tmp_path, video):
    files = {
        "x.front.mp4": video,
        "x.wrist.mp4": video[: len(video) // 2],
        "x.side.webm": b"version https://git-lfs.github.com/spec/v1\n",
        "x.depth.npy": b"\x93NUMPY",
        "x.cls": b"3",
        "x.txt": b"open",
        "x.json": b'{"caption": ["shut", "close"]}',
        "y.mp4": video,
        "y.txt": b"open",
        "y.json": b'{"caption": ["open", "unlock"]}',
        "z.mp4": video,
        "z.txt": b"open",
        "z.json": b"{",
    }
    x, y, z = open_it(write_tar(tmp_path / "a.tar", files))
    assert x.cameras == ("front",) and set(x.left_out) == {"wrist", "side", "depth.npy", "cls"}
    assert "not a readable video" in x.left_out["wrist"]
    assert [e.instructions for e in (x, y, z)] == [("open",)] * 3
    assert x.findings == ("the .txt differs from 'caption' in the .json; the .txt is taken",)
    assert not y.findings and not z.findings


def test_two_members_of_one_name_are_refused(tmp_path, video):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:  # two samples of one key in a row
        for name, content in [("x.mp4", video), ("x.txt", b"1"), ("x.mp4", video), ("x.txt", b"2")]:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"a\.tar/x has two members mp4"):
        open_it(tmp_path / "a.tar")[0]


def test_a_key_that_comes_again_gets_an_id_of_its_own(tmp_path, video):
    one, two = {"a.mp4": video, "a.txt": b"1"}, {"b.mp4": video, "b.txt": b"2"}
    content = write_tar(tmp_path / "one.tar", one).read_bytes()
    body = content.rstrip(b"\0")
    body += b"\0" * (-len(body) % 512)
    content = body + write_tar(tmp_path / "two.tar", two | one).read_bytes()
    (tmp_path / "all.tar").write_bytes(content)
    episodes = open_it(tmp_path / "all.tar")
    assert [e.id for e in episodes] == ["all/a", "all/b", "all/a #2"]


def test_files_of_a_key_that_lie_apart_are_named(tmp_path, video):
    """Of a tar that was not made in order of names; WebDataset itself splits such samples."""
    files = {"a.mp4": video, "b.mp4": video, "a.txt": b"open", "b.txt": b"shut"}
    episodes = open_it(write_tar(tmp_path / "s.tar", files))
    for index, lacks in enumerate(("no .txt or .json, only ['mp4']", "", "no video, only ['txt']")):
        with pytest.raises(ValueError, match="other files of this key lie apart") as error:
            episodes[index]
        assert lacks in str(error.value)


def test_a_tar_that_is_cut_off_keeps_what_it_still_has(tmp_path, video):
    files = {f"{i}.{kind}": c for i in range(4) for kind, c in (("mp4", video), ("txt", b"x"))}
    whole = write_tar(tmp_path / "a.tar", files, tarfile.USTAR_FORMAT).read_bytes()
    third = whole.index(b"2.mp4\0")
    cuts = {
        third + 512 + 300: (2, "end of data"),
        third + 100: (1, "truncated"),
        third: (1, "truncated"),
    }
    for length, (last, message) in cuts.items():
        (tmp_path / "a.tar").write_bytes(whole[:length])
        episodes = open_it(tmp_path / "a.tar")
        assert len(episodes) == last + 1
        assert [episodes[i].id for i in range(last)] == [f"a/{i}" for i in range(last)]
        with pytest.raises(ValueError, match=rf"a\.tar: .*{message}.*; {last} and all samples"):
            episodes[last]
    assert len(open_it(tmp_path / "a.tar")) == 2
    (tmp_path / "a.tar").write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    with pytest.raises(ValueError, match=rf"damaged .*at byte {third}; 1 and all samples after it"):
        open_it(tmp_path / "a.tar")[1]


def test_a_shard_that_holds_nothing_or_is_none_is_counted_and_named(tmp_path, video):
    whole = write_tar(tmp_path / "a.tar", {"x.mp4": video, "x.txt": b"x"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(bytes(10_240))
    # What a downloader leaves that takes the whole space at its beginning.
    (tmp_path / "c.tar").write_bytes(whole.rstrip(b"\0") + bytes(2 << 20))
    (tmp_path / "d.tar").mkdir()
    episodes = open_it(tmp_path)
    assert (len(episodes), episodes[0].id) == (4, "a/x")
    for index, message in (
        (1, r"b\.tar: the tar has no samples"),
        (2, r"c\.tar: the tar is empty from byte \d+ on; x and all samples after it are lost"),
        (3, r"d\.tar: the shard cannot be read \(Is a directory\)"),
    ):
        with pytest.raises(ValueError, match=message):
            episodes[index]


def test_a_sparse_member_ends_its_shard(tmp_path, video):
    files = {f"{i}.{kind}": c for i in range(3) for kind, c in (("mp4", video), ("txt", b"x"))}
    whole = write_tar(tmp_path / "a.tar", files, tarfile.GNU_FORMAT).read_bytes()
    at = whole.index(b"1.mp4\0")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("1.mp4")
    member.type = tarfile.GNUTYPE_SPARSE
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(whole[:at] + header + whole[at + 512 :])
    episodes = open_it(tmp_path / "a.tar")
    assert [len(episodes), episodes[0].id] == [2, "a/0"]
    with pytest.raises(
        ValueError, match=r"a\.tar: .*sparse.*; 1 and all samples after it are lost"
    ):
        episodes[1]


def test_damaged_headers_are_errors_and_nothing_worse(tmp_path, video):
    files = {f"{'long' * 40}{i}.txt": b"x" for i in range(2)} | {"b.mp4": video, "b.txt": b"x"}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        for at in rng.integers(0, 5000, rng.integers(1, 4)):
            broken[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.tar").write_bytes(broken)
        try:
            episodes = open_it(tmp_path / "a.tar")
            for i in range(len(episodes)):
                episodes[i]
        except ValueError as error:
            assert "a.tar" in str(error)


def test_compressed_shards_are_refused_with_what_to_do(tmp_path, video):
    good = write_tar(tmp_path / "a.tar", {"x.mp4": video, "x.txt": b"x"})
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(good.read_bytes()))
    episodes = open_it(tmp_path)
    assert (len(episodes), episodes[0].id) == (2, "a/x")
    with pytest.raises(ValueError, match=r"b\.tar\.gz is compressed.*once with gunzip"):
        episodes[1]
    (tmp_path / "b.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar is compressed"):
        open_it(tmp_path)


def test_what_is_no_webdataset_says_why(tmp_path, video):
    with pytest.raises(ValueError, match=r"no file is named \*\.tar"):
        open_it(tmp_path)
    (tmp_path / "a.tar").write_bytes(video)
    with pytest.raises(ValueError, match=r"a\.tar: not a readable tar"):
        open_it(tmp_path)
    (tmp_path / "a.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(ValueError, match=r"a\.tar: it is a placeholder of Git LFS; run git lfs"):
        open_it(tmp_path)
    write_tar(tmp_path / "a.tar", {"x.jpg": b"", "x.txt": b"x"})
    with pytest.raises(ValueError, match=r"no samples with videos .*\['jpg', 'txt'\]"):
        open_it(tmp_path)
