"""Clients that vanish, stop reading, break the policy or have no key, and the other clients."""

import contextlib
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running_server import Running

from mvjax.serving.client import Client, QueryRefused
from mvjax.serving.protocol import encode

PICTURE = np.zeros((8, 8, 3), np.uint8)
VANISHING = """
import sys, time
from websockets.sync.client import connect
with connect(sys.argv[1], compression=None) as connection:
    connection.recv()
    connection.send(sys.stdin.buffer.read())
    print("asked", flush=True)
    time.sleep(60)
"""


def query(*numbers):
    return {
        "observation/image": PICTURE,
        "observation/state": np.array(numbers, np.float32),
        "prompt": "wait",
    }


@contextlib.contextmanager
def asking_process(server, how):
    """A client process that asks, and is stopped or killed before it has its answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", VANISHING, server.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdin.write(encode(query(0, 0)))
    process.stdin.close()
    assert process.stdout.readline() == b"asked\n"
    process.send_signal(how)
    yield
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def slow(request):
    running = Running("slow_server", *request.param)
    yield running
    running.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_that_vanishes_mid_query_frees_its_slot(tmp_path, how):
    """The server notices while the policy still computes, and other clients are unaffected."""
    computed = tmp_path / "computed"
    slow = Running("slow_server", "0", f"hold={computed}", "max_clients=2", "ping=0.4")
    try:
        with asking_process(slow, how):
            slow.wait_for_clients(0)
            assert slow.health()["vanished"] == 1
            computed.touch()
            with Client(slow.uri) as client, Client(slow.uri):
                np.testing.assert_array_equal(client.infer(query(3, 4))["actions"], [[3, 4]] * 4)
            assert slow.health()["queries"] == 1
    finally:
        slow.stop()


@pytest.mark.parametrize("slow", [["0", "send_timeout=1.5", "horizon=400000"]], indirect=True)
def test_a_client_that_does_not_read_holds_nobody_up(slow):
    """Its answers of 3 MB fill the socket's buffers."""
    with socket.create_connection(("127.0.0.1", slow.port)) as deaf:
        key = "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
        host = f"Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n"
        deaf.sendall(b"GET / HTTP/1.1\r\n" + host.encode())
        message = encode(query(1, 1))
        frame = b"\x82\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message  # mask of zeros
        for _ in range(6):
            deaf.sendall(frame)
        slow.wait_for_clients(1)
        with Client(slow.uri) as client:
            for number in range(5):
                assert client.infer(query(number, 2))["actions"][-1].tolist() == [number, 2]
        slow.wait_for_clients(0)
        assert slow.health()["vanished"] == 1


@pytest.mark.parametrize("slow", [["0.1", "window=0.2"]], indirect=True)
def test_a_query_that_breaks_the_policy_harms_no_other(slow):
    """The batch is repeated one by one; the reply is one line, the log has the traceback."""

    def ask(number):
        with Client(slow.uri) as client:
            try:
                return client.infer(query(number, 1))["actions"][0, 0]
            except QueryRefused as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(ask, [1, 13, 2, 3]))
    assert said == [1, "The policy failed: thirteen is too much", 2, 3]
    assert "RuntimeError: thirteen" in slow.stop()


def test_nothing_waits_for_the_window_when_all_have_asked():
    """One client alone is answered at once; two that ask together wait for each other only."""
    slow = Running("slow_server", "0", "window=5")
    try:
        with Client(slow.uri) as one, ThreadPoolExecutor(2) as pool:
            assert one.infer(query(0, 0))["server_timing"]["wait_ms"] < 1000
            with Client(slow.uri) as two:
                both = list(pool.map(lambda client: client.infer(query(0, 0)), (one, two)))
        assert [answer["server_timing"]["batch"] for answer in both] == [2, 2]
        assert max(answer["server_timing"]["wait_ms"] for answer in both) < 2000
    finally:
        slow.stop()


@pytest.mark.parametrize("slow", [["0", "api_key=sesame"]], indirect=True)
def test_a_key_is_demanded_of_those_who_ask_not_of_health_checks(slow):
    for key in ("", "open"):
        with pytest.raises(ConnectionError, match=r"refuses \(401\): .* Authorization"):
            Client(slow.uri, api_key=key)
    with Client(slow.uri, api_key="sesame") as client:
        assert client.infer(query(1, 2))["actions"].shape == (4, 2)
    assert slow.get("/healthz") == b"OK\n" and slow.health()["refused"] == 2
