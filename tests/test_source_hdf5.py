"""HDF5 as public files have it: links, virtual datasets, every kind of camera, other layouts."""

import io
import json
import os
import pickle
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.formats import detect, open_dataset

STEPS = 5


def picture(level: int, **changes) -> np.ndarray:
    """Left half this level, with red above blue in the right half: a turn or a swap shows."""
    frame = np.full((16, 24, 3), level, np.uint8)
    frame[:8, 12:], frame[8:, 12:] = (250, 10, 10), (10, 10, 250)
    return frame


def clip(base: int) -> np.ndarray:
    return np.stack([picture(base + i) for i in range(STEPS)])


def write_demo(group: h5py.Group, base: int) -> None:
    group["actions"] = np.arange(base, base + STEPS)[:, None] * np.ones((1, 7))
    group["obs/rgb"] = clip(base)
    group.attrs["num_samples"] = STEPS


def write(path, demos: dict[str, int], **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(attributes)
        for name, base in demos.items():
            write_demo(data.create_group(name), base)
    return path


def open_it(path, fps=10.0, **options):
    return open_dataset("robomimic_hdf5", path, "set", "arm", {"fps": fps, **options})


def base_of(episode) -> list[int]:
    """What the first action and the first picture show."""
    level = episode.streams["obs/rgb"].values.read([0])[0, 0, 0, 0]
    return [int(episode.streams["actions"].values[0, 0]), int(level)]


def test_a_file_of_links_reads_each_demonstration_where_it_is(tmp_path, monkeypatch):
    """Merged without copying: the path below `data` is another demonstration in the other file."""
    task = "put_it_away"
    for name, base in (("a", 10), ("b", 100)):
        write(
            tmp_path / f"parts/{name}/{task}_demo.h5x",
            {f"demo_{i}": base + 10 * i for i in range(3)},
        )
    b = "parts/b/put_it_away_demo.h5x"
    with h5py.File(tmp_path / b, "a") as file:
        file["data/short"] = h5py.SoftLink("/data/demo_1")
        file["elsewhere"] = file["data/demo_2"]
    with h5py.File(tmp_path / "merged.hdf5", "w") as file:
        data = file.create_group("data")
        for i in range(3):
            data[f"demo_{i}"] = h5py.ExternalLink(f"parts/a/{task}_demo.h5x", f"/data/demo_{i}")
        data["demo_3"] = h5py.ExternalLink(b, "/data/demo_0")
        data["demo_4"] = h5py.ExternalLink(b, "/data/short")
        data["demo_5"] = h5py.ExternalLink(b, "/elsewhere")
        data["demo_6"] = h5py.ExternalLink("gone.h5x", "/data/demo_0")
        data["demo_7"] = h5py.ExternalLink(b, "/data/demo_9")
        data["demo_8"] = h5py.SoftLink("/data/demo_8")
        data["demo_9"] = h5py.SoftLink("/data/demo_3")
        write_demo(data.create_group("demo_10"), 50)
    monkeypatch.chdir(tmp_path / "parts")  # a link is relative to its file
    for path in (tmp_path / "merged.hdf5", os.path.relpath(tmp_path / "merged.hdf5")):
        episodes = pickle.loads(pickle.dumps(open_it(path)))
        assert [e.id for e in (episodes[0], episodes[10])] == ["merged/demo_0", "merged/demo_10"]
        found = [base_of(episodes[i]) for i in (0, 1, 2, 3, 4, 5, 9, 10)]
        assert found == [[n, n] for n in (10, 20, 30, 100, 110, 120, 100, 50)]
        for number, where in {
            6: "in the file gone.h5x",
            7: "/data/demo_9",
            8: "/data/demo_8",
        }.items():
            with pytest.raises(ValueError, match=f"demo_{number}: its link, to .*{where}.*nowhere"):
                episodes[number]
    assert episodes[3].instructions == ("put it away",)  # the real file's name
    twice = {i for i in (0, 1, 2, 3, 4, 5, 9, 10) if "same group" in " ".join(episodes[i].findings)}
    assert twice == {3, 9}


def test_a_link_to_all_demonstrations_is_followed_or_named(tmp_path):
    write(tmp_path / "a.h5x", {"demo_0": 10, "demo_1": 20})
    for name, target in {"whole": "a.h5x", "gone": "gone.h5x"}.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["data"] = h5py.ExternalLink(target, "/data")
    with h5py.File(tmp_path / "part.hdf5", "w") as file:
        write_demo(file.create_group("data/demo_0"), 10)
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = h5py.ExternalLink("gone.h5x", "/actions")
    episodes = open_it(tmp_path)
    assert [base_of(episodes[i]) for i in (2, 3)] == [[10, 10], [20, 20]]
    for number, said in enumerate(("gone.hdf5: data: its link", "demo_0: actions: its link")):
        with pytest.raises(ValueError, match=f"{said}, .* leads nowhere"):
            episodes[number]


def test_one_demonstration_in_two_files_of_a_folder_is_a_finding(tmp_path):
    write(tmp_path / "a.hdf5", {"demo_0": 10, "demo_1": 20})
    with h5py.File(tmp_path / "some.hdf5", "w") as file:
        file["data/demo_0"] = h5py.ExternalLink("a.hdf5", "/data/demo_1")
    episodes = open_it(tmp_path)
    assert [(e.id, len(e.findings)) for e in episodes] == [
        ("a/demo_0", 0),
        ("a/demo_1", 1),
        ("some/demo_0", 1),
    ]


def test_links_in_a_demonstration_are_followed_or_named(tmp_path):
    path = write(tmp_path / "a.hdf5", {"demo_0": 10, "demo_1": 20})
    with h5py.File(tmp_path / "side.h5x", "w") as file:
        file["data/demo_0/obs/far"] = clip(70)
        file["numbers"] = np.arange(2 * STEPS)[:, None]
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        demo["obs/far"] = h5py.ExternalLink("side.h5x", "/data/demo_0/obs/far")
        demo["obs/near"] = h5py.SoftLink("/data/demo_1/obs/rgb")
        demo["obs/lost"] = h5py.ExternalLink("gone.h5x", "/x")
        demo["obs/loop"] = h5py.SoftLink("/data/demo_0/obs/loop")
        demo["obs/around"] = demo  # a group within itself
        demo["obs/references"] = np.array([demo.ref] * STEPS, h5py.ref_dtype)
        layout = h5py.VirtualLayout((STEPS, 1), "i8")
        for i in range(STEPS):
            layout[i] = h5py.VirtualSource("side.h5x", "numbers", (2 * STEPS, 1))[2 * i]
        demo.create_virtual_dataset("every_other", layout)
        for name, source, length in (("no_file", "gone.h5x", STEPS), ("part", "side.h5x", 3)):
            layout = h5py.VirtualLayout((STEPS, 1), "i8")
            layout[:length] = h5py.VirtualSource(source, "numbers", (2 * STEPS, 1))[:length]
            demo.create_virtual_dataset(name, layout, fillvalue=7)
        layout = h5py.VirtualLayout((STEPS, 1), "i8")  # the source was longer once
        layout[:] = h5py.VirtualSource("side.h5x", "numbers", (99, 1))[90 : 90 + STEPS]
        demo.create_virtual_dataset("short", layout)
        raw = str(tmp_path / "raw.bin")
        demo.create_dataset("outside", (STEPS,), "u1", external=[(raw, 0, STEPS)])
    episode = open_it(path)[0]
    assert base_of(episode) == [10, 10]
    for key, level in {"obs/far": 70, "obs/near": 20}.items():
        assert episode.streams[key].values.read([1])[0, 0, 0, 0] == level + 1
    assert episode.streams["every_other"].values.ravel().tolist() == [0, 2, 4, 6, 8]
    reasons = {
        "obs/lost": "its link, to /x in the file gone.h5x, leads nowhere",
        "obs/loop": "its link, to /data/demo_0/obs/loop, leads nowhere",
        "obs/around": "leads back to a group around it",
        "obs/references": "references",
        "no_file": "its part numbers in the file gone.h5x cannot be read",
        "part": "whose parts do not fill it",
        "short": "its part numbers in the file side.h5x is too short",
        "outside": "outside of the HDF5 file",
    }
    assert episode.left_out.keys() == reasons.keys()
    assert all(said in episode.left_out[key] for key, said in reasons.items())


def encoded(frames, kind: str) -> list[bytes]:
    files = []
    for frame in frames:
        Image.fromarray(frame).save(file := io.BytesIO(), kind, quality=95)
        files.append(file.getvalue())
    return files


def test_every_kind_of_camera_is_read_or_named(tmp_path):
    frames = clip(40)
    jpegs, pngs, webps = (encoded(frames, kind) for kind in ("jpeg", "png", "webp"))
    longest = max(map(len, jpegs))
    deep = encoded(np.full((STEPS, 16, 24), 900, np.uint16), "png")
    rgba = np.concatenate([frames, np.full((STEPS, 16, 24, 1), 255, np.uint8)], -1)
    grey = frames[..., 0]
    path = write(tmp_path / "a.hdf5", {"demo_0": 40})
    with h5py.File(path, "a") as file:
        obs = file["data/demo_0/obs"]
        for name, files in {"jpeg_ragged": jpegs, "png_ragged": pngs, "depth_png": deep}.items():
            array = obs.create_dataset(name, (STEPS,), h5py.vlen_dtype(np.uint8))
            for i, content in enumerate(files):
                array[i] = np.frombuffer(content, np.uint8)
        obs["jpeg_fixed"] = np.array(jpegs, f"S{longest}")  # RoboTwin
        padded = [np.frombuffer(f.ljust(longest, b"\0"), np.uint8) for f in jpegs]  # ALOHA
        obs["jpeg_padded"] = np.stack(padded)
        obs["jpeg_opaque"] = np.array([np.void(f.ljust(longest, b"\0")) for f in jpegs])
        longest = max(map(len, webps))
        obs["webp_fixed"] = np.array(webps, f"S{longest}")
        obs["webp_padded"] = [np.frombuffer(f.ljust(longest, b"\0"), np.uint8) for f in webps]
        obs["rgba"], obs["rgba_chw"] = rgba, np.moveaxis(rgba, -1, 1)
        obs["chw"] = np.moveaxis(frames, -1, 1)
        obs["grey"], obs["grey_1"], obs["grey_1hw"] = grey, grey[..., None], grey[:, None]
        obs["floats"] = frames / np.float32(255)
        obs["depth"] = np.zeros((STEPS, 16, 24, 1), np.float32)
        obs["depth_map"] = np.zeros((STEPS, 64, 80), np.uint16)
        obs["doubt"] = np.zeros((STEPS, 4, 16, 4), np.uint8)
        empty = obs.create_dataset("empty", (STEPS,), h5py.vlen_dtype(np.uint8))
        empty[1] = np.frombuffer(jpegs[1], np.uint8)
        padded[0] = np.zeros_like(padded[0])
        obs["empty_padded"] = np.stack(padded)
        obs["notes"] = ["a"] * STEPS
        obs["words"] = np.array([b"ab"] * STEPS)
        obs["complex"] = np.ones(STEPS) * 1j
        obs["table"] = np.zeros(STEPS, [("a", "f4"), ("b", "i4")])
        obs["touch"] = np.arange(STEPS * 12, dtype=np.uint8).reshape(STEPS, 3, 4)
        obs["one"], obs["scalar"], obs["none"] = [1.0], 3.0, h5py.Empty("f4")
        obs["one_more"] = np.zeros((STEPS + 1, 3))
        file["data/demo_0/next_obs/rgb"] = frames
    episode = open_it(path)[0]
    exact = {"rgb", "rgba", "rgba_chw", "chw", "png_ragged"}
    greys = {"grey", "grey_1", "grey_1hw"}
    lossy = {"jpeg_ragged", "jpeg_fixed", "jpeg_padded", "jpeg_opaque"}
    lossy |= {"webp_fixed", "webp_padded"}
    assert set(episode.cameras) == {f"obs/{name}" for name in exact | greys | lossy}
    chosen = [4, 0, 4]
    for name in exact | greys | lossy:
        found = episode.streams[f"obs/{name}"].values.read(chosen)
        expected = np.repeat(grey[..., None], 3, -1) if name in greys else frames
        assert found.dtype == np.uint8
        difference = np.abs(found.astype(int) - expected[chosen])
        assert difference.max() <= (0 if name not in lossy else 255)
        assert difference[:, :, :8].max() <= 8  # away from the edges between the colours
    assert set(episode.streams) == {"actions", "obs/touch", *episode.cameras}
    reasons = {
        "depth_png": "grey pictures of more than 8 bits",
        "floats": "float32 [16, 24, 3]: depth, or pictures whose range is not known",
        "depth": "float32 [16, 24, 1]: depth",
        "depth_map": "uint16 [64, 80]: a map, such as depth",
        "doubt": "it is not clear which axis holds the colours",
        "empty": "its first picture is empty",
        "empty_padded": "its first picture is empty",
        "notes": "text",
        "words": "text",
        "complex": "complex128, not numbers",
        "table": "compound values",
        "one": "it has one value, not one per action",
        "scalar": "a single value",
        "none": "a single value",
        "one_more": "one value more than there are actions",
    }
    assert episode.left_out.keys() == {f"obs/{n}" for n in reasons} | {"next_obs/rgb"}
    for name, said in reasons.items():
        assert said in episode.left_out[f"obs/{name}"]


def test_cameras_are_turned_and_their_channels_swapped_as_asked_for(tmp_path):
    """OpenCV's imencode takes an array for BGR: a JPEG of RGB pictures has its colours swapped."""
    frames = clip(40)
    path = write(tmp_path / "a.hdf5", {"demo_0": 40})
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/swapped"] = np.array(encoded(frames[..., ::-1], "png"), "S")
    read = open_it(path, channels="bgr", flip="vertical")[0].streams["obs/swapped"].values
    np.testing.assert_array_equal(read.read([2]), frames[[2], ::-1])
    with pytest.raises(ValueError, match="channels 'rbg'"):
        open_it(path, channels="rbg")


def test_a_missing_filter_and_a_damaged_chunk_cost_their_array(tmp_path):
    path = write(tmp_path / "a.hdf5", {"demo_0": 40})
    with h5py.File(path, "a") as file:
        rng = np.random.default_rng(0)
        values = rng.normal(size=(STEPS, 400))
        array = file.create_dataset(
            "data/demo_0/noise", data=values, chunks=(STEPS, 400), compression="gzip"
        )
        place = array.id.get_chunk_info(0)
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_chunk((STEPS,))
        create.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)  # blosc
        space, demo = h5py.h5s.create_simple((STEPS,)), file["data/demo_0"]
        h5py.h5d.create(demo.id, b"packed", h5py.h5t.NATIVE_INT32, space, create)
    content = bytearray(path.read_bytes())
    content[place.byte_offset + 50 : place.byte_offset + 90] = bytes(40)
    path.write_bytes(content)
    episode = open_it(path)[0]
    assert base_of(episode) == [40, 40] and episode.left_out.keys() == {"noise", "packed"}
    assert "cannot be read" in episode.left_out["noise"]
    assert "filter that is not installed" in episode.left_out["packed"]


