"""The Python of LIBERO's own environment (`bash launch/libero.sh`)."""

import importlib.util
import os
import sys
from pathlib import Path

PYTHON_VARIABLE = "MVJAX_LIBERO_PYTHON"
_ROOT = Path(__file__).parents[3]


def libero_python() -> Path:
    """Where it is.

    Raises:
        FileNotFoundError: there is none yet.
    """
    given = os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else _ROOT / ".venv-libero" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"LIBERO has an environment of its own, but there is no {python}: make it with `bash "
            f"launch/libero.sh`, or set {PYTHON_VARIABLE}."
        )
    return python


def in_libero_python(module: str) -> None:
    """Runs `python -m module` with the same arguments there, in place of this process.

    Returns where LIBERO is installed beside this interpreter already.

    Raises:
        FileNotFoundError: there is no such Python yet.
    """
    if importlib.util.find_spec("libero") is None:
        python = str(libero_python())
        path = {"PYTHONPATH": str(_ROOT)}
        os.execve(python, [python, "-m", module, *sys.argv[1:]], {**os.environ, **path})
