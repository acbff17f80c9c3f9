"""A connection's episodes: the names of its queries."""

from itertools import count

import numpy as np
import pytest

from mvjax.serving.adapters import PolicyVectors, make_adapter
from mvjax.serving.session import RequestError, Session, SessionSpec

PICTURE = np.zeros((4, 6, 3), np.uint8)
SPEC = SessionSpec(observed_frames=2, proprio_horizon=1)
ADAPTER = make_adapter("plain", PolicyVectors((), (), 2, 2))


def message(state=(0.1, 0.2), **more):
    return {
        "observation/image": PICTURE,
        "observation/state": np.array(state),
        "prompt": "open the drawer",
        **more,
    }


def name(session, **more):
    return session.observe(message(**more)).observation.noise_key


def test_queries_are_named_by_the_episodes_of_the_server_and_their_number():
    """Two clients with the same observations get other noise; the same order gives the same."""
    for _ in range(2):
        numbers = count()
        Session(ADAPTER, SPEC, numbers)  # connects and leaves: it counts for nothing
        first, second = (Session(ADAPTER, SPEC, numbers) for _ in range(2))
        first.reset()
        assert [name(first), name(second)] == [("session 0", 0), ("session 1", 0)]
        with pytest.raises(RequestError):
            name(first, state=(np.nan, 0))
        history = {"observation/image_history": np.stack([PICTURE] * 2)}
        assert [name(first, **history), name(first)] == [("session 0", 1), ("session 0", 2)]
        first.reset()
        assert [name(first), name(first)] == [("session 2", 0), ("session 2", 1)]
        assert name(first, prompt="close the drawer") == ("session 3", 0)
        assert name(second) == ("session 1", 1)
