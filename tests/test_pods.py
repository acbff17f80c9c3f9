"""The search for a mesh and a batch, and the tables of docs/pods.md; nothing is compiled here."""

import json
from dataclasses import replace
from unittest import mock

import pytest

from configs import quickstart_video
from launch.benchmarks.pod_tables import DOCS, TABLES, changes, file_of, with_tables
from launch.benchmarks.pretraining_cost import END as COST_END
from launch.benchmarks.pretraining_cost import with_table
from mvjax.experiment import Experiment
from mvjax.parallel import GB
from mvjax.pods.collectives import Collective
from mvjax.pods.compile import DoesNotFit, Estimate
from mvjax.pods.cost import PARTS, Product, Range
from mvjax.pods.report import report
from mvjax.pods.search import log, search

DEVICES = 8


def made(config, peak_bytes, seconds_per_clip=1.0):
    seconds = seconds_per_clip * config.training.batch_size / DEVICES
    return Estimate(
        device="a chip",
        devices=DEVICES,
        slices=1,
        mesh=dict(config.mesh),
        batch_size=config.training.batch_size,
        kept=config.video_model.remat,
        parameters=0,
        trainable=0,
        frozen=0,
        array_bytes=0,
        argument_bytes=0,
        peak_bytes=peak_bytes,
        host_bytes=0,
        hbm_bytes=GB,
        collectives=(),
        link_seconds=0.5,
        flops=4e14,
        peak_flops=1e15,
        step_seconds=Range.of(0.9 * seconds, 1.1 * seconds),
        mfu=Range(0.36, 0.4, 0.44),
        clips_per_second=DEVICES / seconds_per_clip,
        parts={part: Range(0.1, 0.125, 0.15) for part in PARTS},
        products_peak_share=0.22,
        worst_products=(Product("fusion.1", "layers.py:88 MLP", "16 x 2048", 28, 0.056, 0.027),),
        notes=("the kernel softmax is not known: its memory traffic alone is counted",),
        compile_seconds=0.0,
    )


def remat(name):
    config = quickstart_video.get_config("smoke")
    config.video_model.remat = name
    return config


# Of the memory of "attention".
KEPT = {"dots": 1.5, "hidden": 1.4, "outputs": 1.3, "attention": 1.0, "full": 0.5}


