"""What a person sees who converts something that cannot be converted; nothing is left half done."""

import atexit
import json
import math
import os
import pickle
import resource
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from published import CONFIGS, prefixed, published_shapes, random_tensors, tensor, write_published
from test_convert import lora_tensors, released_statistics

from data_pipelines.normalize import released_normalizer
from mvjax.weights.convert import prepare, write
from mvjax.weights.files import TorchTensor
from mvjax.weights.kinds import ACTION, TEXT, VAE, VIDEO, Hints
from mvjax.weights.pt_files import write_pt
from mvjax.weights.source import open_source, open_weights

ROOT = Path(__file__).parent.parent
ROPE = "--rope_ratio_thw=1,3,3"
HINTS = Hints(rope_ratio_thw=(1.0, 3.0, 3.0))


@pytest.fixture
def convert(command):
    """Runs the command, which must work; gives what it prints."""

    def run(*arguments) -> str:
        said = command("launch.convert", *arguments)
        assert said.code == 0, said.err
        return said.out

    return run


def refused(source: Path, destination: Path) -> str:
    """What converting raises; asserts that nothing is left of it."""
    with pytest.raises((ValueError, OSError)) as error:
        write(prepare(open_source(source, HINTS)), destination)
    assert not destination.exists() and not any(destination.parent.iterdir())
    return str(error.value)


@pytest.fixture
def folders(tmp_path):
    """(where sources lie, where results go)."""
    results = tmp_path / "results"
    results.mkdir()
    return tmp_path, results


def test_everything_that_does_not_fit_is_listed_at_once(folders):
    here, out = folders
    tensors = random_tensors(VIDEO, "nvidia")
    for block in (0, 1):
        del tensors[f"blocks.{block}.mlp.layer2.weight"]
    del tensors["final_layer.linear.weight"]
    tensors["blocks.1.extra.weight"] = tensor(np.zeros(3, np.float32))
    tensors["blocks.1.self_attn.q_proj.weight"] = tensor(np.zeros((48, 5), np.float32))
    tensors["t_embedder.1.linear_1.weight"] = tensor(np.zeros((48, 7), np.float32))
    source = write_published(here, VIDEO, "nvidia", tensors)
    said = refused(source, out / "x")
    for part in (
        "blocks.{0-1}.mlp.layer2.weight",
        "final_layer.linear.weight",
        "unknown: blocks.1.extra.weight",
        "blocks.1.self_attn.q_proj.weight is [48, 5] instead of [48, 48]",
        "t_embedder.1.linear_1.weight is [48, 7] instead of [48, 48]",
    ):
        assert part in said


@pytest.mark.parametrize("shape", [(48,), (4, 4, 3)])
def test_a_tensor_with_other_axes_is_named(folders, shape):
    """Sizes are read from it before shapes are compared."""
    here, out = folders
    tensors = random_tensors(VIDEO, "nvidia")
    tensors["x_embedder.proj.1.weight"] = tensor(np.zeros(shape, np.float32))
    source = write_published(here, VIDEO, "nvidia", tensors)
    assert f"misshapen: x_embedder.proj.1.weight is {list(shape)}" in refused(source, out / "x")


def test_a_tensor_that_is_not_finite_is_named(folders):
    here, out = folders
    for dtype in (np.float32, ml_dtypes.bfloat16):
        tensors = {
            n: tensor(t.read().astype(dtype)) for n, t in random_tensors(VIDEO, "nvidia").items()
        }
        values = tensors["blocks.1.mlp.layer1.weight"].read().copy()
        values[3, 4] = np.nan
        tensors["blocks.1.mlp.layer1.weight"] = tensor(values)
        folder = here / np.dtype(dtype).name
        folder.mkdir()
        source = write_published(folder, VIDEO, "nvidia", tensors)
        said = refused(source, out / "x")
        assert "blocks.1.mlp.layer1.weight holds 1 values that are not finite" in said


def test_a_truncated_file_is_said_to_be_cut_off(folders):
    here, out = folders
    source = write_published(here, VIDEO, "nvidia", random_tensors(VIDEO, "nvidia"))
    source.write_bytes(source.read_bytes()[:-2000])
    assert "is cut off" in refused(source, out / "x")


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_pickle_that_calls_something_is_not_run(folders):
    here, out = folders
    with zipfile.ZipFile(here / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"net.x_embedder.x": Attack()}, protocol=2))
        archive.writestr("evil/version", "3\n")
    said = refused(here / "evil.pt", out / "x")
    assert "would call posix.system; a weights file must hold only tensors" in said
    assert not (ROOT / "attacked").exists()


