"""Conversion: every published name, both directions bit for bit, and what the weights compute."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from published import (
    CONFIGS,
    LAYOUTS,
    prefixed,
    published_shapes,
    random_tensors,
    same_bits,
    tensor,
    write_published,
)

from data_pipelines.lock import run_lock
from data_pipelines.normalize import load_normalizers, released_normalizer
from data_pipelines.statistics import compute_statistics
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.directory import abstract_params, read_meta, restore_params, stored_digest
from mvjax.weights.convert import prepare, prepare_export, write, write_export
from mvjax.weights.files import TorchTensor, WeightsError
from mvjax.weights.kinds import ACTION, TEXT, VAE, VIDEO, Hints, video_sections
from mvjax.weights.pt_files import write_pt
from mvjax.weights.source import Source, open_source, open_weights

GOLDEN = Path(__file__).parent / "golden"
HINTS = Hints(rope_ratio_thw=(1.0, 3.0, 3.0), precision="float32")


def convert(path, directory, **options):
    conversion = prepare(open_source(path, HINTS), **options)
    write(conversion, directory)
    return conversion


def network_of(directory):
    """A converted network, and its parameters in float32."""
    meta = read_meta(directory)
    kind = next(k for k in (VIDEO, ACTION, VAE, TEXT) if k.stage == meta["stage"])
    network = kind.network(meta["config"])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "float32", sharding=here), network.abstract
    )
    return network, restore_params(directory, abstract)


@pytest.mark.parametrize(
    "kind, layout", LAYOUTS, ids=lambda x: x if isinstance(x, str) else x.stage
)
def test_there_and_back_bit_for_bit(kind, layout, tmp_path):
    tensors = random_tensors(kind, layout)
    source = write_published(tmp_path, kind, layout, tensors)
    conversion = convert(source, tmp_path / "ours")
    assert conversion.num_parameters == sum(int(np.prod(t.shape)) for t in tensors.values())
    assert read_meta(tmp_path / "ours")["digest"] == stored_digest(tmp_path / "ours", 0)
    export = prepare_export(tmp_path / "ours", layout)
    write_export(export, tmp_path / "back")
    back = open_weights(tmp_path / "back")
    same_bits(prefixed(tensors) if layout in kind.prefixed else tensors, back)
    again = open_source(tmp_path / "back", HINTS)  # the folder describes itself
    assert (again.kind, again.layout) == (kind, layout)
    assert prepare(again).config == conversion.config


def test_a_second_conversion_leaves_the_first_ones_files_alone(tmp_path):
    source = write_published(tmp_path, ACTION, "mimic-video", random_tensors(ACTION, "mimic-video"))
    being_written = tmp_path / "ours" / "checkpoints" / "0.orbax-checkpoint-tmp" / "state"
    being_written.mkdir(parents=True)
    with run_lock(tmp_path / "ours"), pytest.raises(OSError, match="is writing to"):
        convert(source, tmp_path / "ours")
    assert being_written.is_dir()


def test_a_kind_without_the_diffusers_layout_says_which_it_has():
    with pytest.raises(WeightsError, match=r"no action decoder is .* written as mimic-video"):
        ACTION.published({})


def test_bfloat16_stays_bfloat16_and_a_cast_is_asked_for(tmp_path):
    tensors = {
        name: tensor(t.read().astype(ml_dtypes.bfloat16))
        for name, t in random_tensors(VIDEO, "nvidia").items()
    }
    source = write_published(tmp_path, VIDEO, "nvidia", tensors)
    convert(source, tmp_path / "ours")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(tmp_path / "ours"))} == {
        "bfloat16"
    }
    write_export(prepare_export(tmp_path / "ours", "nvidia"), tmp_path / "back")
    same_bits(prefixed(tensors), open_weights(tmp_path / "back"))
    convert(source, tmp_path / "wide", dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(tmp_path / "wide"))} == {
        "float32"
    }


def test_golden_weights_compute_the_golden_numbers_after_conversion(tmp_path):
    with np.load(GOLDEN / "video_dit.npz") as file:
        arrays = dict(file)
    write_pt(tmp_path / "net.pt", {k: tensor(v) for k, v in arrays.items() if k[:4] == "net."})
    convert(tmp_path / "net.pt", tmp_path / "ours")
    network, params = network_of(tmp_path / "ours")
    velocity = network.bind(params)(
        np.moveaxis(arrays["in.latents_bcthw"], 1, -1),
        arrays["in.timesteps_bt"],
        arrays["in.text_bld"],
        arrays["in.condition_mask_b1thw"][:, 0],
        arrays["in.padding_mask_b1hw"][:, 0],
    )
    expected = np.moveaxis(arrays["out.velocity_bcthw"], 1, -1)
    assert np.linalg.norm(velocity - expected) <= 1e-5 * np.linalg.norm(expected)


RELEASED = [
    ("cosmos2b", VIDEO, "nvidia", 567, 1_956_413_440),
    ("cosmos2b", VIDEO, "diffusers", 567, 1_956_413_440),
    ("cosmos14b", VIDEO, "nvidia", 727, 14_265_285_632),
    ("cosmos14b", VIDEO, "diffusers", 727, 14_265_285_632),
    ("cosmos25_2b", VIDEO, "nvidia", 569, 2_059_174_912),
    ("bridge", ACTION, "mimic-video", 509, 498_990_730),
    ("libero", ACTION, "mimic-video", 509, 499_036_810),
    ("wan21", VAE, "nvidia", 194, 126_892_531),
    ("wan21", VAE, "diffusers", 194, 126_892_531),
    ("t5_11b", TEXT, "diffusers", 195, 4_864_791_552),
]


def released_config(name, kind):
    """The sections that a release's weights would be given."""
    if kind is VIDEO:
        return video_sections(VIDEO_DITS[name])
    if kind is ACTION:
        decoder = ACTION_DECODERS[name]
        return {
            "video_model": {"width": decoder.context_dim},
            "policy_io": {
                "action": {"horizon": decoder.action_horizon, "dim": decoder.action_dim},
                "proprio": {"horizon": 1, "dim": decoder.proprio_dim},
            },
            "decoder": {
                k: getattr(decoder, k)
                for k in ("width", "num_blocks", "num_heads", "adaln_rank", "time_rank")
            },
        }
    return {"tokenizer": {}} if kind is VAE else {"text": {"dim": 1024}, "text_encoder": {}}


