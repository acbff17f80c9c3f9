"""This package's own clients: one picture, the policy's own numbers."""

from mvjax.policy.serving.adapters.adapter import Adapter
from mvjax.policy.serving.adapters.body import Body


def plain(body: Body) -> Adapter:
    """`observation/image`, `observation/state` [proprio_dim]; actions [horizon, action_dim]."""
    return Adapter(
        name="plain",
        image=("observation/image",),
        state=("observation/state",),
        state_size=body.proprio_dim,
    )
