r"""Serves a trained policy to robots and simulators, in openpi's websocket protocol.

    python -m launch.serve --checkpoint=runs/quickstart/action --port=8000

`--client=libero`, `aloha` or `droid` is for openpi's clients of these robots. docs/serving.md
describes the messages, and what to watch for on a robot.
"""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

from absl import flags

from launch.entry import config_flag, path_flag, run
from mvjax.experiment import Experiment
from mvjax.policy.load import load_policy
from mvjax.serving.adapters import CLIENTS, make_adapter, policy_vectors
from mvjax.serving.batching import Batching
from mvjax.serving.protocol import MessageLimits
from mvjax.serving.server import PolicyServer, Serving, make_server

CONFIG = config_flag()
CHECKPOINT = path_flag("checkpoint", "Training directory of the stage-2 run.")
CLIENT = flags.DEFINE_enum("client", "plain", list(CLIENTS), "Whose messages are understood.")
HOST = flags.DEFINE_string("host", "0.0.0.0", "Address to listen on; 0.0.0.0: all networks.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
STOP_STEP = flags.DEFINE_integer("stop_step", 0, "Denoising steps of the video before acting.", 0)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Batch sizes to compile.")
WINDOW = flags.DEFINE_float("window_ms", 5.0, "Longest wait of a query for others, ms.", 0.0)
MAX_CLIENTS = flags.DEFINE_integer("max_clients", 64, "Most connections at the same time.", 1)
MAX_MESSAGE = flags.DEFINE_integer("max_message_mb", 32, "Largest message, MB.", 1)
PROMPT = flags.DEFINE_string("prompt", "", "The instruction, for clients that send none.")
API_KEY_FILE = flags.DEFINE_string(
    "api_key_file", "", "File with the key that clients must show; else MVJAX_API_KEY, if set."
)

log = logging.getLogger(__name__)


def main() -> None:
    """Loads, compiles, serves until Ctrl-C or SIGTERM."""
    config = CONFIG.value
    if not all(size.isdecimal() for size in BATCH_SIZES.value):
        raise ValueError(f"--batch_sizes must be numbers such as 1,8, got {BATCH_SIZES.value}.")
    batching = Batching([int(size) for size in BATCH_SIZES.value], WINDOW.value / 1000)
    serving = Serving(
        host=HOST.value,
        port=PORT.value,
        max_clients=MAX_CLIENTS.value,
        api_key=api_key(),
        wire=MessageLimits(message_bytes=MAX_MESSAGE.value * 2**20),
    )
    experiment = Experiment.from_config(config)
    sampling = experiment.sampling(stop_step=STOP_STEP.value)
    adapter = make_adapter(CLIENT.value, policy_vectors(config))
    check_address(serving.host, serving.port)
    policy = load_policy(experiment, Path(CHECKPOINT.value), sampling, max(batching.sizes))
    log.info("compiling the policy ...")
    server = make_server(policy, config, adapter, serving, batching=batching, prompt=PROMPT.value)
    asyncio.run(until_told(server))


def api_key() -> str:
    """The key of --api_key_file or MVJAX_API_KEY; on a command line everyone could read it."""
    if not API_KEY_FILE.value:
        return os.environ.get("MVJAX_API_KEY", "")
    key = Path(API_KEY_FILE.value).read_text().strip()
    if not key:
        raise ValueError(f"--api_key_file: {API_KEY_FILE.value} is empty.")
    return key


def check_address(host: str, port: int) -> None:
    """Fails before the policy is loaded, which takes minutes, rather than after."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise OSError(f"Nobody can be served at {host}:{port} ({reason}).") from error


async def until_told(server: PolicyServer) -> None:
    """Serves; SIGINT and SIGTERM end it, saying goodbye to the clients."""
    serving = asyncio.create_task(server.run(say_where))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    await asyncio.wait([serving])
    if not serving.cancelled():
        serving.result()
    print("Stopped.", flush=True)


def say_where(host: str, port: int) -> None:
    """Says that clients can connect."""
    print(f"Serving {CLIENT.value} clients at ws://{host}:{port}", flush=True)


if __name__ == "__main__":
    run(main)
