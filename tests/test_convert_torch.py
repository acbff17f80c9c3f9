"""Against PyTorch's libraries: what they save is converted, computes the same, loads back."""

import re

import numpy as np
import pytest
from published import CONFIGS, NO_LORA, prefixed, random_tensors

from launch.benchmarks.verify_weights import verify
from mvjax.weights.convert import prepare, prepare_export, write, write_export
from mvjax.weights.kinds import TEXT, VAE, VIDEO, Hints
from mvjax.weights.names import video_dit, with_adapters
from mvjax.weights.pt_files import write_pt
from mvjax.weights.source import open_source, open_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLASSES = {
    "video": lambda: diffusers.CosmosTransformer3DModel,
    "vae": lambda: diffusers.AutoencoderKLWan,
    "text": lambda: transformers.T5EncoderModel,
}
PROJECTED = {  # Predict2.5's text projection
    "video_model": {**CONFIGS["video"]["video_model"], "text_dim": 24, "text_projection_dim": 96},
    "text": {"dim": 96},
    "lora": NO_LORA,
}


def random_model(kind, config):
    """A model of the library with every parameter random, norms included."""
    settings = {k: v for k, v in kind.published(config).items() if not k.startswith("_")}
    if kind is TEXT:
        model = transformers.T5EncoderModel(transformers.T5Config(**settings))
    else:
        model = CLASSES[kind.stage]()(**settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 and not name.endswith("gamma") else 0.1
        noise = scale * torch.randn(p.shape, generator=generator)
        norm = name.endswith("gamma") or re.search(r"norm(_[qk])?\.weight$", name)
        p.data = 1 + noise if norm else noise
    return model


@pytest.mark.parametrize(
    "kind, config",
    [
        (VIDEO, CONFIGS["video"]),
        (VIDEO, PROJECTED),
        (VAE, CONFIGS["vae"]),
        (TEXT, CONFIGS["text"]),
    ],
    ids=["video", "video-projected", "vae", "text"],
)
def test_a_saved_model_computes_the_same_and_loads_back(kind, config, tmp_path):
    model = random_model(kind, config)
    model.save_pretrained(tmp_path / "theirs")
    conversion = prepare(open_source(tmp_path / "theirs", Hints(precision="float32")))
    write(conversion, tmp_path / "ours")
    assert "verified against PyTorch" in verify(conversion, tmp_path / "ours")
    write_export(prepare_export(tmp_path / "ours", "diffusers"), tmp_path / "back")
    back = CLASSES[kind.stage]().from_pretrained(tmp_path / "back")
    state, again = model.state_dict(), back.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


@pytest.mark.parametrize("kind", [VIDEO, VAE], ids=["video", "vae"])
def test_an_nvidia_file_is_what_torch_loads_and_back(kind, tmp_path):
    model = random_model(kind, CONFIGS[kind.stage])
    model.save_pretrained(tmp_path / "theirs")
    hints = Hints(rope_ratio_thw=(1.0, 3.0, 3.0), precision="float32")
    write(prepare(open_source(tmp_path / "theirs", hints)), tmp_path / "ours")
    write_export(prepare_export(tmp_path / "ours", "nvidia"), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(name.startswith("net.") for name in loaded) == (kind is VIDEO)
    torch.save(loaded, tmp_path / "saved.pt")  # by torch itself
    conversion = prepare(open_source(tmp_path / "saved.pt", hints))
    write(conversion, tmp_path / "again")
    assert "verified against PyTorch" in verify(conversion, tmp_path / "again")


def test_half_precision_comes_back_bit_for_bit(tmp_path):
    model = random_model(VIDEO, CONFIGS["video"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")  # a sharded index
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    write(prepare(open_source(tmp_path / "theirs", Hints())), tmp_path / "ours")
    write_export(prepare_export(tmp_path / "ours", "diffusers"), tmp_path / "back")
    back = CLASSES["video"]().from_pretrained(tmp_path / "back", torch_dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert back.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(value, back.state_dict()[name])


def test_verify_compares_what_was_converted(tmp_path):
    """The moving average, names of wrapped modules, and numbers written with fewer bits."""
    net, ema = (random_tensors(VIDEO, "nvidia", seed=seed) for seed in (0, 1))
    wrapped = {
        f"net_ema.{name.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": value
        for name, value in ema.items()
    }
    write_pt(tmp_path / "both.pt", prefixed(net) | wrapped)
    hints = Hints(rope_ratio_thw=(1.0, 3.0, 3.0), precision="float32")
    conversion = prepare(open_source(tmp_path / "both.pt", hints, ema=True), dtype="bfloat16")
    write(conversion, tmp_path / "ours")
    assert "verified against PyTorch" in verify(conversion, tmp_path / "ours")


def test_verify_notices_a_difference(tmp_path):
    model = random_model(VAE, CONFIGS["vae"])

    def converted():
        model.save_pretrained(tmp_path / "theirs")
        return prepare(open_source(tmp_path / "theirs", Hints(precision="float32")))

    write(converted(), tmp_path / "ours")
    model.quant_conv.bias.data[0] += 1
    with pytest.raises(ValueError, match=r"differ from the source: quant_conv\.bias"):
        verify(converted(), tmp_path / "ours")


def test_verify_refuses_what_was_damaged_since(tmp_path):
    random_model(VAE, CONFIGS["vae"]).save_pretrained(tmp_path / "theirs")
    conversion = prepare(open_source(tmp_path / "theirs", Hints(precision="float32")))
    write(conversion, tmp_path / "ours")
    (chunk,) = (
        p for p in (tmp_path / "ours").rglob("params.quant_conv.bias/*") if p.name[0].isdigit()
    )
    content = np.frombuffer(chunk.read_bytes(), np.float32).copy()
    content[0] += 1
    chunk.write_bytes(content.tobytes())
    with pytest.raises(OSError, match="a file was changed, or belongs to another checkpoint"):
        verify(conversion, tmp_path / "ours")


def test_adapters_have_the_names_that_peft_gives():
    peft = pytest.importorskip("peft", reason="peft is not installed")

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(4, 4, bias=False)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = Attention()

    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList([Block()])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=True)
    peft.inject_adapter_in_model(config, net)
    ours = {
        rule.torch.replace("{i}", "0")
        for rule in with_adapters(video_dit(), ("q_proj",))
        if "self_attn.q_proj" in rule.torch
    }
    assert set(net.state_dict()) == ours


def test_t5_bins_of_torch_are_read(tmp_path):
    """The layout of google-t5/t5-11b: pytorch_model.bin with the tied names, decoder included."""
    model = random_model(TEXT, CONFIGS["text"])
    (tmp_path / "t5").mkdir()
    state = {**model.state_dict(), "lm_head.weight": torch.zeros(3, 4)}
    torch.save(state, tmp_path / "t5" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "t5")
    assert "lm_head.weight" in open_weights(tmp_path / "t5")
    conversion = prepare(open_source(tmp_path / "t5", Hints(precision="float32")))
    write(conversion, tmp_path / "ours")
    assert "verified against PyTorch" in verify(conversion, tmp_path / "ours")
