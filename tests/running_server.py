"""Server processes for tests."""

import json
import time
import urllib.request

import forked


class Running:
    """A server program as a process, and its address.

    Its first line that starts with `says` ends with its port, after a colon if there is one.
    """

    def __init__(self, module: str, *arguments: str, says: str = "", wait: bool = True):
        self._says = says
        self.program = forked.Program(module, *arguments)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until clients can connect."""
        while not (said := self._said()):
            assert self.program.poll() is None, self.program.err
            time.sleep(0.02)
        self.port = int(said[0].split(":")[-1])
        self.uri = f"ws://127.0.0.1:{self.port}"

    def _said(self) -> list[str]:
        lines = self.program.out.splitlines(keepends=True)
        return [line for line in lines if line.startswith(self._says) and line.endswith("\n")]

    def get(self, path: str) -> bytes:
        """The body of an HTTP answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return response.read()

    def health(self) -> dict:
        """The server's counts and latencies."""
        return json.loads(self.get("/health"))

    def wait_for_clients(self, count: int, seconds: float = 8.0) -> None:
        """Waits until this number of clients is connected."""
        deadline = time.monotonic() + seconds
        while self.health()["clients"] != count:
            assert time.monotonic() < deadline, self.health()
            time.sleep(0.02)

    def stop(self) -> str:
        """Kills the process and returns its stderr."""
        self.program.kill()
        return self.program.finish().err
