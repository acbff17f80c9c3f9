"""Rematerialisation: what of a block is kept for the backward pass, and what is computed again.

- "none": everything is kept; the fastest where it fits.
- "dots": the outputs of linears and of attention; norms, activations and rotations are repeated.
- "attention": the outputs of attention over many keys. All else is repeated, which is a third more
  matmuls but not a third more attention. The choice for long videos.
- "offload": as "attention", but kept in the host's memory (pinned): 2 bytes less per token, block
  and channel on the device (bfloat16) for two copies over the host's link.
- "full": nothing but the residual stream between blocks.
"""

from collections.abc import Callable

import jax

ATTENTION = "attention"  # the name that attention outputs are kept by

_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION)
POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(name: str) -> None:
    """Raises ValueError if there is no such policy."""
    if name not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}; got {name!r}.")


def rematerialised(body: Callable, name: str) -> Callable:
    """The body of a scan over blocks, under a policy of the list above.

    Args:
        body: (carry, block) -> (carry, output), as `jax.lax.scan` takes it.
        name: the policy.
    """
    if name == "none":
        return body
    return jax.checkpoint(body, policy=POLICIES[name], prevent_cse=False)