def test_what_was_never_written_is_no_zeros(tmp_path):
    """Writers that allocate the longest episode first, and are stopped before it is full."""
    path = write(tmp_path / "a.hdf5", {"demo_0": 40, "demo_1": 60})
    with h5py.File(path, "a") as file:
        obs = file["data/demo_0/obs"]
        late = obs.create_dataset("late", (STEPS, 16, 24, 3), "u1", chunks=(1, 16, 24, 3))
        late[: STEPS - 2] = 9
        obs.create_dataset("never", (STEPS, 3), "f4")
        obs.create_dataset("zeros", data=np.zeros((STEPS, 3)), chunks=(1, 3), compression="gzip")
        del file["data/demo_1/actions"]
        file.create_dataset("data/demo_1/actions", (STEPS, 7), "f4", chunks=(2, 7))[:2] = 1
    first, second = open_it(path)
    assert first.left_out.keys() == {"obs/late", "obs/never"}
    for name, part in {"obs/late": f"2 of its {STEPS} chunks", "obs/never": "all of it"}.items():
        assert f"its writer left out {part}, where HDF5 would read 0" in first.left_out[name]
    assert "left out 2 of its 3 chunks" in second.left_out["actions"]


def test_a_file_that_is_being_written_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.hdf5"
    code = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'w', libver='latest'); f['data'] = 1; "
    code += "f.flush(); print(1, flush=True); sys.stdin.read(1); os._exit(0)"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as writer:
        writer.stdout.readline()
        with pytest.raises(ValueError, match=r"unable to lock.* HDF5_USE_FILE_LOCKING=FALSE"):
            open_it(path)
        writer.communicate(b"x")
    with pytest.raises(ValueError, match=r"did not close it: wait, or run h5clear"):
        open_it(path)


