"""The video tokenizer and the text encoder that a configuration names, with their identities.

Both are either an embedded stand-in or converted weights: `config.tokenizer` is the file of a
fitted linear tokenizer or the directory of a converted Wan VAE; `config.text_encoder` is "" for
character n-grams or the directory of a converted T5. Records and training runs remember the
identities, so that nothing is ever decoded with another network than it was encoded with.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mvjax.checkpoints.bridge import abstract_params, read_meta, restore_params
from mvjax.checkpoints.config_match import differences
from mvjax.checkpoints.torch_weights.kind import Kind
from mvjax.checkpoints.torch_weights.kind_text import TEXT
from mvjax.checkpoints.torch_weights.kind_vae import VAE
from mvjax.checkpoints.tree_match import CheckpointMismatch, leaf_paths
from mvjax.models.linear_tokenizer import LinearTokenizer, load_linear_tokenizer
from mvjax.models.ngram_text import NgramTextEncoder
from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.t5_text import T5TextEncoder
from mvjax.models.text_tokenizer import load_t5_tokenizer
from mvjax.models.wan_vae import WanVAE

_SMALL = 1 << 20  # bytes; norms and biases are below, and no two trainings share them


def load_video_tokenizer(path: Path) -> tuple[LinearTokenizer | WanVAE, str]:
    """The tokenizer at `config.tokenizer`, and its identity.

    Raises:
        FileNotFoundError: if nothing is there.
        CheckpointMismatch: if the directory holds another network.
    """
    path = Path(path)
    if not path.is_dir():
        return load_linear_tokenizer(path), hashlib.sha256(path.read_bytes()).hexdigest()
    network, params = _load(path, VAE)
    return network.bind(params), f"wan vae {_fingerprint(params)}"


def load_text_encoder(config: Any) -> tuple[NgramTextEncoder | T5TextEncoder, str]:
    """The text encoder of a configuration (`text.length` tokens of `text.dim`), and its identity.

    Raises:
        FileNotFoundError: if `config.text_encoder` holds no checkpoint or no tokenizer.
        CheckpointMismatch: if it holds another network, or one of another width.
    """
    length, dim = config.text.length, config.text.dim
    if not config.text_encoder:
        return NgramTextEncoder(length, dim), f"ngram {length}x{dim}"
    if config.text_encoder == "stored":
        raise ValueError(
            "config.text_encoder is 'stored', which gives the embeddings of instructions that are "
            "in the data; for others name the network that made them (docs/weights.md)."
        )
    directory = Path(config.text_encoder)
    network, params = _load(directory, TEXT)
    if network.config.width != dim:
        raise CheckpointMismatch(
            f"{directory} embeds texts in {network.config.width} dimensions, but text.dim is {dim}."
        )
    tokenizer = load_t5_tokenizer(directory, length)
    encoder = T5TextEncoder(network, params, tokenizer)
    return encoder, f"t5 {length}x{dim} {_fingerprint(params)}"


def check_identity(identity: dict[str, str], directory: Path) -> None:
    """Raises CheckpointMismatch if a run was trained with other encoders than these.

    Args:
        identity: "tokenizer" or "text_encoder", or both -> identity of what is in use.
        directory: a training directory; converted weights do not tell, and anything goes.
    """
    trained = read_meta(directory).get("identity", {})
    # Nobody knows which network made the embeddings that a dataset stores.
    known = {name for name, what in trained.items() if not what.startswith("stored ")}
    expected = {name: trained[name] for name in identity if name in known}
    different = differences(expected, identity, "identity") if expected else ()
    if different:
        raise CheckpointMismatch(
            f"{directory} was trained with another video tokenizer or text encoder: "
            f"{'; '.join(different)}. Bring that one back, or train again."
        )


def _load(directory: Path, kind: Kind) -> tuple[Network, Params]:
    meta = read_meta(directory)
    if meta["stage"] != kind.stage:
        raise CheckpointMismatch(
            f"{directory} holds a checkpoint of stage {meta['stage']!r}, but a converted "
            f"{kind.title} is needed here."
        )
    network = kind.network(meta["config"])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    lower = "bfloat16" if network.config.precision == "bfloat16" else None
    placed = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, lower or p.dtype, sharding=device),
        abstract_params(directory),
    )
    return network, restore_params(directory, placed)


def _fingerprint(params: Params) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaf_paths(params).items()):
        if leaf.nbytes <= _SMALL:
            digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
