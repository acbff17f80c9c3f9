"""Cycles of the Pallas kernels: counting them, and the table that the estimate reads."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from launch.benchmarks.tpu_kernels import TABLE, DoesNotFit, Kernel, count_cycles, measure
from mvjax.models import splash

# Final bundles of splash attention's forward kernel on a v6e, 2 heads, 4 blocks of 1,280 queries
# and of keys. A number stands for so many bundles without jumps and regions.
BUNDLES: list[int | str] = [
    24,
    "  0x1a LB: > { /* Start region 120 */ }",
    74,
    "  0x65   : > { iteration_bounds: (2, 4, 4) }",
    59,
    "  0xa1   : > { /* Start region 29 :: Start region 30 :: Start region 31 */ }",
    2,
    "  0xa4   : > { sbr.rel (%p73176_p7) target = $region32 }",
    "  0xa5   : { /* End region 30 */ }",  # a delay after the jump, without the mark of the loop
    30,
    "  0xc4   : > { sbr.rel (%p29244_p10) target = $region48 }",
    244,
    " 0x1ba PF: > { /* Start/End empty region 48 :: Start region 49 :: Start region 50 */ }",
    12,
    " 0x1c7   : > { sbr.rel (%p29249_p2) target = $region52 }",
    5088,
    "0x15a9 PF: > { /* Start/End empty region 52 :: Start region 53 */ }",
    1,
    "0x15ab   : > { sbr.rel (%p29490_p1) target = $region56 }",
    342,
    "0x1703 PF: > { /* Start/End empty region 56 :: Start/End empty region 32 */ }",
    7,
    "0x170b   : > { sbr.rel (!%p68212_p11) target = $region120 }",
    1,
    "0x170f   : { /* End region 4 :: End region 119 */ }",
    4,
]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -r requirements-aot.txt",
)
table = {
    name: rows for name, rows in json.loads(TABLE.read_text()).items() if isinstance(rows, list)
}


def bundles(parts: list[int | str]) -> str:
    lines, inside = [], False
    for part in parts:
        if isinstance(part, str):
            inside = (inside or "LB:" in part) and "$region120" not in part
            lines.append(part)
        else:
            lines += [
                f" 0x{i:x}   : {'> ' * inside}{{ %{i} = vst [vmem:%s1] }}" for i in range(part)
            ]
    return "\n".join(lines) + "\n"


def test_cycles_of_a_step_and_of_the_first_and_last_step_of_a_row():
    found = count_cycles(bundles(BUNDLES))
    # All from the loop's head to its jump back are 5,871. 245 set the accumulators to zero before
    # the first block of keys, and 343 write the result after the last.
    assert (found.grid, found.step, found.edge) == ((2, 4, 4), 5283, 588)
    assert found.per_step == 5283 + 588 / 4
    assert found.idle == 5283 - 5089  # what is left where the block is masked


def test_a_text_that_is_no_kernel_is_refused():
    with pytest.raises(ValueError, match="a grid and a loop"):
        count_cycles(bundles([5]))
    with pytest.raises(ValueError, match="a loop inside a step"):
        count_cycles(bundles(BUNDLES).replace("0x1c7   : > ", "0x1c7   : > > "))


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
def test_the_table_has_the_kernels_of_every_generation(generation):
    names = {row["kernel"] for row in table[generation]}
    splash_names = {"splash_fwd", "splash_bwd", "splash_dq", "splash_dkv"}
    assert names >= splash_names | {"norm_rope_fwd", "norm_rope_bwd"}
    for row in table[generation]:
        assert row["cycles_per_step"] > 0 and row["head_dim"] == 128
        assert ("rows" in row) == row["kernel"].startswith("norm_rope")


@pytest.mark.parametrize("lengths", [(19200, 19200), (9600, 19200), (19200, 512)])
@pytest.mark.parametrize(
    ("generation", "device_kind"),
    [("v5e", "TPU v5 lite"), ("v5p", "TPU v5"), ("v6e", "TPU v6 lite"), ("tpu7x", "TPU7x")],
)
def test_the_blocks_that_attention_takes_are_in_the_table(
    generation, device_kind, lengths, monkeypatch
):
    monkeypatch.setattr(splash, "device_kind", lambda: device_kind)
    q = jax.ShapeDtypeStruct((1, 16, lengths[0], 128), jnp.bfloat16)
    sizes, _, _ = splash._block_sizes(q, lengths[1])
    known = {
        (row["kernel"], row["block_q"], row["block_kv"], row["block_kv_compute"])
        for row in table[generation]
        if "block_q" in row
    }
    assert {
        ("splash_fwd", sizes.block_q, sizes.block_kv, sizes.block_kv_compute),
        ("splash_bwd", sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute),
    } <= known


def test_cycles_grow_with_queries_times_keys():
    """A miscounted loop or region shows as a kernel that is far from the others of its kind."""
    for generation, rows in table.items():
        for name in ("splash_fwd", "splash_bwd"):
            large = [r for r in rows if r["kernel"] == name and r["block_kv"] >= 1280]
            each = [r["cycles_per_step"] / (r["block_q"] * r["block_kv"]) for r in large]
            assert max(each) < 1.6 * min(each), (generation, name)


about = json.loads(TABLE.read_text())["about"]
other_jax = jax.__version__.split(".")[:2] != about["jax"].split(".")[:2]


@needs_libtpu
@pytest.mark.skipif(other_jax, reason=f"the kernels of jax {about['jax']} are other programs")
def test_a_kernel_compiled_now_has_the_cycles_of_the_table():
    wanted = ("splash_fwd", 640, 512)
    row = next(
        row
        for row in table["v6e"]
        if (row["kernel"], row.get("block_q"), row.get("block_kv")) == wanted
    )
    found = measure(Kernel("splash_fwd", "v6e", row["queries"], row["keys"], 640, 512, 512))
    # Another libtpu may schedule a little differently.
    assert found.per_step == pytest.approx(row["cycles_per_step"], rel=0.05)


@needs_libtpu
def test_blocks_that_are_too_large_are_an_error_of_their_own():
    with pytest.raises(DoesNotFit, match="does not fit"):
        measure(Kernel("splash_fwd", "v5e", 3840, 3840, 1280, 3840, 1280))


@needs_libtpu
@pytest.mark.timeout(1200)  # a busy machine
def test_a_published_training_step_lies_in_the_range():
    """The blocks of Wan 14B as MaxDiffusion trained them in 36.0 s; a minute on one idle core."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.benchmarks.wan_step"],
        cwd=TABLE.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    low, high = map(float, re.search(r"([\d.]+) to ([\d.]+) s,", done.stdout).groups())
    assert low < 36.0 < high
    assert high < 1.3 * low
