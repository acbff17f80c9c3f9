"""The server in a process of its own, with real clients over real sockets."""

import contextlib
import random
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from running_server import Running
from tiny_policy import SIZE, random_observation, tiny_policy
from tiny_stages import quick_compiles
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mvjax.serving.client import Client, QueryRefused
from mvjax.serving.protocol import decode, encode

PICTURE = np.zeros((*SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def starting():
    running = Running("tiny_policy", "max_clients=12", "ping=5", "sizes=1,4", wait=False)
    yield running
    assert running.program.poll() is None
    assert "Traceback" not in running.stop()


@pytest.fixture(scope="module")
def policy(starting):
    with quick_compiles():
        policy, _ = tiny_policy()
        policy.warm_up()
        yield policy


@pytest.fixture(scope="module")
def server(starting, policy):
    starting.wait()
    return starting


def message(observation, **more):
    return {
        "observation/image_history": observation.frames,
        "observation/state": observation.proprio[-1],
        "prompt": observation.instruction,
        **more,
    }


def single(observation, index=-1, **more):
    return {
        "observation/image": observation.frames[index],
        "observation/state": observation.proprio[-1],
        "prompt": observation.instruction,
        **more,
    }


def assert_close(actions, expected):
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-4)


def test_eight_clients_at_once_each_get_the_answer_to_their_own_query(server, policy):
    """Every answer equals that of the policy asked alone, and no two answers are equal."""
    rounds, clients = 12, 8
    queries = [[random_observation(100 * c + r) for r in range(rounds)] for c in range(clients)]

    def drive(mine):
        with Client(server.uri) as client:
            return [client.infer(message(query)) for query in mine]

    before = server.health()["queries"]
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(drive, queries))
    assert server.health()["queries"] - before == rounds * clients
    expected = [[policy.act([query])[0] for query in mine] for mine in queries]
    flat = np.stack([chunk for mine in expected for chunk in mine]).reshape(rounds * clients, -1)
    apart = np.abs(flat[:, None] - flat).max(axis=-1) + np.eye(len(flat))
    assert apart.min() > 1e-3  # or the comparison below could not distinguish them
    for mine, theirs in zip(expected, answers):
        for chunk, answer in zip(mine, theirs):
            assert_close(answer["actions"], chunk)
    batches = [answer["server_timing"]["batch"] for mine in answers for answer in mine]
    assert max(batches) == 4  # simultaneous queries shared one


def test_single_pictures_become_a_history_of_the_connection(server, policy):
    shown = random_observation(5)
    frames = shown.frames
    with Client(server.uri) as client, Client(server.uri) as other:
        for now in range(5):
            answer = client.infer(single(shown, now))["actions"]
            other.infer(single(random_observation(6), now))  # another connection, another history
            history = frames[[max(0, now - back) for back in (4, 3, 2, 1, 0)]]
            assert_close(answer, policy.act([replace(shown, frames=history)])[0])
        first = policy.act([replace(shown, frames=np.stack([frames[2]] * 5))])[0]
        assert_close(client.infer(single(shown, 2, reset=True))["actions"], first)
        client.infer(single(shown, 3))
        client.reset()
        assert_close(client.infer(single(shown, 2))["actions"], first)
        renamed = replace(shown, instruction="close the window")
        expected = policy.act([replace(renamed, frames=np.stack([frames[4]] * 5))])[0]
        assert_close(client.infer(single(renamed, 4))["actions"], expected)


def test_a_refused_message_leaves_the_history_as_it_was(server, policy):
    shown = random_observation(8)
    with Client(server.uri) as client:
        client.infer(single(shown, 0))
        with pytest.raises(QueryRefused, match="NaN"):
            bad = single(random_observation(9), 1) | {"prompt": shown.instruction}
            client.infer(bad | {"observation/state": np.full(4, np.nan)})
        history = shown.frames[[0, 0, 0, 0, 1]]
        expected = policy.act([replace(shown, frames=history)])[0]
        assert_close(client.infer(single(shown, 1))["actions"], expected)


