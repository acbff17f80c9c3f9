"""T5's encoder as Hugging Face publishes it (`google-t5/t5-11b`), and our `T5Encoder`."""

from mvjax.checkpoints.torch_weights.rules import LINEAR, SAME, Rule, Rules

_BLOCK = "encoder.block.{i}.layer"

T5: Rules = [
    Rule("shared.weight", "token_embedding", SAME),
    # Published in block 0 because the first block computes it; every block uses it.
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_bias",
        SAME,
    ),
    Rule(f"{_BLOCK}.0.layer_norm.weight", "blocks.attn_norm.scale", SAME),
    Rule(f"{_BLOCK}.0.SelfAttention.q.weight", "blocks.q_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.k.weight", "blocks.k_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.v.weight", "blocks.v_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.o.weight", "blocks.output_proj.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.layer_norm.weight", "blocks.mlp_norm.scale", SAME),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi.weight", "blocks.layer1.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.DenseReluDense.wo.weight", "blocks.layer2.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale", SAME),
]

# The same tensor under a second name; a file may hold either or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}

# Checkpoints of the whole T5 also hold what writes text; nothing here uses it.
IGNORED = ("decoder.", "lm_head.")
