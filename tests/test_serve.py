"""The commands `launch.serve` and `launch.robot_loop`."""

import numpy as np
import pytest
from running_server import Running
from tiny_policy import run_config, save_run
from tiny_stages import quick_compiles

from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.policy.load import load_policy
from mvjax.policy.observation import Observation
from mvjax.serving.client import Client

ACTION = "--config=configs/quickstart_action.py:smoke"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of both stages at toy size, and the configuration file that names it."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    (folder / "config.py").write_text(
        f"from tiny_policy import run_config\nget_config = lambda: run_config({str(folder)!r})"
    )
    return folder


def serve(trained, *flags):
    return Running(
        "launch.serve",
        f"--config={trained}/config.py",
        f"--checkpoint={trained}/action",
        *("--host=127.0.0.1", "--port=0", *flags),
        says="Serving",
        wait=False,
    )


def test_a_trained_policy_is_served_and_drives_a_robot(trained, command):
    """The reply is the loaded policy's; the example loop runs; SIGTERM ends the server cleanly."""
    pytest.importorskip("metaworld", reason="Meta-World is not installed")
    running = serve(trained, "--batch_sizes=1", "--prompt=close the drawer")
    try:
        config = run_config(trained)
        with quick_compiles():
            policy = load_policy(
                Experiment.from_config(config), trained / "action", Sampling(**config.sampler), 1
            )
            frame = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
            proprio = np.array([[0.1, 0.6, 0.2, 0.5]], np.float32)
            asked = Observation(
                np.stack([frame] * 5), proprio, "close the drawer", noise_key=("session 0", 0)
            )
            expected = policy.act([asked])[0]
        running.wait()
        with Client(running.uri) as client:
            assert client.metadata["fps"] == config.clip.fps
            message = {"observation/image": frame, "observation/state": proprio[0]}
            np.testing.assert_allclose(client.infer(message)["actions"], expected, atol=1e-4)
        check_robot(command, running, ["--execute=2"])
        check_robot(command, running, ["--execute=4", "--nooverlap"])
        running.program.terminate()
        said = running.program.finish()
        assert said.out.endswith("Stopped.\n") and said.code == 0
        assert "Traceback" not in said.err
    finally:
        running.stop()


def check_robot(command, running, flags):
    try:
        MetaWorld("drawer-close-v3", 32, 32).close()
    except RuntimeError as error:
        pytest.skip(str(error))
    said = command("launch.robot_loop", f"--server={running.uri}", "--steps=12", *flags)
    assert said.code == 0, said.err
    assert said.out.startswith("No success after 12 steps") and "queries, p50" in said.out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint=nothing", "--port=0"], "nothing is not a training directory"),
        (["--checkpoint=x", "--client=gr00t"], "--client"),
        (["--checkpoint=x", "--client=aloha"], "was trained on 'metaworld_sawyer'"),
        (["--checkpoint=x", "--camera_size=640"], "--camera_size must be HEIGHTxWIDTH"),
        (
            ["--checkpoint=x", "--camera_size=side=480x640"],
            "but got 'side' in 'side=480x640'; it has",
        ),
        (["--checkpoint=x", "--batch_sizes=0"], "Batch sizes must be at least 1, got [0]"),
        (["--checkpoint=x", "--batch_sizes=one"], "--batch_sizes must be numbers such as 1,8"),
        (["--checkpoint=x", "--stop_step=99"], "stop_step must be between 0 and video_steps"),
        (["--checkpoint=x", "--port=70000"], "70000"),
        (["--checkpoint=x", "--api_key_file=nothing"], "nothing"),
        (["--checkpoint=x", "--window_ms=nan"], "--window_ms must be a finite number, got nan"),
        (["--checkpoint=x", "--port=0", "--prompt= "], "'prompt' has no visible character"),
        ([], "--checkpoint must be given"),
    ],
)
def test_mistakes_in_the_command(complains, flags, words):
    complains(words, "launch.serve", ACTION, *flags)


def test_a_key_that_is_empty_opens_the_server_to_nobody(command, complains, tmp_path):
    """Such as a secret that a cluster did not find."""
    flags = (ACTION, "--checkpoint=x", "--port=0")
    said = command("launch.serve", *flags, environment={"MVJAX_API_KEY": "\n"})
    assert said.code == 2 and "MVJAX_API_KEY is empty" in said.err
    (tmp_path / "key").write_text(" \n")
    complains("key is empty", "launch.serve", *flags, f"--api_key_file={tmp_path}/key")


def test_an_address_that_is_taken_is_said_first(complains):
    taken = Running("slow_server", "0")
    try:
        flags = ("--checkpoint=x", "--host=127.0.0.1", f"--port={taken.port}")
        words = f"Cannot listen at 127.0.0.1:{taken.port} (Address already in use)"
        complains(words, "launch.serve", ACTION, *flags)
    finally:
        taken.stop()


def test_a_robot_without_a_server_is_told(complains):
    flags = ("--server=ws://127.0.0.1:9", "--patience=0.1")
    complains("There is no policy server at ws://127.0.0.1:9", "launch.robot_loop", *flags)
