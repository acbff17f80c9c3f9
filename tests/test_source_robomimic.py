import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from data_pipelines.episode import FrameReader
from data_pipelines.sources.robomimic import open_robomimic_hdf5, recognises
from data_pipelines.writers import Demonstration, Scene, write_hdf5

LENGTHS = (6, 5, 9, 4, 7, 5, 6, 8, 5, 4, 6)  # demo_10 sorts before demo_2 as a string
TASK = "put_the_black_bowl_on_the_plate"
STEP_NS = 50_000_000


def arrays(demo: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(demo)
    n = LENGTHS[demo]
    return {
        "actions": rng.normal(size=(n, 7)),
        "states": rng.normal(size=(n, 45)),
        "robot_states": rng.normal(size=(n, 9)),
        "obs/ee_pos": rng.normal(size=(n, 3)),
        "obs/gripper_states": rng.normal(size=(n, 2)).astype(np.float32),
        "obs/agentview_rgb": rng.integers(0, 256, (n, 8, 10, 3), np.uint8),
        "obs/eye_in_hand_rgb": rng.integers(0, 256, (n, 8, 8, 3), np.uint8),
    }


def write_libero(path, task=TASK, demos=range(3), **attributes):
    """As LIBERO's create_dataset.py lays its files out, with h5py alone."""
    path = path / f"{task}_demo.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        problem = {"language_instruction": task.replace("_", " ")}
        data.attrs["problem_info"] = json.dumps(problem)
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"] = len(demos)
        data.attrs.update(attributes)
        for demo in demos:
            group = data.create_group(f"demo_{demo}")
            for key, array in arrays(demo).items():
                group.create_dataset(key, data=array)
            last = np.zeros(LENGTHS[demo], np.uint8)
            last[-1] = 1
            group["rewards"] = group["dones"] = last
            group.attrs["num_samples"] = str(LENGTHS[demo])
            group.attrs["init_state"] = group["states"][0]
            group.attrs["model_file"] = "<mujoco/>"
    return path


def open_it(path, **options):
    return open_robomimic_hdf5(path, name="libero", embodiment="panda", **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    suite = tmp_path_factory.mktemp("libero") / "libero_spatial"
    return write_libero(suite, demos=range(len(LENGTHS)))


def test_a_file_as_libero_writes_it_is_read_exactly(file):
    assert recognises(file) and recognises(file.parent) and recognises(file.parent.parent)
    episodes = open_it(file)
    assert [e.id for e in episodes] == [f"{TASK}_demo/demo_{i}" for i in range(len(LENGTHS))]
    for number in (10, 2, 0):
        episode = episodes[number]
        assert (episode.source, episode.embodiment) == ("libero", "panda")
        assert episode.instructions == ("put the black bowl on the plate",)
        assert episode.cameras == ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
        assert set(episode.streams) == {*arrays(number), "rewards", "dones"}
        times = np.arange(LENGTHS[number]) * STEP_NS
        for key, expected in arrays(number).items():
            stream = episode.streams[key]
            np.testing.assert_array_equal(stream.timestamps, times)
            if key in episode.cameras:
                assert isinstance(stream.values, FrameReader)
                chosen = [3, 0, 3, LENGTHS[number] - 1]
                np.testing.assert_array_equal(stream.values.read(chosen), expected[chosen])
            else:
                assert stream.values.dtype == expected.dtype
                np.testing.assert_array_equal(stream.values, expected)
        assert episode.streams["rewards"].values.tolist() == [0] * (LENGTHS[number] - 1) + [1]
    with pytest.raises(IndexError, match="frame 99 asked for, but there are 6"):
        episodes[0].streams["obs/agentview_rgb"].values.read([99])


def test_pictures_are_turned_as_asked_for(file):
    stored = arrays(1)["obs/agentview_rgb"]
    turned = {"vertical": stored[:, ::-1], "rotate": stored[:, ::-1, ::-1]}
    for flip, expected in turned.items():
        frames = open_it(file, flip=flip)[1].streams["obs/agentview_rgb"].values.read([4, 1])
        np.testing.assert_array_equal(frames, expected[[4, 1]])
    with pytest.raises(ValueError, match="flip is 'upside_down'"):
        open_it(file, flip="upside_down")


def test_pictures_that_are_upside_down_are_a_finding(tmp_path):
    for convention, flip in (("opengl", "none"), ("opencv", "vertical")):
        path = write_libero(tmp_path, macros_image_convention=convention)
        (finding,) = open_it(path, flip=flip)[0].findings
        assert f"is {convention} and the option flip {flip}" in finding
        other = "none" if flip == "vertical" else "rotate"
        assert open_it(path, flip=other)[0].findings == ()


def test_the_rate_is_the_files_unless_it_is_given(tmp_path):
    def rate(path, **options):
        return 1e9 / open_it(path, **options)[0].streams["actions"].timestamps[1]

    slow = json.dumps({"env_kwargs": {"control_freq": 10}})
    assert rate(write_libero(tmp_path / "slow", env_args=slow)) == 10
    assert rate(write_libero(tmp_path / "none", env_args="{}")) == 20
    assert rate(write_libero(tmp_path / "over", env_args=slow), fps=30) == pytest.approx(30)
    assert rate(write_libero(tmp_path / "odd", env_args='{"env_kwargs": 5}')) == 20
    for wrong in (-5, "fast"):
        args = json.dumps({"env_kwargs": {"control_freq": wrong}})
        with pytest.raises(
            ValueError, match=rf"_demo\.hdf5: control_freq is {wrong!r}.*option fps"
        ):
            rate(write_libero(tmp_path / f"wrong {wrong}", env_args=args))


def test_the_instruction_is_the_files_or_the_names(tmp_path):
    def instruction(path, **options):
        return open_it(path, **options)[0].instructions

    scene = "KITCHEN_SCENE10_close_the_top_drawer"
    nothing = write_libero(tmp_path, scene, problem_info="{}")
    assert instruction(nothing) == ("close the top drawer",)
    spelt = json.dumps({"language_instruction": list('"close it"')})
    assert instruction(write_libero(tmp_path / "a", scene, problem_info=spelt)) == ("close it",)
    number = write_libero(tmp_path / "n", scene, problem_info='{"language_instruction": 5}')
    assert instruction(number) == ("close the top drawer",)
    named = write_libero(tmp_path / "b")
    assert instruction(named, instruction_style="release") == ("put the bowl on the plate.",)
    assert instruction(named, instruction="lift") == ("lift",)
    plain = nothing.with_name("low_dim.hdf5")
    nothing.rename(plain)
    assert instruction(plain) == ("",)
    with h5py.File(plain, "a") as file:
        file["data/demo_0"].attrs["ep_meta"] = json.dumps({"lang": "open the door"})
    assert instruction(plain) == ("open the door",)
    with pytest.raises(ValueError, match="instruction_style 'nice'"):
        open_it(plain, instruction_style="nice")


def test_a_failed_demonstration_is_said_to_be_one(tmp_path):
    path = write_libero(tmp_path)
    with h5py.File(path, "a") as file:
        for demo, success in (("demo_1", True), ("demo_2", False)):
            file[f"data/{demo}"].attrs["success"] = success
    found = [episode.findings for episode in open_it(path, flip="rotate")]
    assert found[:2] == [(), ()] and "`success` is false" in found[2][0]


def test_text_in_another_encoding_is_refused(tmp_path):
    raw = '{"language_instruction": "schließe"}'.encode("latin-1")
    path = write_libero(tmp_path, problem_info=np.bytes_(raw))
    with pytest.raises(ValueError, match=r"_demo\.hdf5.*UTF-8"):
        open_it(path)[0]


def test_masks_choose_demonstrations(tmp_path):
    path = write_libero(tmp_path, demos=range(len(LENGTHS)))
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_10", b"demo_2"])
        file["mask/old"] = np.array([b"demo_77"])
    ids = [e.id.rpartition("/")[2] for e in open_it(path, mask="train")]
    assert ids == ["demo_2", "demo_10"]
    with pytest.raises(ValueError, match=r"no mask 'test'; its masks are \['old', 'train'\]"):
        open_it(path, mask="test")
    with pytest.raises(ValueError, match="'old' lists demo_77, which is missing"):
        open_it(path, mask="old")


def test_a_broken_file_costs_only_its_own_episodes(tmp_path):
    whole = write_libero(tmp_path / "goal", "open_it")
    write_libero(tmp_path, "close_it")
    assert [e.id for e in open_it(tmp_path)][:1] == ["close_it_demo/demo_0"]
    expected = [f"{t}_demo/demo_{i}" for t in ("close_it", "goal/open_it") for i in range(3)]
    assert [e.id for e in open_it(tmp_path)] == expected

    (tmp_path / "broken_demo.hdf5").write_bytes(whole.read_bytes()[:5000])
    episodes = open_it(tmp_path)
    assert len(episodes) == 7
    with pytest.raises(ValueError, match=r"broken_demo\.hdf5: not a readable HDF5 file .*trunc"):
        episodes[0]
    assert [episodes[i].id for i in range(1, 7)] == expected
    with pytest.raises(ValueError, match=r"broken_demo\.hdf5: not a readable"):
        open_it(tmp_path / "broken_demo.hdf5")
    whole.unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        pickle.loads(pickle.dumps(episodes))[5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.__delitem__("actions"), "demo_1 has no array `actions`"),
        (lambda d: d.attrs.__setitem__("num_samples", 50), "should have 50 samples but has 5"),
        (lambda d: d.pop("actions") and d.create_dataset("actions", (0, 7), "f8"), "is empty"),
        (
            lambda d: d.file.pop(d.name) and d.file.create_dataset("data/demo_1", 3, "f4"),
            "a group",
        ),
    ],
    ids=["no actions", "cut off", "empty", "an array"],
)
def test_a_demonstration_that_contradicts_itself_is_named(tmp_path, damage, message):
    path = write_libero(tmp_path)
    with h5py.File(path, "a") as file:
        damage(file["data/demo_1"])
    episodes = open_it(path)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        episodes[1]
    assert len(episodes[0].streams["actions"].values) == 6 and episodes[2]


