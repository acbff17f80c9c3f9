"""The file that tells other programs that a training has reached its last step.

Exit code 0 does not: a run that SIGTERM interrupted has saved everything and ends with it, too.
"""

from pathlib import Path

import jax

FILE = "finished"


def note(workdir: Path, step: int) -> None:
    """Writes the file; its content is the step."""
    if jax.process_index() == 0:
        (workdir / FILE).write_text(f"{step}\n")


def forget(workdir: Path) -> None:
    """Removes the file: the run goes on, or is another one."""
    if jax.process_index() == 0:
        (workdir / FILE).unlink(missing_ok=True)
