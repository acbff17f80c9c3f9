"""The T5 text encoder gives transformers' numbers, and its tokenizer the published ids."""

import dataclasses
import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CORPUS
from published import to_arrays, to_params

from mvjax.models import presets
from mvjax.models.network import Network
from mvjax.models.t5 import (
    T5Encoder,
    T5EncoderConfig,
    T5TextEncoder,
    load_t5_tokenizer,
    position_bucket,
)
from mvjax.parallel import make_rules, sharding_tree
from mvjax.weights.names import IGNORED, T5, TIED

GOLDEN = Path(__file__).parent / "golden" / "t5_encoder.npz"
TEXTS = [
    "pick up the moka pot",
    "",
    "Open the drawer, slowly! (twice)",
    "zebra 漢字 quartz",
    "it  is",
]


def network(config):
    return Network(lambda key: T5Encoder(config, key))


def relative_rms(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN))
    theirs = json.loads(str(arrays.pop("meta")))["config"]
    config = T5EncoderConfig(
        vocab_size=theirs["vocab_size"],
        width=theirs["d_model"],
        num_blocks=theirs["num_layers"],
        num_heads=theirs["num_heads"],
        head_dim=theirs["d_kv"],
        mlp_dim=theirs["d_ff"],
    )
    tensors = {k.removeprefix("net."): v for k, v in arrays.items() if k.startswith("net.")}
    params = to_params(tensors, T5)
    chex.assert_trees_all_equal_shapes(params, network(config).abstract)
    return arrays, theirs, config, tensors, params


def embed(config, params, tokens, mask):
    forward = jax.jit(lambda params, *inputs: network(config).bind(params)(*inputs))
    return np.asarray(forward(params, tokens, mask))


def test_last_hidden_state_is_transformers(golden):
    """300 tokens, so distances past the last bucket; texts of 300, 170 and 1 tokens."""
    arrays, _, config, _, params = golden
    tokens, mask = arrays["in.tokens_bl"], arrays["in.mask_bl"]
    out, used = embed(config, params, tokens, mask), mask.astype(bool)
    assert out.dtype == np.float32
    assert relative_rms(out[used], arrays["out.hidden_bld"][used]) < 1e-5
    assert not out[~used].any()


def test_precisions(golden):
    """`published` is the float32 result rounded once; bfloat16 stays within its 8 bits."""
    arrays, _, config, _, params = golden
    tokens, mask = arrays["in.tokens_bl"], arrays["in.mask_bl"]
    exact = embed(config, params, tokens, mask)
    published = embed(dataclasses.replace(config, precision="published"), params, tokens, mask)
    np.testing.assert_array_equal(published, exact.astype(jnp.bfloat16))
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    out = embed(dataclasses.replace(config, precision="bfloat16"), half, tokens, mask)
    assert out.dtype == jnp.bfloat16
    assert relative_rms(out, exact) < 1e-2
    with pytest.raises(ValueError, match=r"precision must be one of float32, .* got 'half'"):
        T5EncoderConfig(precision="half")


def test_padding_changes_nothing(golden):
    arrays, _, config, _, params = golden
    tokens = arrays["in.tokens_bl"][:2, :40]
    short = embed(config, params, tokens, np.ones_like(tokens))
    padded = np.pad(tokens, ((0, 1), (0, 88)), constant_values=7)
    mask = np.zeros_like(padded)
    mask[:2, :40] = 1  # the third row has no token at all, as in a batch that is not full
    out = embed(config, params, padded, mask)
    assert relative_rms(out[:2, :40], short) < 1e-6
    assert not out[2].any() and np.isfinite(out).all()


def test_position_buckets_grow_to_the_longest_distance():
    bucket = position_bucket(300, 32, 128)
    later, earlier = bucket[0], bucket[:, 0]
    np.testing.assert_array_equal(earlier[:8], range(8))
    np.testing.assert_array_equal(
        earlier[[8, 11, 12, 16, 32, 64, 90, 91]], [8, 8, 9, 10, 12, 14, 14, 15]
    )
    assert (earlier[91:] == 15).all()
    np.testing.assert_array_equal(later[1:], earlier[1:] + 16)


