"""The tables of docs/pods.md are those of the code: nothing is compiled here."""

import pytest

from launch.benchmarks.pod_tables import DOCS, TABLES, changes, file_of, with_tables

LINES = [line for lines in TABLES.values() for line in lines.items()]


@pytest.mark.parametrize(("name", "arguments"), LINES)
def test_parameters_shapes_and_flops_are_those_on_file(name, arguments, monkeypatch):
    monkeypatch.chdir(DOCS.parent)  # the command names configs/
    assert file_of(name).exists() and changes(name, arguments) == [], (
        "run `python -m launch.benchmarks.pod_tables` (needs libtpu); it computes this line again: "
        f"python -m launch.estimate {arguments}"
    )


def test_the_page_shows_what_the_files_say():
    page = (DOCS / "pods.md").read_text()
    assert with_tables(page) == page, "run `python -m launch.benchmarks.pod_tables`"


def test_every_file_is_that_of_a_line():
    assert {file.stem for file in (DOCS / "estimates").iterdir()} == {name for name, _ in LINES}


def test_a_figure_that_changed_is_named(monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    name, arguments = LINES[0]
    wider = f"{arguments} --config.video_model.num_blocks=27 --config.lora.rank=128"
    changed = {line.partition(":")[0] for line in changes(name, wider)}
    assert {"parameters", "trainable", "array_bytes", "flops", "step_seconds"} <= changed
    assert not changed & {"device", "mesh", "batch_size", "hbm_bytes", "remat", "frozen"}
