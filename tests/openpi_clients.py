"""openpi's own client, used as openpi's examples use it; runs where openpi-client is installed.

python tests/openpi_clients.py libero 127.0.0.1 8000; prints what it was answered as JSON.
"""

import json
import sys

import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy


def picture(seed, side=48):
    """A picture as the examples prepare theirs."""
    image = np.random.default_rng(seed).integers(0, 256, (2 * side, 2 * side, 3), np.uint8)
    return image_tools.convert_to_uint8(image_tools.resize_with_pad(image, side, side))


STATE = np.concatenate((np.array([0.1, 0.2, 1.0]), np.array([3.0, 0.2, 0.1]), [0.03, -0.03]))


def libero_element(seed):
    """What examples/libero sends."""
    return {
        "observation/image": picture(seed),
        "observation/wrist_image": picture(100 + seed),
        "observation/state": STATE,
        "prompt": "put the black bowl on the plate",
    }


def libero(client):
    """Three queries of one episode, messages that cannot be answered, and one more."""
    answers = [client.infer(libero_element(seed)) for seed in range(3)]
    one_picture = {k: v for k, v in libero_element(3).items() if k != "observation/wrist_image"}
    refused = {"state": refusal(client, {**libero_element(3), "observation/state": STATE[:5]})}
    if len(client.get_server_metadata()["cameras"]) > 1:
        refused["camera"] = refusal(client, one_picture)
    client.reset()
    answers.append(client.infer(libero_element(3)))
    return {
        "metadata": client.get_server_metadata(),
        "actions": [answer["actions"].tolist() for answer in answers],
        "dtype": str(answers[0]["actions"].dtype),
        "timing": sorted(answers[0]["server_timing"]),
        "refused": refused,
    }


def refusal(client, element):
    """The server's sentence."""
    try:
        client.infer(element)
    except RuntimeError as error:
        return str(error)
    return ""


def droid(client):
    """One query of examples/droid: arrays of several types, eight actions at a time."""
    element = {
        "observation/exterior_image_1_left": picture(1),
        "observation/wrist_image_left": picture(2),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.25]),
        "prompt": "do something",
    }
    chunk = client.infer(element)["actions"]
    return {"actions": chunk.tolist(), "last": (chunk[-1] > 0.5).tolist()}


def aloha(client):
    """Six control steps of examples/aloha: channels first, a chunk broker, several cameras."""
    broker = action_chunk_broker.ActionChunkBroker(policy=client, action_horizon=3)
    broker.reset()
    steps = []
    for step in range(6):
        cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        element = {
            "state": np.full(14, step, np.float64),
            "images": {name: np.transpose(picture(step), (2, 0, 1)) for name in cameras},
            "prompt": "take the towel",
        }
        steps.append(broker.infer(element)["actions"].tolist())
    return {"actions": steps}


def main(kind, host, port):
    """Connects as the examples do."""
    client = websocket_client_policy.WebsocketClientPolicy(host, int(port))
    print(json.dumps({"libero": libero, "droid": droid, "aloha": aloha}[kind](client)))


if __name__ == "__main__":
    main(*sys.argv[1:])
