"""A server with a slow policy that needs no jax: the server itself is tested.

python tests/slow_server.py seconds_per_batch [client=droid] [max_clients=3] [ping=0.5] ...

With hold=FILE it answers nothing before that file is there.
"""

import asyncio
import sys
import time
from pathlib import Path

import numpy as np

from data_pipelines.vectors import parse
from mvjax.policy.robot import Robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.batching import Batcher
from mvjax.serving.server import PolicyServer, Serving
from mvjax.serving.session import SessionSpec

SIZES = {"plain": (2, 2), "libero": (7, 8), "aloha": (14, 14), "droid": (8, 8)}  # action, state


def main(
    seconds: float,
    client: str = "plain",
    most: str = "4",
    window: str = "0",
    horizon: str = "4",
    hold: str = "",
    **more: str,
):
    """Answers with chunks that repeat the state; a state of 13 breaks the policy."""
    dims = SIZES[client]

    def act(observations):
        time.sleep(seconds)
        while hold and not Path(hold).exists():
            time.sleep(0.01)
        states = np.stack([o.proprio[-1] for o in observations])
        if (states == 13).any():
            raise RuntimeError("thirteen\nis too much")
        return np.repeat(states[:, None, : dims[0]], int(horizon), axis=1)

    kinds = {"port": int, "max_clients": int, "ping": float, "send_timeout": float, "api_key": str}
    settings = {name: kinds[name](value) for name, value in more.items()}
    server = PolicyServer(
        Serving(**{"host": "127.0.0.1", "port": 0, **settings}),
        make_adapter(client, Robot(parse("actions"), parse("state"), *dims, embodiment=client)),
        SessionSpec(observed_frames=1, proprio_horizon=1),
        lambda clients: Batcher(act, int(most), float(window), clients),
        {"observed_frames": 1},
    )
    asyncio.run(server.run(lambda host, port: print(port, flush=True)))


if __name__ == "__main__":
    main(float(sys.argv[1]), **dict(argument.split("=", 1) for argument in sys.argv[2:]))