def test_other_hdf5_files_are_not_taken_for_demonstrations(tmp_path):
    with h5py.File(tmp_path / "0.hdf5", "w") as file:
        file["transforms/camera"] = np.zeros((3, 4, 4))  # EgoDex
    assert not recognises(tmp_path) and not recognises(tmp_path / "0.hdf5")
    with pytest.raises(ValueError, match="it has no group `data`"):
        open_it(tmp_path)
    for key, said in {"data": "it has an array `data`", "data/demo_0/action": "but action"}.items():
        with h5py.File(tmp_path / "0.hdf5", "w") as file:
            file[key] = np.zeros((3, 4))
        with pytest.raises(ValueError, match=said):
            open_it(tmp_path)[0]
    (tmp_path / "empty").mkdir()
    assert not recognises(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no \.hdf5 or \.h5 file"):
        open_it(tmp_path / "empty")


def test_an_opened_dataset_can_be_sent_away_and_shared_by_threads(file):
    episodes = pickle.loads(pickle.dumps(open_it(file, flip="rotate")))

    def check(i):
        number = i % len(LENGTHS)
        frames = episodes[number].streams["obs/agentview_rgb"].values
        frames = pickle.loads(pickle.dumps(frames)) if i % 3 == 0 else frames
        expected = arrays(number)["obs/agentview_rgb"][:, ::-1, ::-1]
        return np.array_equal(frames.read([2, 0]), expected[[2, 0]])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(60)))


