"""The clients that `--client` knows."""

from mvjax.policy.serving.adapters.adapter import Adapter
from mvjax.policy.serving.adapters.aloha import aloha
from mvjax.policy.serving.adapters.body import Body
from mvjax.policy.serving.adapters.droid import droid
from mvjax.policy.serving.adapters.libero import libero
from mvjax.policy.serving.adapters.plain import plain

CLIENTS = {"plain": plain, "libero": libero, "aloha": aloha, "droid": droid}


def make_adapter(client: str, body: Body) -> Adapter:
    """The adapter of a client, for a policy with this body.

    Raises:
        ValueError: for an unknown client, or one that does not fit the policy.
    """
    if client not in CLIENTS:
        raise ValueError(f"The client must be one of {', '.join(CLIENTS)}, got {client!r}.")
    return CLIENTS[client](body)