def rate(path, **options):
    return 1e9 / open_it(path, fps=None, **options)[0].streams["actions"].timestamps[1]


def test_the_rate_is_what_the_file_says_or_is_asked_for(tmp_path):
    def args(**content):
        return write(tmp_path / "a.hdf5", {"demo_0": 1}, env_args=json.dumps(content))

    isaac = {"type": 2, "sim_args": {"dt": 0.01, "decimation": 5, "num_envs": 1}}
    assert rate(args(**isaac)) == pytest.approx(20, rel=1e-6)
    assert rate(args(type=2, sim_args={"dt": 1 / 60, "decimation": 2})) == pytest.approx(
        30, rel=1e-6
    )
    assert rate(args(type=1, env_kwargs={"control_freq": 15})) == pytest.approx(15, rel=1e-6)
    assert rate(args(type=1, env_kwargs={})) == 20  # robosuite's own
    path = write(tmp_path / "raw.hdf5", {"demo_1": 1}, env="Lift", repository_version="1.4")
    assert rate(path) == 20  # as robosuite's own script writes
    array = np.array([json.dumps({"type": 1, "env_kwargs": {"control_freq": 15}})], object)
    assert rate(write(tmp_path / "b.hdf5", {"demo_1": 1}, env_args=array)) == pytest.approx(15)
    info = json.dumps({"env_name": "Lift", "control_freq": 10})
    path = write(
        tmp_path / "raw.hdf5", {"demo_1": 1}, env="Lift", repository_version="1.4", env_info=info
    )
    assert rate(path) == 10
    for unknown in (
        {"type": 2},
        {"type": 1, "env_kwargs": '{"control_freq": 15}'},  # JSON in JSON
        {"type": 2, "sim_args": {"dt": 0.01}},
        {"type": 3, "env_kwargs": {}},
    ):
        why = open_it(args(**unknown), fps=None)[0].unknown_rate
        assert re.search(r"a\.hdf5 does not say .*options\.fps", why)
    assert open_it(write(tmp_path / "bare.hdf5", {"demo_0": 1}), fps=None)[0].unknown_rate
    for wrong in ({"dt": 0, "decimation": 5}, {"dt": "fast", "decimation": 5}):
        with pytest.raises(ValueError, match=r"dt is .*; set the option fps"):
            rate(args(sim_args=wrong))
    both = args(**isaac, env_kwargs={"control_freq": 15})
    with pytest.raises(ValueError, match=r"rates disagree, .*control_freq.* 15.*; set the option"):
        rate(both)
    assert open_it(both)[0].streams["actions"].timestamps[1] == 100_000_000


