"""Server processes for tests, and what is sent to them."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

TESTS = Path(__file__).parent
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])


class Running:
    """A server program of this folder as a process, and its address.

    Its first line that starts with `says` ends with its port, after a colon if there is one.
    """

    def __init__(self, *command: str, says: str = "", wait: bool = True):
        self._says = says
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONPATH": PATHS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )

        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until clients can connect."""
        lines = [self.process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(self._says):
            lines.append(self.process.stdout.readline())
        assert lines[-1], "".join(lines) + self.process.stderr.read()
        self.port = int(lines[-1].split(":")[-1])
        self.uri = f"ws://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """The body of an HTTP answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return response.read()

    def health(self) -> dict:
        """The server's counts and latencies."""
        return json.loads(self.get("/health"))

    def wait_for_clients(self, count: int, seconds: float = 8.0) -> float:
        """Waits until so many are connected; returns the seconds it took."""
        began = time.monotonic()
        while self.health()["clients"] != count:
            assert time.monotonic() < began + seconds, self.health()
            time.sleep(0.02)
        return time.monotonic() - began

    def stop(self) -> str:
        """Kills the process and returns what it complained about."""
        self.process.kill()
        return self.process.communicate()[1]
