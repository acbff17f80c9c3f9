"""openpi's own client package talks to the server, unchanged.

It needs numpy 1, so it runs with an interpreter of its own: MVJAX_OPENPI_PYTHON names one that has
`PACKAGES`; else uv, where it is installed, makes one.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running_server import Running
from scipy.spatial.transform import Rotation
from tiny_policy import tiny_policy
from tiny_stages import quick_compiles

from mvjax.policy.observation import Observation
from mvjax.policy.robot import trained_robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.client import Client

PROGRAM = str(Path(__file__).parent / "openpi_clients.py")
PACKAGES = ("openpi-client==0.1.2", "typing_extensions")  # it imports the other undeclared
UV = ("run", "--no-project", "--python=3.11", *(f"--with={p}" for p in PACKAGES), "python")


@pytest.fixture(scope="module")
def openpi():
    """openpi(kind, server) -> what openpi's client was answered."""
    python = os.environ.get("MVJAX_OPENPI_PYTHON")
    uv = shutil.which("uv")
    command = [python] if python else [uv, *UV]
    if not (python or uv):
        pytest.skip("openpi-client needs MVJAX_OPENPI_PYTHON or uv")
    tried = subprocess.run([*command, "-c", "import openpi_client"], capture_output=True, text=True)
    if tried.returncode and not python:
        pytest.skip(f"uv cannot install openpi-client: {tried.stderr.strip()[-200:]}")
    if not python:
        command.insert(1, "--offline")  # the packages are cached now

    def run(kind, server):
        said = subprocess.run(
            [*command, "-W", "ignore", PROGRAM, kind, "127.0.0.1", str(server.port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)

    return run


@pytest.fixture
def simple(request):
    running = Running("slow_server", "0", f"client={request.param}")
    yield running
    running.stop()


@pytest.mark.parametrize(("cameras", "number"), [("single", 1), ("tiled", 2), ("observed", 2)])
def test_libero_client_and_a_real_policy(openpi, cameras, number):
    """The answers are the policy's own, with the history of the pictures, as to our own client."""
    running = Running("tiny_policy", "client=libero", f"cameras={cameras}", "sizes=1", wait=False)
    try:
        with quick_compiles():
            policy, config = tiny_policy("libero", cameras=cameras)
            policy.warm_up()
        running.wait()
        found = openpi("libero", running)
        assert running.health()["errors"] == number
        ours = from_our_client(running.uri, number)
    finally:
        running.stop()
    assert found["metadata"]["model"] == "mimic-video"
    assert found["metadata"]["state_size"] == 8
    assert found["dtype"] == "float32" and found["timing"] == ["batch", "infer_ms", "wait_ms"]
    assert "'observation/state' has shape [5]; expected [8]" in found["refused"]["state"]
    assert "Traceback" not in found["refused"]["state"]
    if number > 1:
        words = "no 'observation/wrist_image', where the pictures of the camera 'observation.images"
        assert words in found["refused"]["camera"]

    rows = Rotation.from_rotvec([3.0, 0.2, 0.1]).as_matrix()[:2].ravel()
    proprio = np.concatenate([[0.1, 0.2, 1.0], rows, [0.03]]).astype(np.float32)[None]
    adapter = make_adapter("libero", trained_robot(config))
    assert len(found["actions"]) == len(ours) == 4
    for now, (actions, own) in enumerate(zip(found["actions"], ours)):
        asked = Observation(dict(zip(policy.cameras, histories(now))), proprio, ASKED)
        expected = adapter.actions(policy.act([asked])[0], STATE)
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        np.testing.assert_allclose(own, expected, atol=1e-5)
        assert np.abs(expected[:, 6]).tolist() == [1] * 4


ASKED, STATE = "put the bowl on the plate", np.array([0.1, 0.2, 1.0, 3.0, 0.2, 0.1, 0.03, -0.03])
HISTORIES = "observation/image_history", "observation/wrist_image_history"


def histories(now):
    """The pictures of both cameras that query `now` of `openpi_clients.libero` has seen."""
    seen = [max(0, now - back) for back in (4, 3, 2, 1, 0)]
    return [np.stack([shrunk_noise(first + seed) for seed in seen]) for first in (0, 100)]


def from_our_client(uri, cameras):
    """The actions of the same queries, each with the histories that it has seen."""
    with Client(uri) as client:
        return [
            client.infer(
                dict(zip(HISTORIES[:cameras], histories(now)))
                | {"observation/state": STATE, "prompt": ASKED}
            )["actions"]
            for now in range(4)
        ]


def shrunk_noise(seed, side=48):
    """The picture of `openpi_clients.picture`, by the same Pillow filter."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (2 * side, 2 * side, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((side, side), resample=Image.BILINEAR))


@pytest.mark.parametrize("simple", ["droid"], indirect=True)
def test_droid_client(openpi, simple):
    state = [*range(7), 0.25]
    found = openpi("droid", simple)
    assert found["actions"] == [state] * 4
    assert found["last"] == [number > 0.5 for number in state]


@pytest.mark.parametrize("simple", ["aloha"], indirect=True)
def test_aloha_client_with_its_chunk_broker(openpi, simple):
    """Steps 0, 1, 2 come from the first query, 3, 4, 5 from the second."""
    assert openpi("aloha", simple)["actions"] == [[0] * 14] * 3 + [[3] * 14] * 3
    assert simple.health()["queries"] == 2
