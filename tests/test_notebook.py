"""The notebook runs from top to bottom at smoke size, in the environment of the tests.

Its stored outputs are of a full run. To make them again, from the folder of the repository:

    jupyter nbconvert --to notebook --execute --inplace --coalesce-streams docs/start.ipynb
"""

import json
import sys
from pathlib import Path

import pytest

from launch.preflight import find_rendering_backend

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("metaworld", reason="the simulator is not installed")

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "start.ipynb"
KERNEL = "mvjax-tests"


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """A kernel of this Python, described in a folder of its own: none has to be installed."""
    folder = tmp_path / "jupyter/kernels" / KERNEL
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": KERNEL, "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return KERNEL


@pytest.mark.timeout(900)
def test_every_cell_runs_at_smoke_size(kernel, tmp_path, monkeypatch):
    if sys.platform == "linux" and find_rendering_backend() is None:
        pytest.skip("this machine cannot render")
    # Networks this small are slower to optimise than to run; every command compiles some again.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    run_dir = tmp_path / "smoke"
    parameters.source = f"SIZE, RUN_DIR = 'smoke', {str(run_dir)!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name=kernel, resources={"metadata": {"path": str(DOCS)}}
    )
    client.execute()
    assert (run_dir / "action/finished").exists() and (run_dir / "evaluation/report.html").exists()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/jpeg" in o.get("data", {}) for o in outputs) >= 7
    assert sum("<video" in o.get("data", {}).get("text/html", "") for o in outputs) == 2


def test_the_stored_notebook_is_small_and_without_errors():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 400_000
    for cell in notebook.cells:
        assert all(output.output_type != "error" for output in cell.get("outputs", ()))
