"""LIBERO's suites and their tasks by number; needs nothing installed.

A task is called "<suite>-<number>", such as "spatial-3", by LIBERO's own order, which starts at 0.
"""

MAX_STEPS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
"""Control steps after which an episode has failed: the first three as mimic-video, the rest as
openpi evaluates them."""
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}


def suite_tasks(suite: str) -> tuple[str, ...]:
    """All tasks of a suite, such as "goal-0" to "goal-9".

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in COUNTS:
        raise ValueError(f"unknown LIBERO suite {suite!r}; the suites are {', '.join(COUNTS)}")
    return tuple(f"{suite}-{number}" for number in range(COUNTS[suite]))


def max_steps(task: str) -> int:
    """The step limit of a task's suite."""
    suite, _ = split_task(task)
    return MAX_STEPS[suite.removeprefix("libero_")]


def split_task(task: str) -> tuple[str, int]:
    """("libero_spatial", 3) of "spatial-3".

    Raises:
        ValueError: there is no such task.
    """
    suite, _, number = task.partition("-")
    if suite not in COUNTS or not number.isdecimal() or int(number) >= COUNTS[suite]:
        names = ", ".join(f"{suite}-0 to {suite}-{n - 1}" for suite, n in COUNTS.items())
        raise ValueError(f"unknown LIBERO task {task!r}; the tasks are {names}")
    return f"libero_{suite}", int(number)
