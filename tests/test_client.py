"""The client library, and queries in the background, against real servers."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from running_server import Running

from mvjax.serving.client import Client, Overlap, QueryRefused, ServerUnreachable

PICTURE = np.zeros((8, 8, 3), np.uint8)


def query(*numbers):
    return {
        "observation/image": PICTURE,
        "observation/state": np.array(numbers, np.float32),
        "prompt": "go",
    }


@pytest.fixture(scope="module")
def server():
    running = Running("slow_server", "0")
    yield running
    running.stop()


def test_it_asks_resets_and_is_told_what_is_wrong(server):
    with Client(server.uri) as client:
        assert client.metadata == {"observed_frames": 1}
        answer = client.infer(query(1, 2))
        np.testing.assert_array_equal(answer["actions"], np.tile(np.float32([1, 2]), (4, 1)))
        assert set(answer["server_timing"]) == {"infer_ms", "wait_ms", "batch"}
        client.reset()
        with pytest.raises(QueryRefused, match=r"'observation/state' has shape \[3\]; expected"):
            client.infer(query(1, 2, 3))
        assert client.infer(query(5, 6))["actions"][0, 0] == 5


def test_a_message_too_large_to_be_read_is_refused_and_the_next_goes_through(server):
    with Client(server.uri) as client:
        with pytest.raises(QueryRefused, match=r"has 804\d+ bytes, .* more than"):
            client.infer({"x": np.zeros(80_400_000, np.uint8)})
        assert client.infer(query(5, 6))["actions"][0, 0] == 5


def test_a_server_that_is_started_again_is_found_again(caplog):
    first = Running("slow_server", "0")
    with Client(first.uri, patience=15) as client:
        client.infer(query(0, 0))
        first.stop()
        second = Running("slow_server", "0", f"port={first.port}")
        try:
            assert client.infer(query(7, 8))["actions"][0, 0] == 7
            assert "connection lost" in caplog.text and "reconnecting" in caplog.text
        finally:
            second.stop()


def test_a_server_that_is_gone_is_said_to_be():
    running = Running("slow_server", "0")
    with Client(running.uri) as client:
        running.stop()
        client._patience = 0.2
        with pytest.raises(ServerUnreachable, match=f"no policy server at {running.uri}.*serve"):
            client.infer(query(0, 0))


def test_an_address_that_is_none_is_said_at_once():
    with pytest.raises(ValueError, match="http://robot is not an address"):
        Client("http://robot")


def test_a_late_answer_is_not_taken_for_the_next(tmp_path):
    computed = tmp_path / "computed"
    running = Running("slow_server", "0", f"hold={computed}")
    try:
        with Client(running.uri, timeout=0.3) as client:
            with pytest.raises(ServerUnreachable, match=r"has not answered for 0\.3 s"):
                client.infer(query(1, 1))
            computed.touch()
            client._timeout = 10
            assert client.infer(query(2, 2))["actions"][0, 0] == 2
    finally:
        running.stop()


def test_a_client_process_imports_no_jax(server):
    program = (
        "import sys; from mvjax.serving.client import Client\n"
        "import numpy as np\n"
        f"with Client({server.uri!r}) as client:\n"
        "    message = {'observation/image': np.zeros((8, 8, 3), np.uint8), 'prompt': 'go',\n"
        "               'observation/state': np.zeros(2)}\n"
        "    print(client.infer(message)['actions'].shape, 'jax' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout == "(4, 2) False\n" and not said.stderr


class Policy:
    """Answers with chunks that say which query and which step they are for."""

    def __init__(self, horizon):
        self.horizon, self.asked, self.answer = horizon, [], threading.Semaphore(0)

    def infer(self, observation):
        step = observation["step"]
        self.asked.append(step)
        assert self.answer.acquire(timeout=5)
        return {"actions": np.array([[step, step + i] for i in range(self.horizon)])}


@pytest.fixture
def overlap():
    policy = Policy(horizon=6)
    overlap = Overlap(policy.infer)
    overlap.policy = policy
    yield overlap
    policy.answer.release(10)
    overlap.close()


def test_the_robot_moves_on_while_the_next_chunk_is_computed(overlap):
    """Query 2 is answered during step 4: from step 5 on, its actions for the present are taken."""
    overlap.policy.answer.release()
    overlap.ask(0, {"step": 0})
    taken = [overlap.action(0), overlap.action(1)]
    overlap.ask(2, {"step": 2})
    assert overlap.asking
    taken += [overlap.action(step) for step in (2, 3, 4)]
    overlap.policy.answer.release()
    while not overlap._asked[1].done():
        time.sleep(0.001)
    taken += [overlap.action(step) for step in (5, 6, 7)]
    queries, steps = np.stack(taken).T
    assert steps.tolist() == list(range(8))  # never an action meant for another moment
    assert queries.tolist() == [0] * 5 + [2] * 3
    assert not overlap.asking and len(overlap.latencies) == 2


def test_the_robot_waits_only_when_its_chunk_is_used_up(overlap):
    overlap.policy.answer.release()
    overlap.ask(0, {"step": 0})
    overlap.action(0)
    before = overlap.waited
    overlap.ask(1, {"step": 1})
    for step in range(1, 6):
        overlap.action(step)
    assert overlap.waited == before

    def answer_late():
        while overlap.asking:  # until the robot stands still
            time.sleep(0.001)
        time.sleep(0.1)
        overlap.policy.answer.release()

    threading.Thread(target=answer_late, daemon=True).start()
    assert overlap.action(6).tolist() == [1, 6]
    assert overlap.waited - before >= 0.1


def test_asking_too_rarely_or_twice_is_an_error(overlap):
    with pytest.raises(RuntimeError, match="Step 0 has no action"):
        overlap.action(0)
    overlap.ask(0, {"step": 0})
    with pytest.raises(RuntimeError, match="query of step 0 has not been answered"):
        overlap.ask(1, {"step": 1})
    overlap.policy.answer.release()
    overlap.action(0)
    with pytest.raises(RuntimeError, match="chunk holds 6 from step 0 on"):
        overlap.action(6)


def test_what_goes_wrong_in_the_background_is_raised_in_the_loop():
    def refuse(observation):
        raise QueryRefused("no such prompt")

    overlap = Overlap(refuse)
    overlap.ask(0, {})
    with pytest.raises(QueryRefused, match="no such prompt"):
        overlap.action(0)
    overlap.close()