def test_times_in_a_file_that_are_not_those_of_its_rate_are_a_finding(tmp_path):
    path = write(tmp_path / "a.hdf5", {"demo_0": 1}, fps=10)
    assert rate(path) == 10
    times = 1.7e9 + np.arange(STEPS) / 10
    for values, options, said in (
        (times, {}, ""),
        (1e3 * times, {}, ""),
        (np.round(1e9 * times).astype(np.int64), {}, ""),
        (times + 3 * (np.arange(STEPS) > 2), {}, "obs/timestamp has pauses"),
        (times, {"fps": 20}, "obs/timestamp says another rate than 20 steps per second"),
        (np.zeros(STEPS), {}, ""),
    ):
        with h5py.File(path, "a") as file:
            file.pop("data/demo_0/obs/timestamp", None)
            file["data/demo_0/obs/timestamp"] = values
        findings = open_it(path, **{"fps": None} | options)[0].findings
        assert len(findings) == bool(said) and "".join(findings).startswith(said)
    with h5py.File(path, "a") as file:
        file["data/demo_0/is_pad"] = np.arange(STEPS) > 3
        file["data/demo_0/valid"] = np.ones(STEPS)
    (finding,) = open_it(path)[0].findings
    assert finding.startswith("is_pad tells some steps from others, perhaps as padding")


