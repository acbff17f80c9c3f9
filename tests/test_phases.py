"""The runner of phases with real commands: tiny Python programs in processes of their own."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.phases import Phase, run_phases

ROOT = Path(__file__).parents[1]


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def leaves(path: Path, then: str = "") -> tuple[str, ...]:
    """A command that adds a dot to a file at every call."""
    return program(f"open({str(path)!r}, 'a').write('.'); {then}")


def read(record: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(record.read_text())}


def start(script: Path, *phases: Phase) -> subprocess.Popen:
    """The phases in a process group of their own, as a terminal starts them."""
    listed = ", ".join(f"Phase({p.name!r}, {p.command!r})" for p in phases)
    script.write_text(
        "from pathlib import Path\n"
        "from launch.phases import Phase, run_phases\n"
        f"run_phases([{listed}], Path({str(script.with_name('phases.json'))!r}))\n"
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_finished_phases_are_skipped_and_a_changed_command_runs_again(tmp_path, capfd):
    record, first, second = (tmp_path / name for name in ("phases.json", "first", "second"))
    phases = [Phase("one", leaves(first)), Phase("two", leaves(second, "print('of two')"))]
    run_phases(phases, record)
    said = capfd.readouterr().out
    assert said.index("[1/2] one") < said.index("[2/2] two") < said.index("of two")
    assert shlex.join(["python", *phases[0].command[1:]]) in said  # a person can type it
    before = record.read_bytes()

    run_phases(phases, record)
    assert capfd.readouterr().out.count("done before") == 2
    assert record.read_bytes() == before and first.read_text() == second.read_text() == "."

    run_phases([phases[0], Phase("two", leaves(second, "print('changed')"))], record)
    said = capfd.readouterr().out
    assert "one: done before" in said and "changed" in said
    assert first.read_text() == "." and second.read_text() == ".."
    assert all(row["finished"] for row in read(record).values())


def test_a_failure_stops_with_its_code_and_advice_and_the_next_call_goes_on(tmp_path, caplog):
    record, done, ready, after = (tmp_path / n for n in ("phases.json", "done", "ready", "after"))
    check = f"import os, sys, time; time.sleep(0.3); sys.exit(0 if os.path.exists({str(ready)!r}) "
    phases = [
        Phase("before", leaves(done)),
        Phase("fragile", program(check + "else 7)")),
        Phase("after", leaves(after)),
    ]
    with pytest.raises(SystemExit) as stopped:
        run_phases(phases, record)
    assert stopped.value.code == 7
    assert "'fragile' stopped; run the same command again to continue." in caplog.messages
    rows = read(record)
    assert [row["finished"] for row in rows.values()] == [True, False] and not after.exists()
    spent = rows["fragile"]["seconds"]
    assert spent >= 0.3

    ready.touch()
    run_phases(phases, record)
    assert done.read_text() == after.read_text() == "."
    assert read(record)["fragile"]["seconds"] >= spent + 0.3  # both calls are counted
    assert all(row["finished"] for row in read(record).values())


def test_a_killed_phase_has_the_code_a_shell_gives_it(tmp_path):
    kill = Phase("killed", program("import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(SystemExit) as stopped:
        run_phases([kill], tmp_path / "phases.json")
    assert stopped.value.code == 137


@pytest.mark.parametrize("ending", ["sys.exit(130)", "sys.exit(0)", "sys.exit('stopped')"])
def test_ctrl_c_lets_the_phase_save_ends_with_130_and_can_be_continued(tmp_path, ending):
    started, saved, after = (tmp_path / name for name in ("started", "saved", "after"))
    code = f"""
import os, signal, sys, time
def save(*_):
    time.sleep(0.2)
    open({str(saved)!r}, "w").close()
    {ending}
if not os.path.exists({str(saved)!r}):
    signal.signal(signal.SIGINT, save)
    open({str(started)!r}, "w").close()
    time.sleep(60)
"""
    phases = Phase("long", program(code)), Phase("next", leaves(after))
    process = start(tmp_path / "run.py", *phases)
    wait_for(started)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and saved.exists() and not after.exists()
    assert "run the same command again" in said and "Traceback" not in said

    assert start(tmp_path / "run.py", *phases).wait(30) == 0
    assert after.read_text() == "."


def test_a_terminated_run_takes_its_phase_along(tmp_path):
    started, ended = tmp_path / "started", tmp_path / "ended"
    code = f"""
import signal, sys, time
def save(*_):
    open({str(ended)!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open({str(started)!r}, "w").close()
time.sleep(60)
"""
    process = start(tmp_path / "run.py", Phase("long", program(code)))
    wait_for(started)
    process.terminate()  # this process alone, unlike Ctrl-C
    process.communicate(timeout=30)
    assert process.returncode == 143 and ended.exists()
    assert not read(tmp_path / "phases.json")["long"]["finished"]  # 0 may mean "saved", not "done"


def test_the_memory_of_a_child_of_the_child_is_counted(tmp_path):
    eat = "block = bytearray(150_000_000); import time; time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {eat!r}])"
    record = tmp_path / "phases.json"
    run_phases([Phase("hungry", program(code))], record)
    assert 143 <= read(record)["hungry"]["peak_mb"] <= 250  # 150 MB in MiB, and two interpreters


def test_a_command_that_ends_with_0_before_its_work_is_done_is_not_finished(tmp_path, caplog):
    """As a training does that the machine sends SIGTERM, without the runner getting it."""
    record, proof, calls = (tmp_path / name for name in ("phases.json", "finished", "calls"))
    code = f"""
import os
open({str(calls)!r}, 'a').write('.')
if os.path.getsize({str(calls)!r}) == 2:
    open({str(proof)!r}, 'w')
"""
    phases = [Phase("train", program(code), str(proof)), Phase("after", leaves(tmp_path / "after"))]
    with pytest.raises(SystemExit) as stopped:
        run_phases(phases, record)
    assert stopped.value.code == 143 and "'train' stopped" in caplog.text
    assert not read(record)["train"]["finished"] and not (tmp_path / "after").exists()
    run_phases(phases, record)
    assert all(row["finished"] for row in read(record).values())
    assert calls.read_text() == ".." and (tmp_path / "after").exists()