GOOD = single(random_observation(0))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"observation/image": None}, "must be a uint8 array (0 to 255), not NoneType"),
        ({"observation/image": PICTURE.astype(np.float32)}, "not float32 of shape [48, 32, 3]"),
        ({"observation/image": PICTURE[..., :2]}, "has shape [48, 32, 2]; expected [h, w, 3]"),
        ({"observation/image": PICTURE[None]}, "has shape [1, 48, 32, 3]; expected [h, w, 3]"),
        ({"observation/image": PICTURE[:0]}, "is 0x32 pixels"),
        ({"observation/image": np.zeros((2049, 1, 3), np.uint8)}, "is 2049x1 pixels"),
        ({"observation/image_history": np.stack([PICTURE] * 3)}, "takes [5, h, w, 3]"),
        ({"observation/image_history": PICTURE}, "expected [t, h, w, 3]"),
        ({"observation/state": np.zeros(5)}, "has shape [5]; expected [4]"),
        ({"observation/state": np.array([0, 0, np.nan, 0])}, "NaN, infinite or beyond float32"),
        ({"observation/state": np.array([0, 0, -np.inf, 0])}, "NaN, infinite"),
        ({"observation/state": np.full(4, 1e300)}, "beyond float32"),
        ({"observation/state": np.zeros(4, bool)}, "must be an array of numbers, not bool"),
        ({"observation/state": [0, 0, "x", 0]}, "not a list of numbers"),
        ({"observation/state": "0000"}, "not str"),
        ({"prompt": 7}, "'prompt' must be a string, not int"),
        ({"prompt": ""}, "has no 'prompt'"),
        ({"prompt": "  \u200b\x00"}, "'prompt' has no visible character"),
        ({"observation/state_history": np.ones((1, 4))}, "not the last state of"),
        ({"observation/image_history": np.full((5, *PICTURE.shape), 7, np.uint8)}, "not the last"),
        ({"prompt": "x" * 1001}, "has 1001 characters; at most 1000"),
        ({"reset": 1}, "'reset' must be true or false"),
        ({"observation/image": np.zeros((600, 600, 3), np.uint8)}, "at most 1048576 are accepted"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_and_the_connection_stays(server, change, words):
    with Client(server.uri) as client:
        connection = client._connection
        with pytest.raises(QueryRefused) as refused:
            client.infer(GOOD | change)
        assert words in str(refused.value) and str(refused.value).count("\n") == 0
        assert "Traceback" not in str(refused.value)
        assert client.infer(GOOD)["actions"].shape == (4, 4)
        assert client._connection is connection


def test_what_is_missing_is_said(server):
    with Client(server.uri) as client:
        for key in GOOD:
            with pytest.raises(QueryRefused, match=f"has no '{key}'"):
                client.infer({name: value for name, value in GOOD.items() if name != key})
        assert client.infer(GOOD)["actions"].shape == (4, 4)


def test_messages_that_are_no_observation_get_a_sentence(server):
    with connect(server.uri, compression=None) as connection:
        assert decode(connection.recv())["model"] == "mimic-video"
        for sent, words in (
            ("hello", "binary messages of msgpack"),
            (b"", "not a msgpack map"),
            (msgpack.packb([1]), "a map, not list"),
            (b"\x80\x80", "not a msgpack map"),
            (encode({}), "no 'prompt'"),
        ):
            connection.send(sent)
            assert words in connection.recv(5)
        connection.send([encode(GOOD)[:100], encode(GOOD)[100:]])  # in fragments
        assert decode(connection.recv(5))["actions"].shape == (4, 4)
        connection.send(bytes(2**21 + 1))  # beyond what is read at all
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(5)
    with Client(server.uri) as client:
        assert client.infer(GOOD)["actions"].shape == (4, 4)


def mutated(rng, good):
    """A message that is broken in one of several ways, or replaced by noise."""
    kind, data = rng.randrange(6), bytearray(good)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 2:
        return bytes(data) + rng.randbytes(rng.randrange(1, 9))
    if kind == 3:  # text and structure, not pixels, are at both ends
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(90) if rng.random() < 0.5 else -1 - rng.randrange(180)
            data[at] = rng.randrange(256)
        return bytes(data)
    if kind == 4:
        at = rng.randrange(120)
        return bytes(data[:at] + rng.randbytes(rng.randrange(1, 6)) + data[at + 2 :])
    key = rng.choice(list(GOOD))
    odd = [None, -1, 1e308, "x", [], {}, [[]], np.zeros((0, 3)), np.full(4, np.inf), {"a": 1}]
    odd += [np.zeros((1,) * 7, np.uint8), np.zeros((3, 3, 3), np.int64), [np.float16("nan")] * 4]
    return encode(GOOD | {key: rng.choice(odd)})


def test_ten_thousand_broken_messages(server, policy):
    """Each gets one reply: an error, or actions if the mutation was harmless."""
    good, count = encode(GOOD), 10_000
    expected = policy.act(
        [replace(random_observation(0), frames=np.stack([GOOD["observation/image"]] * 5))]
    )
    sentences = 0

    def bombard(seed):
        rng, refused = random.Random(seed), 0
        with connect(server.uri, compression=None) as connection:
            connection.recv(5)
            for _ in range(count // 4):
                connection.send(mutated(rng, good))
                reply = connection.recv(10)
                if isinstance(reply, str):
                    refused += 1
                    assert 0 < len(reply) < 700 and "Traceback" not in reply, reply
                    assert "its log says why" not in reply  # every mistake was foreseen
                else:
                    assert {"actions", "reset"} & decode(reply).keys()
        return refused

    with ThreadPoolExecutor(4) as pool:
        sentences = sum(pool.map(bombard, range(4)))
    assert sentences > 0.7 * count
    with Client(server.uri) as client:
        assert_close(client.infer(GOOD)["actions"], expected[0])


def test_noise_on_the_socket_does_no_harm(server):
    for sent in (
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000,
        b"POST / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            with contextlib.suppress(ConnectionError):
                raw.sendall(sent)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(4096):
                    pass
    assert server.get("/healthz") == b"OK\n"


def test_health(server):
    with Client(server.uri) as client:
        client.infer(GOOD)
        server.wait_for_clients(1)
        health = server.health()
    assert health["status"] == "ok" and health["queries"] > 0
    assert set(health["latency_ms"]) == {"read", "wait", "infer", "total"}
    total, infer = health["latency_ms"]["total"], health["latency_ms"]["infer"]
    assert 0 < infer["p50"] <= total["p50"] <= total["p95"] <= total["p99"]


def test_what_is_strange_is_said_once_per_connection_and_counted(server, caplog):
    """Pictures of the client's own, a state in millimetres: answered, but not without a word."""
    odd = GOOD | {"observation/wrist_image": PICTURE, "observation/state": np.full(4, 900.0)}
    before = server.health()["notices"].get("state_far_outside", {"queries": 0, "connections": 0})
    for _ in range(2):
        with Client(server.uri) as client:
            assert client.metadata["embodiment"] == "metaworld_sawyer"
            assert client.metadata["camera"] == "observation.images.corner"
            assert client.metadata["actions"] == "action as values"
            said = client.infer(odd)["notices"]
            assert any("far outside" in text and "with 900" in text for text in said)
            assert any("'observation/wrist_image' is not read" in text for text in said)
            assert "notices" not in client.infer(odd)
    after = server.health()["notices"]["state_far_outside"]
    assert after["queries"] == before["queries"] + 4
    assert after["connections"] == before["connections"] + 2
    assert "units" in after["first"]
    assert caplog.text.count("The state is far outside") == 2  # the client logs what it is told


def test_a_full_server_says_so_and_takes_the_next_when_one_leaves(server):
    server.wait_for_clients(0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.uri)) for _ in range(12)]
        with pytest.raises(InvalidStatus) as error:
            connect(server.uri)
        assert error.value.response.status_code == 503
        assert b"has its 12 clients already" in error.value.response.body
        clients[0].close()
        server.wait_for_clients(11)
        with Client(server.uri) as client:
            assert client.infer(GOOD)["actions"].shape == (4, 4)


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_unknown_methods_are_refused(server, path):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", b"x", method="POST")
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(request, timeout=5)