@pytest.mark.parametrize("name, kind, layout, count, parameters", RELEASED)
def test_released_sizes_are_recognised_without_reading_a_tensor(
    name, kind, layout, count, parameters, tmp_path
):
    """Shape-only trees: reading one would fail, and nothing is allocated."""

    def unreadable():
        raise AssertionError("a tensor was read")

    config = released_config(name, kind)
    tensors = {
        n: TorchTensor(shape, np.dtype(ml_dtypes.bfloat16), unreadable)
        for n, shape in published_shapes(kind, layout, config).items()
    }
    assert len(tensors) == count
    hints = Hints(published=kind.published(config) if layout == "diffusers" else None)
    conversion = prepare(Source(tmp_path, kind, layout, tensors, {}, [], hints))
    assert conversion.num_parameters == parameters
    assert conversion.nbytes == 2 * parameters
    if kind is VIDEO:
        model = VIDEO_DITS[name]
        assert conversion.config["video_model"]["rope_ratio_thw"] == model.rope_ratio_thw
        assert conversion.config["video_model"]["num_heads"] == model.num_heads


def lora_tensors(rank=3):
    """The published fine-tuning format: adapters on the published targets, peft's names."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, value in random_tensors(VIDEO, "nvidia").items():
        layer = name.removesuffix(".weight")
        adapted = "adaln" not in name and not layer.endswith(("norm", "final_layer.linear"))
        if not adapted:
            tensors[name] = value
            continue
        d_out, d_in = value.shape
        tensors[f"{layer}.base_layer.weight"] = value
        for part, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            tensors[f"{layer}.lora_{part}.default.weight"] = tensor(
                rng.normal(size=shape).astype(np.float32)
            )
    return tensors


def test_adapters_are_merged_as_the_release_fuses_them(tmp_path):
    tensors = lora_tensors()
    source = write_published(tmp_path, VIDEO, "nvidia", tensors)
    convert(source, tmp_path / "ours", alpha=6.0)
    write_export(prepare_export(tmp_path / "ours", "mimic-video"), tmp_path / "fused.pt")
    fused = open_weights(tmp_path / "fused.pt")
    name = "blocks.1.cross_attn.k_proj"
    base, a, b = (
        tensors[f"{name}.{part}.weight"].read()
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    np.testing.assert_allclose(
        fused[f"net.{name}.weight"].read(), base + 6.0 / 3 * b @ a, rtol=1e-5, atol=1e-6
    )
    assert set(fused) == set(prefixed(random_tensors(VIDEO, "nvidia")))


def test_adapters_are_kept_and_given_back(tmp_path):
    tensors = lora_tensors()
    source = write_published(tmp_path, VIDEO, "nvidia", tensors)
    kept = convert(source, tmp_path / "kept", alpha=6.0, lora="keep")
    assert kept.config["lora"]["rank"] == 3
    assert "x_embedder" in kept.config["lora"]["targets"]
    write_export(
        prepare_export(tmp_path / "kept", "mimic-video", lora="keep"), tmp_path / "back.pt"
    )
    same_bits(prefixed(tensors), open_weights(tmp_path / "back.pt"))
    convert(source, tmp_path / "merged", alpha=6.0)
    (net, params), (merged_net, merged) = (network_of(tmp_path / n) for n in ("kept", "merged"))
    rng = np.random.default_rng(2)
    latents = rng.normal(size=(1, 2, 4, 4, 16)).astype(np.float32)
    inputs = latents, np.full((1, 2), 0.5), rng.normal(size=(1, 3, 64)), np.zeros((1, 2))
    x, y = net.bind(params)(*inputs), merged_net.bind(merged)(*inputs)
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_a_training_run_with_adapters_is_exported_merged(lora_run, tmp_path):
    write_export(prepare_export(lora_run, "nvidia"), tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "again")
    write_export(prepare_export(lora_run, "mimic-video", lora="keep"), tmp_path / "kept.pt")
    convert(tmp_path / "kept.pt", tmp_path / "merged", alpha=8.0)
    one, other = (leaf_paths(network_of(tmp_path / n)[1]) for n in ("again", "merged"))
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], rtol=1e-5, atol=1e-7)


def test_the_moving_average_of_an_nvidia_file_is_asked_for(tmp_path):
    net, ema = (random_tensors(VIDEO, "nvidia", seed=seed) for seed in (0, 1))
    write_pt(tmp_path / "both.pt", prefixed(net) | prefixed(ema, "net_ema."))
    for chosen, expected in ((False, net), (True, ema)):
        source = open_source(tmp_path / "both.pt", HINTS, ema=chosen)
        same_bits(expected, source.tensors)
        assert len(source.dropped) == len(net)
    write_pt(tmp_path / "ema.pt", prefixed(ema, "net_ema."))
    with pytest.raises(ValueError, match=r"no tensors below 'net\.', but net_ema\.; give --ema"):
        open_source(tmp_path / "ema.pt", HINTS)


def test_t5_is_read_under_either_of_its_tied_names_and_without_its_decoder(tmp_path):
    tensors = random_tensors(TEXT, "diffusers")
    shared = tensors["shared.weight"]
    others = {n: t for n, t in tensors.items() if n != "shared.weight"}
    decoder = {"decoder.final_layer_norm.weight": shared, "lm_head.weight": shared}
    for number, given in enumerate(
        (
            {"encoder.embed_tokens.weight": shared, **others},
            {**tensors, "encoder.embed_tokens.weight": shared, **decoder},
        )
    ):
        write_pt(tmp_path / f"{number}.bin", given)
        conversion = prepare(open_source(tmp_path / f"{number}.bin", HINTS))
        same_bits(tensors, conversion.tensors)


def released_statistics(path, order=("pos", "rot", "gripper")):
    """Statistics as `dataset_statistics/*.json` holds them; keys in any order."""
    rng = np.random.default_rng(0)
    content = {}
    for prefix, horizon in (("action/", 15), ("obs/", 1)):
        for stream in order:
            dims = {"pos": 3, "rot": 6, "gripper": 1}[stream]
            values = rng.normal(size=(50, horizon, dims))
            name = f"eef_{stream}_lowdim" if stream != "gripper" else "gripper_action_lowdim"
            content[prefix + name] = {k: v.tolist() for k, v in compute_statistics(values).items()}
    path.write_text(json.dumps(content))
    return content


def test_released_statistics_normalise_position_rotation_gripper(tmp_path):
    content = released_statistics(tmp_path / "bridge.json", order=("gripper", "rot", "pos"))
    released_normalizer(tmp_path / "bridge.json").save(tmp_path / "normalizer.json")
    normalizer = load_normalizers(tmp_path / "normalizer.json").of()
    values = np.random.default_rng(1).normal(size=(2, 15, 10)).astype(np.float32)
    normal = normalizer.normalize("actions", values)
    position = content["action/eef_pos_lowdim"]
    shift, scale = (np.array(position[k]) for k in ("mean_clamped", "std_clamped"))
    low, high = (np.array(position[k]) for k in ("clamp_min", "clamp_max"))
    np.testing.assert_allclose(
        normal[..., :3], (np.clip(values[..., :3], low, high) - shift) / scale, atol=1e-5
    )
    np.testing.assert_array_equal(normal[..., 3:9], values[..., 3:9])
    assert normalizer.normalize("proprio", values[:, :1]).shape == (2, 1, 10)


def test_the_tables_of_two_layouts_name_the_same_parameters():
    for kind in (VIDEO, VAE):
        config = CONFIGS[kind.stage]
        one, other = ({r.ours for r in kind.rules(la, config)} for la in kind.signatures)
        assert one == other == {p.replace("/", ".") for p in leaf_paths(_abstract(kind))}


def _abstract(kind):
    return kind.network(CONFIGS[kind.stage]).abstract
