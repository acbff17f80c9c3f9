r"""Serves a trained policy to robots and simulators over openpi's websocket protocol.

    python -m launch.serve --checkpoint=runs/quickstart/action --port=8000

`--client=dataset` is for a robot that sends and takes the numbers of its dataset; `libero`, `aloha`
and `droid` are for openpi's clients of these robots. docs/serving.md describes the messages, and
what to check before you use a robot.
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
from mvjax.policy.robot import trained_robot
from mvjax.serving.adapters import CLIENTS, make_adapter
from mvjax.serving.batching import Batching
from mvjax.serving.messages import read_prompt
from mvjax.serving.notices import camera_sizes
from mvjax.serving.server import PolicyServer, Serving, make_server

CONFIG = config_flag()
CHECKPOINT = path_flag("checkpoint", "Training directory of the stage-2 or joint run.")
CLIENT = flags.DEFINE_enum("client", "plain", list(CLIENTS), "The kind of client.")
HOST = flags.DEFINE_string("host", "0.0.0.0", "Address to listen on; 0.0.0.0: all addresses.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0: any free one.", 0, 65535)
STOP_STEP = flags.DEFINE_integer("stop_step", 0, "Video denoising steps before acting.", 0)
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Batch sizes to compile.")
WINDOW = flags.DEFINE_float(
    "window_ms", 5.0, "Longest time that a query waits for a batch, in ms.", 0.0
)
MAX_CLIENTS = flags.DEFINE_integer("max_clients", 64, "Maximum number of connections.", 1)
MAX_MESSAGE = flags.DEFINE_integer("max_message_mb", 32, "Maximum size of a message, MiB.", 1)
CAMERA_SIZE = flags.DEFINE_string(
    "camera_size",
    "",
    "Height x width of the training pictures, such as 480x640, where the clip has another aspect; "
    "of single cameras: front=480x640,wrist=240x320.",
)
PROMPT = flags.DEFINE_string("prompt", "", "Instruction for clients that send none.")
API_KEY_FILE = flags.DEFINE_string(
    "api_key_file", "", "File of the key that clients must send; default: MVJAX_API_KEY, if set."
)

log = logging.getLogger(__name__)


def main() -> None:
    """Loads and compiles the policy, and serves it until Ctrl-C or SIGTERM."""
    config = CONFIG.value
    if not all(size.isdecimal() for size in BATCH_SIZES.value):
        raise ValueError(f"--batch_sizes must be numbers such as 1,8, got {BATCH_SIZES.value}")
    batching = Batching([int(size) for size in BATCH_SIZES.value], WINDOW.value / 1000)
    serving = Serving(
        host=HOST.value,
        port=PORT.value,
        max_clients=MAX_CLIENTS.value,
        api_key=api_key(),
        message_bytes=MAX_MESSAGE.value * 2**20,
    )
    if PROMPT.value:
        read_prompt({"prompt": PROMPT.value}, "")  # else every client would be told
    experiment = Experiment.from_config(config)  # which says first what is wrong with it
    robot = trained_robot(config)
    sizes = camera_sizes(CAMERA_SIZE.value, robot.cameras)
    sampling = experiment.sampling(stop_step=STOP_STEP.value)
    adapter = make_adapter(CLIENT.value, robot)
    check_address(serving.host, serving.port)
    policy = load_policy(experiment, Path(CHECKPOINT.value), sampling, max(batching.sizes))
    log.info("compiling the policy ...")
    server = make_server(
        policy,
        config,
        adapter,
        serving,
        batching=batching,
        prompt=PROMPT.value,
        camera_sizes=sizes,
    )
    asyncio.run(serve(server))


def api_key() -> str:
    """Returns the key of --api_key_file or MVJAX_API_KEY: a command line is visible to all."""
    if API_KEY_FILE.value:
        name, key = f"--api_key_file: {API_KEY_FILE.value}", Path(API_KEY_FILE.value).read_text()
    elif (key := os.environ.get("MVJAX_API_KEY")) is not None:
        name = "MVJAX_API_KEY"
    else:
        return ""
    if not key.strip():  # such as a secret that was not found: not a server for everyone
        raise ValueError(f"{name} is empty: give a key, or neither of the two for none.")
    return key.strip()


def check_address(host: str, port: int) -> None:
    """Raises OSError if the address cannot be used: loading the policy first takes minutes."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise OSError(f"Cannot listen at {host}:{port} ({reason}).") from error


async def serve(server: PolicyServer) -> None:
    """Serves until SIGINT or SIGTERM, then closes the clients' connections."""
    served = f"Serving {CLIENT.value} clients"
    serving = asyncio.create_task(
        server.run(lambda host, port: print(f"{served} at ws://{host}:{port}", flush=True))
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    await asyncio.wait([serving])
    if not serving.cancelled():
        serving.result()
    print("Stopped.", flush=True)


if __name__ == "__main__":
    run(main)