def test_things_of_another_kind(folders):
    here, out = folders
    (here / "notes.txt").write_text("hello")
    (here / "empty").mkdir()
    (here / "checkpoints" / "100" / "state").mkdir(parents=True)
    write_pt(here / "other.pt", {"layer.weight": tensor(np.zeros(3, np.float32))})
    for name, said in (
        ("notes.txt", "notes.txt"),
        ("empty", "empty"),
        ("absent.pt", "absent.pt"),
        ("other.pt", "holds no known network"),
        ("checkpoints", "inside a checkpoint of this project"),
    ):
        assert said in refused(here / name, out / "x")


def test_adapters_alone_are_not_weights(folders):
    here, out = folders
    name = "base_model.model.blocks.0.self_attn.q_proj.lora_A.weight"
    write_pt(here / "adapter_model.bin", {name: tensor(np.zeros((3, 4), np.float32))})
    assert "holds LoRA adapters" in refused(here / "adapter_model.bin", out / "x")
    for number, name in enumerate(
        ("blocks.0.cross_attn.q_proj", "transformer_blocks.0.attn1.to_q")
    ):
        halves = {f"{name}.lora_{ab}.weight": tensor(np.zeros((3, 4), np.float32)) for ab in "AB"}
        write_pt(here / f"{number}.pt", halves)  # as recognised layers of a video DiT
        assert "holds LoRA adapters" in refused(here / f"{number}.pt", out / "x")


@pytest.mark.parametrize("alpha", [0, -6, math.nan, math.inf])
def test_adapters_are_scaled_by_a_positive_number(folders, alpha):
    here, _ = folders
    source = write_published(here, VIDEO, "nvidia", lora_tensors())
    for lora in ("merge", "keep"):
        with pytest.raises(ValueError, match="--lora_alpha, above 0; got"):
            prepare(open_source(source, HINTS), alpha=alpha, lora=lora)


def test_the_settings_beside_a_file_are_read_as_those_of_its_folder(folders):
    here, out = folders
    for kind in (VAE, VIDEO):
        folder = write_published(here, kind, "diffusers", random_tensors(kind, "diffusers"))
        (file,) = folder.glob("*.safetensors")
        one, other = (prepare(open_source(path, Hints())).config for path in (folder, file))
        assert one == other
    texts = write_published(here, TEXT, "diffusers", random_tensors(TEXT, "diffusers"))
    (texts / "spiece.model").write_bytes(b"its vocabulary")
    write(prepare(open_source(next(texts.glob("*.safetensors")), Hints())), here / "t5")
    assert (here / "t5" / "spiece.model").read_bytes() == b"its vocabulary"
    for text, words in (('"x"', "holds no settings"), ("<!DOCTYPE html>", "is damaged")):
        (folder / "config.json").write_text(text)
        assert words in refused(file, out / "x") and words in refused(folder, out / "x")


def test_a_tokenizer_that_was_not_downloaded_is_not_copied(folders):
    here, out = folders
    folder = write_published(here, TEXT, "diffusers", random_tensors(TEXT, "diffusers"))
    (folder / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    assert "spiece.model: it is a placeholder of Git LFS" in refused(folder, out / "x")


def test_weights_that_are_zero_are_said(folders, caplog):
    """A download that did not finish may have its full size, filled with zeros."""
    here, out = folders
    tensors = random_tensors(VIDEO, "nvidia")
    large = [name for name, t in tensors.items() if np.prod(t.shape) > 4096]
    for name in large[-2:]:
        tensors[name] = tensor(np.zeros(tensors[name].shape, np.float32))
    source = write_published(here, VIDEO, "nvidia", tensors)
    write(prepare(open_source(source, HINTS)), out / "x")
    (said,) = (r.getMessage() for r in caplog.records if "hold only zeros" in r.message)
    assert said.startswith("2 large tensors of") and "download did not finish" in said


def test_what_weights_do_not_tell_is_asked_for(folders, complains):
    here, out = folders
    source = write_published(here, VIDEO, "nvidia", random_tensors(VIDEO, "nvidia"))
    complains("give --rope_ratio_thw", "launch.convert", source, out / "x")
    for given, words in (("1,3", "got '1,3'"), ("1,three,3", "e.g. 1,3,3"), ("1,0,3", "positive")):
        complains(words, "launch.convert", source, out / "x", f"--rope_ratio_thw={given}")
    assert not (out / "x").exists()


def test_a_destination_that_holds_something_is_left_alone(folders):
    here, out = folders
    source = write_published(here, ACTION, "mimic-video", random_tensors(ACTION, "mimic-video"))
    (out / "mine").mkdir()
    (out / "mine" / "notes").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty"):
        write(prepare(open_source(source, HINTS)), out / "mine")
    assert (out / "mine" / "notes").read_text() == "keep"


def test_the_command_converts_and_a_dry_run_does_not(folders, convert, complains):
    here, out = folders
    source = write_published(here, ACTION, "mimic-video", random_tensors(ACTION, "mimic-video"))
    assert "action decoder" in convert(source, out / "x", "--dry-run")
    assert not (out / "x").exists()
    convert(source, out / "x")
    complains("DEST must be given", "launch.convert", source)
    complains("give --to=", "launch.convert", out / "x", out / "y")
    words = "cannot be written for diffusers; possible is mimic-video"
    complains(words, "launch.convert", out / "x", out / "y", "--to=diffusers")
    assert not (out / "y").exists()
    complains("exists already", "launch.convert", out / "x", out, "--to=mimic-video")
    complains("not a training directory", "launch.convert", source, out / "y", "--to=mimic-video")


def test_a_killed_conversion_can_be_repeated(folders):
    here, out = folders
    source = write_published(here, ACTION, "mimic-video", random_tensors(ACTION, "mimic-video"))
    left = out / "x" / "checkpoints" / "0.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)  # what SIGKILL leaves
    write(prepare(open_source(source, HINTS)), out / "x")
    assert [p.name for p in (out / "x" / "checkpoints").iterdir()] == ["0"]


def test_a_full_disk_leaves_nothing(folders):
    """A real small file system where it may be mounted."""
    here, out = folders
    source = write_published(here, VIDEO, "nvidia", random_tensors(VIDEO, "nvidia"))
    disk = out / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk])
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        assert "No space left on device" in refused(source, disk / "x")
    finally:
        subprocess.run(["umount", disk])


