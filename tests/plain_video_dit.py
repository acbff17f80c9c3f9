"""The video DiT written out a second time, as one sequence of tokens, for comparison."""

import jax
import jax.numpy as jnp
import numpy as np

from mvjax.models.rope import rope_table
from mvjax.models.video_dit import patchify, time_sinusoid, unpatchify


def random_params(network):
    """A network that has left its start, where modulations and the embeddings of views are zero."""
    rng, params = np.random.default_rng(0), jax.jit(network.init)(jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


def evaluated(network, params, i, text, layer=None):
    """The velocity, or the hidden states after a block."""

    @jax.jit
    def run(params, i):
        net, inputs = network.bind(params), (i.latents, i.timesteps, text, i.condition_mask)
        if layer is None:
            return net(*inputs, views=i.views)
        return net.hidden(*inputs, views=i.views, layer=layer)

    return run(params, i)


def plainly(config, params, i, text, attends=None):
    """The DiT as one sequence of tokens, a time for each: (velocity, hidden states by layer).

    `attends` [tokens, tokens] is a mask of self-attention: which token reads which; None for all.
    """
    streams = [(i.latents, i.timesteps, i.condition_mask, 0.0)]
    for name, (view, time) in sorted(i.views.items()):
        times = jnp.tile(time, (1, view.shape[1]))
        embedding = params["view_embedding"][name]
        streams.append((view, times, jnp.ones_like(times), embedding))
    xs, taus, angles = [], [], []
    for latents, times, condition, embedding in streams:
        b, t, h, w, _ = latents.shape
        wide = jnp.broadcast_to(condition[:, :, None, None, None], (b, t, h, w, 1))
        patches = patchify(jnp.concatenate([latents, wide, jnp.zeros_like(wide)], -1))
        xs.append(patches @ params["x_embedder"]["kernel"] + embedding)
        taus.append(jnp.repeat(times, h * w // 4, axis=1))
        angles.append(rope_table((t, h // 2, w // 2), config.head_dim, config.rope_ratio_thw))
    x, tau = jnp.concatenate(xs, 1), jnp.concatenate(taus, 1)
    cos, sin = (jnp.concatenate(parts) for parts in zip(*angles))

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def layer_norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    e = time_sinusoid(tau, config.width)
    linear = params["t_embedder"]
    shared = jax.nn.silu(e @ linear["linear_1"]["kernel"]) @ linear["linear_2"]["kernel"]
    e = norm(e, params["t_embedding_norm"]["scale"])

    def modulation(p, chunks):
        m = jax.nn.silu(e) @ p["down"]["kernel"] @ p["up"]["kernel"]
        return jnp.split(m + shared[..., : m.shape[-1]], chunks, axis=-1)

    def turned(x):
        a, b = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1)

    def attention(p, u, context, turn):
        q, k, v = (
            (x @ p[name]["kernel"]).reshape(*x.shape[:2], config.num_heads, -1)
            for name, x in (("q_proj", u), ("k_proj", context), ("v_proj", context))
        )
        q, k = norm(q, p["q_norm"]["scale"]), norm(k, p["k_norm"]["scale"])
        q, k = (turned(q), turned(k)) if turn else (q, k)
        logits = jnp.einsum("blhd,bmhd->bhlm", q, k) * config.head_dim**-0.5
        if turn and attends is not None:
            logits = jnp.where(attends, logits, -jnp.inf)
        weights = jax.nn.softmax(logits)
        return (
            jnp.einsum("bhlm,bmhd->blhd", weights, v).reshape(u.shape)
            @ (p["output_proj"]["kernel"])
        )

    def sublayer(x, p, f):
        shift, scale, gate = modulation(p, 3)
        return x + gate * f(layer_norm(x) * (1 + scale) + shift)

    hidden = [x]
    for number in range(config.num_blocks):
        p = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"])
        x = sublayer(x, p["adaln_self_attn"], lambda u, p=p: attention(p["self_attn"], u, u, True))
        x = sublayer(
            x, p["adaln_cross_attn"], lambda u, p=p: attention(p["cross_attn"], u, text, False)
        )
        first, second = (p["mlp"][name]["kernel"] for name in ("layer1", "layer2"))
        x = sublayer(
            x,
            p["adaln_mlp"],
            lambda u, first=first, second=second: (
                jax.nn.gelu(u @ first, approximate=False) @ second
            ),
        )
        hidden.append(x)
    shift, scale = modulation(params["final_layer"]["adaln"], 2)
    x = (layer_norm(x) * (1 + scale) + shift) @ params["final_layer"]["linear"]["kernel"]
    video = x[:, : xs[0].shape[1]]
    return unpatchify(video, i.latents.shape), hidden