def searched(per_clip=GB // 8, slower=lambda config: 0.0, config=None, **settings):
    """(found, what was said) with a compiler that counts a share of the memory per clip.

    `slower`: an experiment's configuration -> seconds per clip beyond one.
    """

    def compiled(experiment):
        config = experiment.config
        batch = config.training.batch_size
        clips = batch / DEVICES
        peak = per_clip(clips) if callable(per_clip) else GB // 100 + per_clip * clips
        peak *= KEPT.get(config.video_model.remat, 1.0)
        if peak > GB:
            raise DoesNotFit("too large")
        return made(config, int(peak), 1.0 + slower(config))

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
    found, said = searched(slower=lambda config: abs(config.mesh.fsdp - 4))
    assert dict(found.experiment.config.mesh) == dict(data=2, fsdp=4, context=1, tensor=1)
    tried = [line.partition(", ")[0].partition("] ")[2] for line in said]
    assert tried[:3] == [f"data={8 // n} fsdp={n} context=1 tensor=1" for n in (8, 4, 1)]
    assert "--config.mesh.data=2 --config.mesh.fsdp=4" in found.flags


def test_chips_share_a_clip_where_one_each_does_not_fit():
    found, said = searched(config=remat("full"), per_clip=3 * GB)
    config = found.experiment.config
    assert config.mesh.context == 2 and config.training.batch_size == 4
    assert said[0].endswith("does not fit") and found.ended == "8 clips do not fit"


def test_a_larger_batch_that_is_slower_is_not_taken():
    found, _ = searched(slower=lambda config: config.training.batch_size)
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


def tried_remats(said):
    return [line.partition("remat ")[2].partition(":")[0] for line in said]


def test_a_policy_that_keeps_more_is_taken_if_it_fits_and_is_faster():
    time = {"dots": -0.2, "attention": 0.0}
    slower = lambda config: time.get(config.video_model.remat, 0.1)  # noqa: E731
    found, said = searched(config=remat("attention"), slower=slower, batch_size=8)
    assert tried_remats(said) == ["attention"] * 3 + ["dots"]
    assert found.experiment.config.video_model.remat == "dots"
    assert "--config.video_model.remat=dots" in found.flags
    large, said = searched(
        config=remat("attention"), slower=slower, batch_size=8, per_clip=int(0.8 * GB)
    )
    assert tried_remats(said)[3:] == ["dots", "hidden", "outputs"]  # none of them fits
    assert large.experiment.config.video_model.remat == "attention"
    _, said = searched(config=remat("auto"), batch_size=8)
    assert tried_remats(said) == ["dots"] * 3  # the memory of a GB holds all of a toy


def test_a_policy_that_keeps_less_is_tried_before_chips_share_a_clip():
    found, said = searched(config=remat("attention"), batch_size=8, per_clip=int(1.5 * GB))
    assert tried_remats(said)[:4] == ["attention"] * 3 + ["full"]
    config = found.experiment.config
    assert config.mesh.context == 1 and config.video_model.remat == "full"


def test_a_search_without_a_result_is_refused():
    with pytest.raises(DoesNotFit, match="none of the 9 programs tried fits; use"):
        searched(config=remat("full"), per_clip=100 * GB)
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
    assert {"parameters", "trainable", "array_bytes", "flops"} <= changed
    assert not changed & {"device", "mesh", "batch_size", "hbm_bytes", "remat", "frozen"}


def test_the_report_lists_times_and_every_exchange():
    config = quickstart_video.get_config("smoke")
    estimate, experiment = made(config, GB // 2), Experiment.from_config(config)
    assert "exchange    none" in report(experiment, "v5e:2x4", estimate)
    exchanges = (Collective("all-gather", False, 3, GB), Collective("all-reduce", True, 1, GB))
    lines = report(experiment, "v5e:2x4", replace(estimate, collectives=exchanges)).splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("exchange"))
    assert "3 x all-gather, 1.00 GB" in lines[first]
    assert "1 x all-reduce between slices, 1.00 GB" in lines[first + 1]
    assert "0.5 s if all links are busy" in lines[first + 2]
    assert any(line.startswith("step time   0.9 to 1.1 s by the compiled") for line in lines)
    assert any("40.0% MFU (36.0% to 44.0%)" in line for line in lines)
    assert any("attention kernels 0.125 s" in line for line in lines)
    assert any("worst: 2.7% in layers.py:88 MLP, window 16 x 2048" in line for line in lines)
    assert any(line.startswith("note ") and "softmax" in line for line in lines)
    assert any("peak 0.50 GB of 1.00 GB per chip (50%): fits" in line for line in lines)


def test_the_page_of_pretraining_shows_what_the_files_say():
    page = (DOCS / "pretraining.md").read_text()
    assert with_table(page) == page, "run `python -m launch.benchmarks.pretraining_cost`"


def test_the_cost_of_pretraining_is_proportional_to_hours_and_price():
    """An hour is 3600 s · 5 fps / 61 frames = 295 clips; the table has a row for each pod."""

    def cells(row):
        return [cell.strip() for cell in row.strip("| \n").split("|")]

    page = with_table("<!-- begin: launch.benchmarks.pretraining_cost -->\nx" + COST_END + "y", 4.0)
    rows = [cells(row) for row in page.splitlines()[3:-2]]
    assert rows[0][:3] == ["1,000", "295 k", "5.7 G"] and "$4 a chip-hour" in page
    made = json.loads(file_of("full_v6e_256").read_text())
    low = 1000 * 3600 * 5 / 61 * made["step_seconds"]["low"] / 3600  # a clip per chip and step
    assert float(rows[0][6].partition(" to ")[0]) == pytest.approx(low, rel=0.05)
    assert page.endswith("y") and len(rows) == 20