def test_a_write_that_fails_half_way_leaves_nothing(folders, command):
    """The disk seems large enough, and then is not: the writes of the larger arrays fail."""
    here, out = folders
    source = write_published(here, VIDEO, "nvidia", random_tensors(VIDEO, "nvidia"))

    said = command("launch.convert", source, out / "x", ROPE, prepare=_small_files)
    assert said.code == 2 and "Traceback" not in said.err, said.err
    assert not (out / "x").exists()


def _small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_statistics_of_another_layout_are_refused(folders, complains):
    here, out = folders
    (here / "stats.json").write_text(json.dumps({"action/joints": {"mean": [[0.0]]}}))
    with pytest.raises(ValueError, match="position, rotation and gripper entry"):
        released_normalizer(here / "stats.json")
    content = released_statistics(here / "good.json")
    for name, value, words in (
        ("std_clamped", np.nan, "finite numbers of the shape"),  # actions would be NaN
        ("std_clamped", None, "finite numbers of the shape"),
        ("mean_clamped", np.inf, "finite numbers of the shape"),
        ("std_clamped", -1.0, "a std_clamped below 0"),
        ("clamp_min", 1e9, "clamp_min above clamp_max"),
    ):
        entry = content["action/eef_pos_lowdim"]
        wrong = entry | {name: value and np.full_like(entry[name], value).tolist()}
        changed = content | {"action/eef_pos_lowdim": wrong}
        (here / "stats.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words) as error:
            released_normalizer(here / "stats.json")
        assert "action/eef_pos_lowdim" in str(error.value)
    hundred = {
        key: entry | {"percentiles": entry["percentiles"][::10]} for key, entry in content.items()
    }
    (here / "stats.json").write_text(json.dumps(hundred))
    with pytest.raises(ValueError, match=r"percentiles .* \[1001, 15, 3\]"):
        released_normalizer(here / "stats.json")
    (here / "stats.json").write_text('{"action/')
    complains("is damaged", "launch.convert", here / "stats.json", out / "x")
    assert not (out / "x").exists()


def _print_peak():
    atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_a_model_is_never_in_memory(folders, command):
    """A file of 190 MB adds less than twice its largest stacked parameter to the memory."""
    here, out = folders
    sizes = {**CONFIGS["video"]["video_model"], "width": 768, "num_blocks": 8, "adaln_rank": 64}
    config = {**CONFIGS["video"], "video_model": sizes}
    rng = np.random.default_rng(0)
    tensors = {
        name: TorchTensor(
            shape, np.dtype(np.float32), lambda shape=shape: rng.random(shape, np.float32)
        )
        for name, shape in published_shapes(VIDEO, "nvidia", config).items()
    }
    write_pt(here / "large.pt", prefixed(tensors))

    def peak(*arguments):
        said = command("launch.convert", *arguments, prepare=_print_peak)
        assert said.code == 0, said.err
        return int(said.out.splitlines()[-1]) * 1024

    largest = 8 * 4 * 768**2 * 4
    idle = peak(here / "large.pt", out / "x", ROPE, "--dry-run")
    assert peak(here / "large.pt", out / "x", ROPE) - idle < 2 * largest
    assert peak(out / "x", out / "back.pt", "--to=nvidia") - idle < 2 * largest
    assert set(open_weights(out / "back.pt")) == set(prefixed(tensors))
