"""The example robot's queries; `test_serve.py` lets it drive a policy of a server.

Two modules of `launch` define the same flags, so each is imported in a process of its own.
"""

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import sys
    import numpy as np
    from launch import robot_loop
    from mvjax.policy.observation import Observation

    def server(*names):
        cameras = {
            name: {"key": f"observation/images/{i}", "history": f"observation/images/{i}_history"}
            for i, name in enumerate(names)
        }
        return {"height": 64, "width": 64} | ({"cameras": cameras} if names else {})

    def keys(metadata):
        frames = {name: [camera] for name, camera in robot_loop.match(metadata).items()}
        seen = Observation(frames, np.zeros(4), "close the drawer")
        message = robot_loop.message_of(seen, metadata)
        return {key: found for key, found in message.items() if "image" in key}

    print(keys(server()))
    print(keys(server("images.gripper", "images.corner")))
    try:
        keys(server("images.corner", "images.side"))
    except ValueError as error:
        print(error)
    print("jax" in sys.modules)
"""


def test_every_camera_is_sent_under_the_key_that_the_server_names():
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    one, two, refused, jax = done.stdout.splitlines()
    assert one == "{'observation/image_history': ['corner']}"  # also of an earlier version
    history = "observation/images/{}_history"
    assert two == str({history.format(0): ["gripper"], history.format(1): ["corner"]})
    assert "'images.side', which Meta-World does not have" in refused
    assert jax == "False"