def demonstrations(count=3):
    for demo in range(count):
        values = arrays(demo)
        yield Demonstration(
            actions=values["actions"],
            states=values["states"],
            robot_states=values["robot_states"],
            observations={k[4:]: v for k, v in values.items() if k.startswith("obs/")},
            model_file="<mujoco/>",
        )


SCENE = Scene("open the drawer", "Libero_Kitchen", bddl_file="libero_goal/a.bddl", control_freq=10)


def test_written_demonstrations_are_read_back_and_laid_out_as_libero_does(tmp_path):
    path = tmp_path / "goal" / "open_the_drawer_demo.hdf5"
    assert write_hdf5(path, demonstrations(), SCENE) == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for number, episode in enumerate(open_it(path)):
        assert episode.instructions == ("open the drawer",)
        assert episode.streams["actions"].timestamps[1] == 100_000_000
        for key, expected in arrays(number).items():
            values = episode.streams[key].values
            values = values.read(range(len(values))) if key in episode.cameras else values
            assert values.dtype == expected.dtype
            np.testing.assert_array_equal(values, expected)

    # What robomimic's SequenceDataset and LIBERO's get_dataset_info.py look at.
    with h5py.File(path) as file, h5py.File(write_libero(tmp_path)) as libero:
        data = file["data"]
        demos = sorted(data, key=lambda name: int(name[5:]))
        assert [int(data[d].attrs["num_samples"]) for d in demos] == [6, 5, 9]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (3, 20)
        env = json.loads(data.attrs["env_args"])
        assert (env["type"], env["env_name"]) == (1, "Libero_Kitchen")
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == "open the drawer"
        names: list[str] = []
        libero["data/demo_0"].visit(names.append)
        for name in names:
            ours, theirs = data["demo_0"][name], libero["data/demo_0"][name]
            assert isinstance(theirs, h5py.Group) or (ours.dtype, ours.shape) == (
                theirs.dtype,
                theirs.shape,
            )
        np.testing.assert_array_equal(data["demo_2"].attrs["init_state"], arrays(2)["states"][0])


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a_demo.hdf5"
    write_hdf5(path, demonstrations(2), SCENE)

    def stopped():
        yield from demonstrations(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hdf5(path, stopped(), SCENE)
    assert [p.name for p in tmp_path.iterdir()] == ["a_demo.hdf5"]
    assert len(open_it(path)) == 2
    with pytest.raises(ValueError, match="no demonstrations"):
        write_hdf5(path, [], SCENE)
    with pytest.raises(ValueError, match=r"6 actions and .*'ee_pos': 2"):
        Demonstration(np.zeros((6, 7)), {"ee_pos": np.zeros((2, 3))}, np.zeros((6, 4)))
    with pytest.raises(ValueError, match=r"image_convention.*'upright'"):
        Scene("a", "b", image_convention="upright")