def test_t5_11b_has_the_published_size_and_fits_a_mesh():
    t5 = network(presets.T5_ENCODERS["t5_11b"])
    assert t5.num_parameters == 4_864_791_552
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 4), ("data", "fsdp", "context", "tensor"))
    sharding_tree(t5.axes, mesh, make_rules(), t5.abstract)
    names = [rule.torch.format(i=i) for rule in T5 for i in range(24 if "{i}" in rule.torch else 1)]
    assert len(set(names)) == len(names) == 24 * 8 + 3
    assert not any(name.startswith(IGNORED) for name in names)


def test_strict_loading_into_transformers_and_its_hidden_states(golden):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    _, theirs, config, _, _ = golden
    ours = network(config).init(jax.random.key(1))
    rng = np.random.default_rng(0)
    for norm in (ours["blocks"]["attn_norm"], ours["blocks"]["mlp_norm"], ours["final_norm"]):
        norm["scale"] = rng.uniform(0.5, 1.5, norm["scale"].shape).astype(np.float32)
    model = transformers.T5EncoderModel(
        transformers.T5Config(**theirs, feed_forward_proj="relu", dropout_rate=0.0)
    ).eval()
    tensors = to_arrays(ours, T5)
    tensors |= {alias: tensors[name] for alias, name in TIED.items()}
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True)
    back = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    chex.assert_trees_all_equal(
        to_params({n: a for n, a in back.items() if n not in TIED}, T5), ours
    )

    for length in (1, 20, 129, 512):
        tokens = rng.integers(0, config.vocab_size, (2, length), dtype=np.int32)
        mask = rng.random((2, length)) < 0.8  # any mask, not only padding at the end
        mask[:, 0] = True
        with torch.no_grad():
            inputs = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
            expected = model(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
        out = embed(config, ours, tokens, mask)
        assert relative_rms(out[mask], expected.numpy()[mask]) < 1e-5, length


def test_the_golden_file_is_what_transformers_gives(golden):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    arrays, theirs, _, tensors, _ = golden
    model = transformers.T5EncoderModel(
        transformers.T5Config(**theirs, feed_forward_proj="relu", dropout_rate=0.0)
    ).eval()
    state = tensors | {alias: tensors[name] for alias, name in TIED.items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    tokens, mask = (torch.from_numpy(arrays[f"in.{k}_bl"]).long() for k in ("tokens", "mask"))
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert relative_rms(out, arrays["out.hidden_bld"]) < 1e-6


# The tokenizer: a small sentencepiece model, trained as T5's was (pad 0, end mark 1, unknown 2).


def scored_pieces(folder):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


@pytest.fixture(scope="module")
def tokenizer_json(spiece, tmp_path_factory):
    """The same model as a `tokenizer.json`, with settings of its own for length and padding."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scored_pieces(spiece), unk_id=2))
    collapse = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), collapse]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_id=0)
    folder = tmp_path_factory.mktemp("json")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_ids_of_a_sentencepiece_model(spiece):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    tokenizer = load_t5_tokenizer(spiece, 40)
    tokens, mask = tokenizer(TEXTS)
    assert tokens.dtype == np.int32 and tokens.shape == mask.shape == (5, 40)
    for row, used, text in zip(tokens, mask, TEXTS):
        expected = [*model.encode(text), 1]
        assert row[used].tolist() == expected and used[: len(expected)].all()
        assert (row[~used] == 0).all()
    assert tokens[1].tolist() == [1] + [0] * 39  # no text is one end mark
    assert load_t5_tokenizer(spiece).length == 512


def test_a_long_text_is_cut_before_its_end_mark(spiece):
    whole, short = load_t5_tokenizer(spiece, 40), load_t5_tokenizer(spiece, 6)
    tokens, mask = short(CORPUS)
    assert mask.all() and (tokens[:, -1] == 1).all()
    np.testing.assert_array_equal(tokens[:, :-1], whole(CORPUS)[0][:, :5])


def test_both_kinds_of_file_give_the_same_ids(spiece, tokenizer_json, tmp_path):
    expected = load_t5_tokenizer(spiece, 40)([*TEXTS, *CORPUS])
    renamed = tmp_path / "vocabulary"  # recognised by what it holds
    renamed.write_bytes((tokenizer_json / "tokenizer.json").read_bytes())
    for path in (tokenizer_json, renamed, spiece / "spiece.model"):
        for ours, theirs in zip(load_t5_tokenizer(path, 40)([*TEXTS, *CORPUS]), expected):
            np.testing.assert_array_equal(ours, theirs)


def test_ids_are_those_of_transformers(spiece, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.T5Tokenizer(vocab=scored_pieces(spiece), extra_ids=0)
    theirs.save_pretrained(tmp_path)
    settings = dict(padding="max_length", truncation=True, max_length=30)
    expected = theirs([*TEXTS, *CORPUS], **settings)
    tokens, mask = load_t5_tokenizer(tmp_path, 30)([*TEXTS, *CORPUS])
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))


def test_what_is_wrong_with_a_tokenizer_is_said(spiece, tokenizer_json, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer at .*tokenizer.json or spiece.model"
    ):
        load_t5_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"neither a tokenizer.json nor a sentencepiece model"):
        load_t5_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"is not a tokenizer.json of Hugging Face"):
        load_t5_tokenizer(tmp_path)
    other = json.loads((tokenizer_json / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    vocab[0], vocab[1] = vocab[1], vocab[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"marks \(1, 0\) where T5 has \(0, 1\)"):
        load_t5_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"1 token or more .* got 0"):
        load_t5_tokenizer(spiece, 0)


@pytest.mark.parametrize(
    ("package", "content"), [("tokenizers", b"{}"), ("sentencepiece", b"\n\x0e")]
)
def test_a_missing_package_is_named(package, content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        load_t5_tokenizer(tmp_path / "file")


@pytest.fixture(scope="module")
def encoder(spiece):
    t5, tokenizer = network(presets.T5_ENCODERS["tiny"]), load_t5_tokenizer(spiece, 200)
    params = t5.init(jax.random.key(0))
    return T5TextEncoder(t5, params, tokenizer), t5.bind(params), tokenizer


def test_texts_are_embedded_and_padded_with_zeros(encoder):
    """The same as the published way: every text padded to the full length, run with its mask."""
    encoder, t5, tokenizer = encoder
    texts = [*TEXTS, " ".join(CORPUS)]  # the last has more than 64 tokens
    out = encoder.encode(texts)
    assert out.dtype == np.float32 and out.shape == (6, encoder.length, encoder.dim)
    assert (encoder.length, encoder.dim) == (200, 64)
    tokens, mask = tokenizer(texts)
    np.testing.assert_array_equal(np.any(out != 0, axis=-1), mask)
    assert relative_rms(out, t5(tokens, mask)) < 1e-6
    assert encoder.encode([]).shape == (0, 200, 64)


def test_a_text_does_not_depend_on_its_neighbours(encoder):
    encoder, _, _ = encoder
    many = encoder.encode((TEXTS * 4)[:19])  # more than two batches, the last not full
    np.testing.assert_array_equal(many[5:10], many[:5])
    np.testing.assert_array_equal(encoder.encode(TEXTS[2:3])[0], many[2])
    among_long = encoder.encode([" ".join(CORPUS), TEXTS[0]])[1]
    assert relative_rms(among_long, many[0]) < 1e-6


def test_a_tokenizer_of_other_weights_is_refused(encoder):
    _, _, tokenizer = encoder
    small = network(dataclasses.replace(presets.T5_ENCODERS["tiny"], vocab_size=64))
    with pytest.raises(ValueError, match=r"tokenizer has 70 ids, but .* embeddings for 64"):
        T5TextEncoder(small, small.init(jax.random.key(0)), tokenizer)
