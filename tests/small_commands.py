"""What `docs_commands.py` puts on the PATH in place of `mvjax`, `python`, `bash` and `pip`.

A page shows what a user types; here it is made small enough to be tried:

| a page says                 | what runs                                                      |
| --------------------------- | -------------------------------------------------------------- |
| `bash launch/quickstart.sh` | `python -m launch.quickstart --size=smoke`, without set-up     |
| `bash launch/test.sh`       | `python -m pytest -n 0 -q tests/test_clip.py`                  |
| `--config=quickstart...`    | the same with `:smoke`                                         |
| `train`                     | two steps, where the configuration is not the quickstart's     |
| `evaluate`                  | one episode of 24 steps per task; two moments of held-out data |
| `record`                    | one episode per task                                           |
| `generate`                  | two denoising steps                                            |
| `robot_loop`                | 16 control steps, ten times as fast                            |
| `benchmarks.speed`          | one step, one turn, no PyTorch; with `--data` 60 records       |
| `serve`                     | in the background, until the page's next server or its end, on |
|                             | a free port, with batches of one                               |
| `local -- COMMAND`          | COMMAND as above                                               |
| `pip install`               | refused: it would change the environment; give it a title      |

Everything else runs as it stands.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.cli import COMMANDS

READY = "Serving "  # how the server's line begins that says where it listens
READY_SECONDS = 240
PORT = "MVJAX_PAGE_PORT"  # variables that docs_commands.py sets
SERVERS = "MVJAX_PAGE_SERVERS"  # a folder: a log for every server, named by its process

_SMALLER = {
    "launch.quickstart": ("--size=smoke", "--nostudy"),
    "launch.record": ("--episodes=1",),
    "launch.generate": ("--steps=2",),
    "launch.robot_loop": ("--steps=16", "--speed=10"),
    "launch.benchmarks.speed": ("--steps=1", "--rounds=1", "--notorch", "--records=60"),
    "launch.serve": ("--batch_sizes=1",),
}
_TRAINED = ("--config.training.steps=2", "--config.training.checkpoint_every=2")
_PLAYED = ("--config.evaluation.episodes_per_task=1", "--config.evaluation.max_steps=24")
_OF_THE_QUICKSTART = "quickstart"


def small(module: str, words: Sequence[str]) -> list[str]:
    """The arguments of a module with those that make it small; the last of two flags counts."""
    if module == "launch.local" and "--" in words[:-1]:
        end = list(words).index("--")
        inner, *rest = words[end + 1 :]
        return [*words[: end + 1], inner, *small(_module(inner), rest)]
    words = [_smoke(word) for word in words]
    flags = {name: value for name, _, value in (word.partition("=") for word in words)}
    added = list(_SMALLER.get(module, ()))
    configuration = Path(flags.get("--config", "").partition(":")[0]).stem
    if module == "launch.train" and not configuration.startswith(_OF_THE_QUICKSTART):
        added += _TRAINED
    if module == "launch.evaluate":
        held_out = flags.get("--suite") in ("offline", "predictions")
        added += ("--moments=2",) if held_out else _PLAYED
    if module == "launch.serve" and "--port" not in flags:
        added.append(f"--port={os.environ[PORT]}")
    if module == "launch.robot_loop" and "--server" not in flags:
        added.append(f"--server=ws://localhost:{os.environ[PORT]}")
    return [*words, *added]


def _module(name: str) -> str:
    return f"launch.{name}" if name in COMMANDS else name


def _smoke(word: str) -> str:
    """--config=configs/quickstart_video.py -> --config=configs/quickstart_video.py:smoke."""
    name, _, value = word.partition("=")
    path, colon, _ = value.partition(":")
    if name != "--config" or colon or not Path(path).stem.startswith(_OF_THE_QUICKSTART):
        return word
    return f"{word}:smoke"


def main(program: str, *words: str) -> None:
    """Runs what a page has typed."""
    if program == "pip" or words[:2] == ("-m", "pip"):
        sys.exit(f"{program} {' '.join(words)}: it would change the environment; give the fence a "
                 'title that says where it was run, as ```bash title="..."')  # fmt: skip
    if program == "mvjax" and words and words[0] in COMMANDS:
        start = [sys.executable, "-c", "from launch.cli import main; main()", words[0]]
        _run(_module(words[0]), start, words[1:])
    elif program == "mvjax":
        _replace([sys.executable, "-c", "from launch.cli import main; main()", *words])
    elif program.startswith("python") and words[:1] == ("-m",) and words[1].startswith("launch."):
        _run(words[1], [sys.executable, "-m", words[1]], words[2:])
    elif program.startswith("python"):
        _replace([sys.executable, *words])
    elif words[:1] == ("launch/quickstart.sh",):
        _run("launch.quickstart", [sys.executable, "-m", "launch.quickstart"], words[1:])
    elif words[:1] == ("launch/test.sh",):
        _replace([sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/test_clip.py"])
    else:
        _replace([program, *words])


def _run(module: str, start: list[str], words: Sequence[str]) -> None:
    command = [*start, *small(module, words)]
    if module == "launch.serve" and "--help" not in words:
        sys.exit(_serve(command))
    _replace(command)


def _replace(command: list[str]) -> None:
    """Goes on as another program, which is looked for behind the folder of these programs."""
    sys.stdout.flush()
    behind = os.environ["PATH"].partition(os.pathsep)[2]
    program = shutil.which(command[0], path=behind) or command[0]
    os.execv(program, [program, *command[1:]])


def _serve(command: list[str]) -> int:
    """Leaves a server in the background; the exit code is 0 when it listens."""
    stop_servers(Path(os.environ[SERVERS]))
    said = Path(os.environ[SERVERS], "starting.log")
    with said.open("w") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    said = said.rename(said.with_name(f"{server.pid}.log"))
    deadline = time.monotonic() + READY_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        if any(line.startswith(READY) for line in said.read_text().splitlines()):
            print(said.read_text(), end="")
            return 0
        time.sleep(0.1)
    print(said.read_text(), end="", file=sys.stderr)
    print(f"the server does not listen after {READY_SECONDS} s or has ended", file=sys.stderr)
    return server.poll() or 1


def stop_servers(folder: Path, seconds: float = 20) -> None:
    """Ends the servers of a page: SIGTERM, then SIGKILL."""
    for log in folder.glob("[0-9]*.log"):
        pid, deadline = int(log.stem), time.monotonic() + seconds
        while _signal(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL):
            time.sleep(0.2)
        log.unlink()


def _signal(pid: int, number: int) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, number)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
