"""The search for a mesh and a batch, and the tables of docs/pods.md; nothing is compiled here."""

from dataclasses import replace
from unittest import mock

import pytest

from configs import quickstart_video
from launch.benchmarks.pod_tables import DOCS, TABLES, changes, file_of, with_tables
from mvjax.experiment import Experiment
from mvjax.parallel import GB
from mvjax.pods.collectives import Collective
from mvjax.pods.compile import DoesNotFit, Estimate, report
from mvjax.pods.search import log, search

DEVICES = 8


def made(config, peak_bytes, link_seconds):
    return Estimate(
        device="a chip",
        devices=DEVICES,
        slices=1,
        mesh=dict(config.mesh),
        batch_size=config.training.batch_size,
        parameters=0,
        trainable=0,
        frozen=0,
        array_bytes=0,
        argument_bytes=0,
        peak_bytes=peak_bytes,
        host_bytes=0,
        hbm_bytes=GB,
        collectives=(),
        link_seconds=link_seconds,
        flops=0.0,
        peak_flops=1.0,
        mfu=0.4,
        step_seconds=config.training.batch_size / DEVICES,
        clips_per_second=0.0,
        compile_seconds=0.0,
    )


def searched(per_clip=GB // 8, links=lambda config: 0.0, config=None, **settings):
    """(found, what was said) with a compiler that counts a share of the memory per clip."""

    def compiled(experiment):
        config = experiment.config
        batch = config.training.batch_size
        clips = batch / DEVICES
        peak = per_clip(clips) if callable(per_clip) else GB // 100 + per_clip * clips
        if peak > GB:
            raise DoesNotFit("too large")
        return made(config, int(peak), links(config))

    said = []
    with mock.patch.object(log, "info", said.append):
        found = search(
            Experiment.from_config(config or quickstart_video.get_config("smoke")),
            **dict(devices=DEVICES, slices=1, hbm_bytes=GB, batch_size=None, max_compiles=20)
            | settings,
            compiled=compiled,
        )
    return found, said


@pytest.mark.parametrize(("per_chip", "clips"), [(1, 8), (3, 24), (7, 56), (12, 96), (16, 128)])
def test_the_largest_batch_is_found_not_a_power_of_two(per_chip, clips):
    found, said = searched(per_clip=int(0.98 * GB) // per_chip)
    assert found.experiment.config.training.batch_size == found.estimate.batch_size == clips
    assert found.ended == f"{clips + 8} clips do not fit"
    assert found.flags.endswith(f"--config.training.batch_size={clips}")
    assert len(said) <= 3 + 3  # meshes; twice the batch, the largest, and one more


def test_the_mesh_with_the_shortest_exchanges_is_chosen():
    found, said = searched(links=lambda config: abs(config.mesh.fsdp - 4))
    assert dict(found.experiment.config.mesh) == dict(data=2, fsdp=4, context=1, tensor=1)
    tried = [line.partition(", ")[0].partition("] ")[2] for line in said]
    assert tried[:3] == [f"data={8 // n} fsdp={n} context=1 tensor=1" for n in (8, 4, 1)]
    assert "--config.mesh.data=2 --config.mesh.fsdp=4" in found.flags


def test_chips_share_a_clip_where_one_each_does_not_fit():
    found, said = searched(per_clip=int(1.5 * GB))
    assert (
        found.experiment.config.mesh.context == 2
        and found.experiment.config.training.batch_size == 4
    )
    assert said[0].endswith("does not fit") and found.ended == "8 clips do not fit"


def test_a_larger_batch_that_is_slower_is_not_taken():
    found, _ = searched(links=lambda config: config.training.batch_size**2)
    assert found.estimate.batch_size == 8
    assert found.ended == "with 16 clips a step takes longer per clip"


def test_the_budget_ends_a_search_and_names_the_next_batch():
    found, said = searched(max_compiles=4)
    assert len(said) == 4 and found.estimate.batch_size == 16
    assert found.ended == "--max_compiles=4; 56 clips were not tried"


def test_memory_may_grow_faster_than_predicted():
    found, said = searched(per_clip=lambda clips: GB // 100 + GB * clips**2 // 500)
    assert found.estimate.batch_size == 8 * 22 and found.ended == f"{8 * 23} clips do not fit"
    assert len(said) < 15


def test_a_given_batch_is_kept_and_decides_the_context():
    found, _ = searched(batch_size=2)
    assert found.experiment.config.mesh.context == 4 and found.estimate.batch_size == 2
    assert found.ended == "the batch was given"


def test_micro_batches_make_the_smallest_batch_larger():
    config = quickstart_video.get_config("smoke")
    config.training.accumulate = 4
    found, _ = searched(config=config, batch_size=32)
    assert found.experiment.config.mesh.context == 1


def test_a_search_without_a_result_is_refused():
    with pytest.raises(DoesNotFit, match="none of the 9 programs tried fits; use"):
        searched(per_clip=100 * GB)
    with pytest.raises(DoesNotFit, match="no mesh of 9 devices was worth compiling"):
        searched(batch_size=2, devices=9)
    with pytest.raises(DoesNotFit, match="no mesh of 8 devices was worth compiling"):
        searched(hbm_bytes=1000)


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


def test_the_report_lists_every_exchange():
    config = quickstart_video.get_config("smoke")
    estimate, experiment = made(config, GB // 2, 0.5), Experiment.from_config(config)
    assert "exchange    none" in report(experiment, "v5e:2x4", estimate)
    exchanges = (Collective("all-gather", False, 3, GB), Collective("all-reduce", True, 1, GB))
    lines = report(experiment, "v5e:2x4", replace(estimate, collectives=exchanges)).splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("exchange"))
    assert "3 x all-gather, 1.00 GB" in lines[first]
    assert "1 x all-reduce between slices, 1.00 GB" in lines[first + 1]
    assert "0.5 s if all links are busy" in lines[first + 2]
    assert any("peak 0.50 GB of 1.00 GB per chip (50%): fits" in line for line in lines)