def test_a_linked_demonstration_has_the_rate_and_text_of_its_own_file(tmp_path):
    def about(rate, text):
        problem = {"language_instruction": text}
        kwargs = {"env_kwargs": {"control_freq": rate}}
        return {"env_args": json.dumps(kwargs), "problem_info": json.dumps(problem)}

    write(tmp_path / "a.h5x", {"demo_0": 1}, **about(10, "open"))
    write(tmp_path / "b.h5x", {"demo_0": 1}, **about(30, "shut"))
    for name, attributes in {"all": {}, "copied": about(10, "open")}.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs.update(attributes)  # tools that merge copy the first file's
            data["demo_0"] = h5py.ExternalLink("a.h5x", "/data/demo_0")
            data["demo_1"] = h5py.ExternalLink("b.h5x", "/data/demo_0")
    one, two = open_it(tmp_path / "all.hdf5", fps=None)
    assert (one.instructions, two.instructions) == (("open",), ("shut",))
    assert two.streams["actions"].timestamps[1] == 33_333_333
    episodes = open_it(tmp_path / "copied.hdf5", fps=None)
    assert not episodes[0].findings
    with pytest.raises(ValueError, match="the rates disagree"):
        episodes[1]
    episode = open_it(tmp_path / "copied.hdf5")[1]
    assert episode.instructions == ("shut",) and "problem_info" in episode.findings[0]


def test_instructions_of_every_kind(tmp_path):
    def read(path):
        episode = open_it(path)[0]
        return episode.instructions, [(s.start, s.instructions) for s in episode.sections]

    for stated, expected in {
        ("open it", "pull the handle"): ("open it", "pull the handle"),
        tuple("open it"): ("open it",),
        ("open",): ("open",),
        ("open", 5): ("",),
    }.items():
        problem = json.dumps({"language_instruction": list(stated)})
        assert read(write(tmp_path / "a.hdf5", {"demo_0": 1}, problem_info=problem))[0] == expected
    path = write(tmp_path / "a.hdf5", {"demo_0": 1}, problem_info=problem)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["ep_meta"] = json.dumps({"lang": "pour"})
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open"})
    assert read(path)[0] == ("pour",)
    assert "ep_meta is taken" in open_it(path)[0].findings[0]
    with h5py.File(path, "a") as file:
        file["data/demo_0/language_instruction"] = ["pour"] * 2 + ["wipe"] * (STEPS - 2)
    assert read(path) == (("pour", "wipe"), [(0, ("pour",)), (200_000_000, ("wipe",))])


def test_what_is_declared_and_what_is_there(tmp_path):
    path = write(tmp_path / "a.hdf5", {f"demo_{i}": 10 + i for i in range(5)} | {"episode_07": 90})
    with h5py.File(path, "a") as file:
        for i, declared in enumerate((5.0, np.array([5]), b"5", "five", 6)):
            file[f"data/demo_{i}"].attrs["num_samples"] = declared
        file["data/notes/a"] = 3
    episodes = open_it(path)
    assert len(episodes) == 6 and base_of(episodes[5]) == [90, 90]
    assert [base_of(episodes[i])[0] for i in range(4)] == [10, 11, 12, 13]
    assert [len(episodes[i].findings) for i in range(4)] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="demo_4 should have 6 samples but has 5 actions"):
        episodes[4]


def test_files_of_one_episode_are_read(tmp_path):
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:  # ALOHA, compressed
        file.attrs.update(sim=False, compress=True)
        file["action"] = file["observations/qpos"] = np.arange(STEPS * 14.0).reshape(STEPS, 14)
        files = encoded(clip(40), "png")
        longest = max(map(len, files))
        padded = [np.frombuffer(f.ljust(longest, b"\0"), np.uint8) for f in files]
        file["observations/images/cam_high"] = np.stack(padded)
        file["compress_len"] = np.full((1, STEPS), longest)
        file["language_raw"] = [b"fold it"]
    with h5py.File(tmp_path / "episode0.hdf5", "w") as file:  # RoboTwin
        file["joint_action/vector"] = np.zeros((STEPS, 14))
        file["endpose/left_endpose"] = np.zeros((STEPS, 7))
        camera = file.create_group("observation/head_camera")
        camera["rgb"] = np.array(encoded(clip(60)[..., ::-1], "png"), "S")
        camera["intrinsic_cv"] = np.zeros((STEPS, 3, 3))
        file["pointcloud"] = np.zeros((STEPS, 0))
    assert detect(tmp_path) == detect(tmp_path / "episode0.hdf5") == "robomimic_hdf5"
    assert all("does not say how many" in e.unknown_rate for e in open_it(tmp_path, fps=None))
    robotwin = open_it(tmp_path / "episode0.hdf5", channels="bgr")[0]
    assert robotwin.id == "episode0" and robotwin.cameras == ("observation/head_camera/rgb",)
    assert {"joint_action/vector", "endpose/left_endpose"} < robotwin.streams.keys()
    found = robotwin.streams["observation/head_camera/rgb"].values.read([1])
    np.testing.assert_array_equal(found, clip(60)[[1]])
    aloha = open_it(tmp_path)[1]
    assert (aloha.id, aloha.instructions) == ("episode_0", ("fold it",))
    assert aloha.cameras == ("observations/images/cam_high",)
    np.testing.assert_array_equal(aloha.streams[aloha.cameras[0]].values.read([3]), clip(40)[[3]])
    assert aloha.streams["observations/qpos"].values[1, 0] == 14
    assert set(aloha.left_out) == {"compress_len"}


def test_other_layouts_are_told_what_they_are(tmp_path):
    layouts = {
        "traj_0/actions": "a trajectory file of ManiSkill",
        "observation/timestamp/robot;action/cartesian_position": "a raw trajectory of DROID",
        "transforms/camera": "a pose file of EgoDex",
        "rgb;state": "but rgb, state",
    }
    for keys, said in layouts.items():
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            for key in keys.split(";"):
                file[key] = np.zeros((3, 2))
        for path in (tmp_path, tmp_path / "a.hdf5"):
            with pytest.raises(ValueError, match=rf"a\.hdf5 has no demonstrations.*{said}"):
                detect(path)
    (tmp_path / "a.hdf5").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"a\.hdf5: it is a placeholder of Git LFS"):
        detect(tmp_path / "a.hdf5")
