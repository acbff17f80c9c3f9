"""The time of a compiled program, on short texts cut from what libtpu writes for a real step."""

import json

import pytest

from mvjax.pods.collectives import Collective
from mvjax.pods.cost import Range, cost
from mvjax.pods.hlo import HLO, arrays
from mvjax.pods.kernels import HBM_SHARE, kernel_table
from mvjax.pods.topology import generation, pod_size

V6E, V5P = pod_size("v6e:1x1")[1], pod_size("v5p:1x1x1")[1]
TOKENS = 19200
MB75 = TOKENS * 2048 * 2  # the residual stream of a clip in bfloat16


def costs(entry, *computations, table=None, kind="v6e", exchanges=()):
    """The cost of a program whose entry computation has these instructions."""
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    text = "\n\n".join([*computations, f"ENTRY %main () -> f32[] {{\n{body}\n}}"])
    chip = {"v6e": V6E, "v5p": V5P}[kind]
    return cost(HLO(text), kind, chip, exchanges, table={} if table is None else table)


def seconds_of_bytes(count, chip=V6E):
    return pytest.approx(count / (chip.hbm_bandwidth * HBM_SHARE))


# --- Bytes ---


def test_a_stream_takes_its_bytes_and_what_is_on_the_chip_takes_none():
    found = costs("""
%x = bf16[19200,2048]{1,0:T(8,128)(2,1)} parameter(0)
%v = bf16[19200,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
%y = bf16[19200,2048]{1,0:T(8,128)(2,1)} add(%x, %v)
%z = bf16[19200,2048]{1,0:T(8,128)(2,1)S(1)} negate(%v)
""")
    assert found.parts["memory_bound"].low == seconds_of_bytes(2 * MB75)
    assert found.seconds.low == found.parts["memory_bound"].low


def test_the_last_dimension_is_padded_to_the_lanes():
    (half,) = arrays("bf16[1,19200,16,64]{3,1,2,0:T(8,128)(2,1)}")
    (heads_last,) = arrays("f32[19200,16]{0,1:T(8,128)}")
    assert half.padded_bytes == 2 * half.bytes == 2 * TOKENS * 16 * 64 * 2
    assert heads_last.padded_bytes == heads_last.bytes  # tokens are in the lanes


SLICED = """%fused.1 (param_0: bf16[28,2048,256], param_1: s32[]) -> bf16[1,2048,256] {
  %param_0 = bf16[28,2048,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice.1 = bf16[1,2048,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %zero, %zero)
  ROOT %negate.1 = bf16[1,2048,256]{2,1,0:T(8,128)(2,1)S(1)} negate(%slice.1)
}"""


def test_of_a_stack_of_weights_a_block_reads_its_slice():
    found = costs(
        """
%w = bf16[28,2048,256]{2,1,0:T(8,128)(2,1)} parameter(0)
%i = s32[]{:T(128)S(6)} parameter(1)
%f = bf16[1,2048,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused.1
""",
        SLICED,
    )
    assert found.seconds.low == seconds_of_bytes(2048 * 256 * 2)


UPDATED = """%fused.2 (p: bf16[28,19200,2048], q: bf16[1,19200,2048], i: s32[]) -> bf16[1] {
  %param_0 = bf16[28,19200,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1,19200,2048]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %update = bf16[28,19200,2048]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0, %param_1, \
%param_2, %zero, %zero)
}"""


def test_what_is_kept_for_the_backward_pass_is_written_in_place():
    found = costs(
        """
%kept = bf16[28,19200,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
%x = bf16[1,19200,2048]{2,1,0:T(8,128)(2,1)} parameter(1)
%i = s32[]{:T(128)S(6)} parameter(2)
%f = bf16[28,19200,2048]{2,1,0:T(8,128)(2,1)} fusion(%kept, %x, %i), kind=kLoop, calls=%fused.2
""",
        UPDATED,
    )
    assert found.seconds.low == seconds_of_bytes(2 * MB75)


def test_copies_and_reductions_are_told_apart():
    found = costs("""
%x = f32[19200,2048]{1,0:T(8,128)} parameter(0)
%c = f32[19200,2048]{0,1:T(8,128)} copy(%x)
%zero = f32[]{:T(128)} constant(0)
%r = f32[19200]{0:T(1024)S(1)} reduce(%x, %zero), dimensions={1}, to_apply=%add
%start = (f32[19200,2048]{1,0:T(8,128)S(1)}, f32[19200,2048]{1,0}, u32[]) copy-start(%x)
%done = f32[19200,2048]{1,0:T(8,128)S(1)} copy-done(%start)
""")
    assert found.parts["copies"].low == seconds_of_bytes(4 * MB75)
    assert found.parts["reductions"].low == seconds_of_bytes(2 * MB75 + 4)
    assert found.parts["memory_bound"].low == 0


ERF = """%fused.3 (param_0: bf16[19200,8192]) -> bf16[19200,8192] {
  %param_0 = bf16[19200,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %convert.1 = f32[19200,8192]{1,0:T(8,128)} convert(%param_0)
  %erf.1 = f32[19200,8192]{1,0:T(8,128)} erf(%convert.1)
  ROOT %convert.2 = bf16[19200,8192]{1,0:T(8,128)(2,1)} convert(%erf.1)
}"""
GELU = """
%x = bf16[19200,8192]{1,0:T(8,128)(2,1)} parameter(0)
%f = bf16[19200,8192]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused.3
"""


def test_erf_computes_longer_than_its_bytes_take_on_v5p_alone():
    assert costs(GELU, ERF).seconds.low == seconds_of_bytes(2 * 4 * MB75)
    assert costs(GELU, ERF, kind="v5p").seconds.low == pytest.approx(491.5e-6, rel=1e-3)


# --- Loops ---

LOOP = """%body.1 (param.1: (s32[], f32[19200,2048])) -> (s32[], f32[19200,2048]) {
  %param.1 = (s32[]{:T(128)}, f32[19200,2048]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %x.1 = f32[19200,2048]{1,0:T(8,128)} get-tuple-element(%param.1), index=1
  %two.1 = s32[]{:T(128)} constant(2)
  %next.1 = s32[]{:T(128)S(6)} add(%i.1, %two.1)
  %y.1 = f32[19200,2048]{1,0:T(8,128)} negate(%x.1)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[19200,2048]{1,0:T(8,128)}) tuple(%next.1, %y.1)
}

%condition.1 (param.2: (s32[], f32[19200,2048])) -> pred[] {
  %param.2 = (s32[]{:T(128)}, f32[19200,2048]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}"""
WHILE = """
%start = (s32[]{:T(128)}, f32[19200,2048]{1,0:T(8,128)}) tuple(%zero, %x)
%loop = (s32[]{:T(128)}, f32[19200,2048]{1,0:T(8,128)}) while(%start), \
condition=%condition.1, body=%body.1
"""


def test_a_loop_counts_as_often_as_it_runs():
    once = seconds_of_bytes(4 * MB75).expected
    assert costs(WHILE, LOOP).seconds.low == pytest.approx(14 * once, rel=1e-6)  # two at a time
    stated = WHILE.rstrip() + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert costs(stated, LOOP).seconds.low == pytest.approx(5 * once, rel=1e-6)
    unknown = LOOP.replace("constant(28)", "parameter(1)")
    assert costs(WHILE, unknown).seconds.low == pytest.approx(once, rel=1e-6)


# --- Matrix products ---

PRODUCT = """%fused.4 (param_0: bf16[19200,2048], param_1: bf16[2048,2048]) -> bf16[19200,2048] {
  %param_0 = bf16[19200,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[2048,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[19200,2048]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
dim_labels=bf_oi->bf
}"""


def product(cycles, bounds):
    window = f'"window_config":{{"output_window_bounds":{bounds},"estimated_cycles":"{cycles}"}}'
    return f"""
%x = bf16[19200,2048]{{1,0:T(8,128)(2,1)}} parameter(0)
%w = bf16[2048,2048]{{1,0:T(8,128)(2,1)S(1)}} parameter(1)
%f = bf16[19200,2048]{{1,0:T(8,128)(2,1)}} fusion(%x, %w), kind=kOutput, calls=%fused.4, \
metadata={{op_name="jit(step)/dot_general"}}, backend_config={{"flag_configs":[],{window}}}
"""


def test_a_product_takes_the_cycles_of_its_window():
    found = costs(product(4803072, '["2","16"]'), PRODUCT)
    assert found.parts["products"].low == found.seconds.low == 4803072 / 1.75e9
    (worst,) = found.worst_products
    assert worst.window == "16 x 2048" and worst.source == "jit(step)/dot_general"
    share = 2 * TOKENS * 2048**2 / (918e12 * worst.seconds)
    assert worst.peak_share == found.products_peak_share == pytest.approx(share)


def test_a_product_takes_the_time_of_its_bytes_if_that_is_longer():
    found = costs(product(1000, '["200","16"]'), PRODUCT)
    assert found.parts["products"].low == seconds_of_bytes(2 * MB75)


def test_the_source_of_an_operation_is_its_line_in_our_files():
    header = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/mvjax/models/layers.py"
2 "/somewhere/mvjax/models/attention.py"

FunctionNames
1 "Linear.__call__"
2 "Attention.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=97 end_line=97 column=41 end_column=41}
2 {file_name_id=2 function_name_id=2 line=318 end_line=318 column=15 end_column=15}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

ENTRY %main () -> f32[] {
  %y = f32[] add(%a, %b), metadata={op_name="jit(step)/add" stack_frame_id=2}
}
"""
    program = HLO(header)
    ((instruction, _),) = program.runs()
    assert program.source(instruction) == "attention.py:318 Attention.__call__"


# --- Exchanges ---

GATHERED = """%fused.5 (param_0: bf16[256,2048]) -> bf16[2048,2048] {
  %param_0 = bf16[256,2048]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%param_0), replica_groups=[1,8]<=[8]
}"""


def test_exchanges_take_only_what_nothing_hides():
    entry = """
%x = bf16[256,2048]{1,0:T(8,128)(2,1)} parameter(0)
%plain = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[1,8]<=[8]
%f = bf16[2048,2048]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%fused.5
"""
    assert costs(entry, GATHERED).seconds.low == 0
    exchanges = [
        Collective("all-gather", False, 2, sent_bytes=8e9, exposed_bytes=4e9),
        Collective("all-reduce", True, 1, sent_bytes=1e9),
    ]
    found = costs(entry, GATHERED, exchanges=exchanges)
    assert found.seconds == found.parts["exposed_exchanges"] == Range(0.01, 0.015, 0.02)


# --- Pallas kernels ---

BLOCKS = {"block_q": 1280, "block_kv": 1280, "block_kv_compute": 640}
CYCLES = [
    {"kernel": "splash_fwd", **BLOCKS, "head_dim": 128, "cycles_per_step": 5000},
    {"kernel": "splash_bwd", **BLOCKS, "head_dim": 128, "cycles_per_step": 9000},
    {"kernel": "splash_dkv", **BLOCKS, "head_dim": 128, "cycles_per_step": 7000},
    {"kernel": "splash_fwd_segmented", **BLOCKS, "head_dim": 128, "cycles_per_step": 6000},
    {"kernel": "norm_rope_fwd", "rows": 1280, "cycles_per_step": 2000},
]
TABLE = {"v6e": CYCLES, "v5p": CYCLES}
STEPS = 16 * 15 * 15  # of the grid: heads, queries, keys


def splash(name, heads="16", results=2, length=TOKENS, **sizes):
    """A call as libtpu writes it, its metadata on a line of their own."""
    array = f"bf16[{heads},{length},128]{{2,1,0:T(8,128)(2,1)S(1)}}"
    metadata = json.dumps(sizes).replace('"', '\\"')
    return f"""
%mask = s8[1,15,15]{{2,1,0:T(8,128)(4,1)S(1)}} parameter(0)
%q = {array} parameter(1)
%k = {array} parameter(2)
%v = {array} parameter(3)
%{name}.3 = ({", ".join([array] * results)}) custom-call(%mask, %mask, %q, %k, /*index=4*/%v), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{metadata}"
}}}}, metadata={{op_name="jit(step)/pallas_call"}}
"""


def forward(**changes):
    return splash("splash_mha_fwd_residuals", **BLOCKS, **changes)


def backward(results=3, **changes):
    blocks = {"block_q_dkv": 1280, "block_kv_dkv": 1280, "block_kv_dkv_compute": 640}
    return splash("splash_mha_dkv_no_residuals", results=results, **blocks, **changes)


def test_a_kernel_takes_its_cycles_at_every_step_of_its_grid():
    found = costs(forward(), table=TABLE)
    assert found.seconds.low == found.parts["attention_kernels"].low == STEPS * 5000 / 1.75e9
    assert found.seconds.high == pytest.approx(1.05 * found.seconds.low) and not found.notes
    found = costs(backward(), table=TABLE)
    assert found.seconds.low == STEPS * 9000 / 1.75e9
    assert found.seconds.high == pytest.approx(1.25 * found.seconds.low)
    split = costs(backward(results=2), table=TABLE)  # without dq
    assert split.seconds.low == STEPS * 7000 / 1.75e9


def test_masking_padded_keys_takes_more_cycles():
    masked = forward().replace("%mask = s8[1,15,15]", "%mask = s32[19200,128]")
    assert costs(masked, table=TABLE).seconds.low == STEPS * 6000 / 1.75e9


@pytest.mark.parametrize(
    ("call", "heads", "cores"),
    [
        (forward, "16", 2),  # heads are a parallel axis of the grid
        (backward, "16", 1),  # no axis of the backward kernel is
        (backward, "2,8", 2),  # but that of a vmap
        (backward, "3,16", 1.5),  # two of three and the third after them
    ],
)
def test_which_kernels_use_both_cores_of_a_megacore(call, heads, cores):
    clips = 3 if heads == "3,16" else 1
    found = costs(call(heads=heads), table=TABLE, kind="v5p")
    cycles = 5000 if call is forward else 9000
    assert found.seconds.low == pytest.approx(clips * STEPS * cycles / cores / 1.75e9)


def test_other_blocks_are_scaled_by_their_area_and_it_says_so():
    found = costs(splash("splash_mha_fwd", block_q=1280, block_kv=3840), table=TABLE)
    assert found.seconds.low == pytest.approx(STEPS * 5000 / 1.75e9)
    assert found.notes == (
        "cycles of splash_fwd with blocks of 1280 x 3840 on v6e are scaled from those of "
        "1280 x 1280 (640 at a time)",
    )


@pytest.mark.parametrize(("kind", "chip", "share"), [("v6e", V6E, 0.3), ("v5p", V5P, 0.6)])
def test_without_cycles_a_share_of_the_peak_is_assumed_and_it_says_so(kind, chip, share):
    found = costs(forward(), kind=kind)
    flops = 4 * 16 * TOKENS**2 * 128
    assert found.seconds.low == pytest.approx(flops / (chip.peak_flops * share))
    assert found.notes[0].startswith("no cycles of splash_fwd with blocks of 1280 x 1280")
    assert f"on {kind}: {share:.0%} of the peak is assumed" in found.notes[0]


def test_a_kernel_takes_at_least_the_time_of_its_bytes():
    call = """
%x = bf16[1,19200,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
%norm_rope_fwd.2 = bf16[1,16,19200,128]{3,2,1,0:T(8,128)(2,1)} custom-call(%x), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/norm_rope_fwd/pallas_call"}
"""
    steps = 16 * 15
    found = costs(call, table=TABLE)
    assert found.parts["other_kernels"].low == steps * 2000 / 1.75e9
    assert costs(call, table=TABLE, kind="v5p").seconds.low == steps * 1000 / 1.75e9
    known = costs(call)
    assert known.seconds.low == seconds_of_bytes(2 * MB75)
    assert known.notes == (
        "no cycles of norm_rope_fwd on v6e: its memory traffic alone is counted",
    )
    other = costs(call.replace("norm_rope_fwd", "softmax"))
    assert other.seconds.low == seconds_of_bytes(2 * MB75)
    assert other.notes == ("the kernel softmax is not known: its memory traffic alone is counted",)


def test_calls_that_are_no_kernels_take_no_time():
    found = costs('%b = bf16[16,6144]{1,0} custom-call(), custom_call_target="AllocateBuffer"')
    assert found.seconds == Range(0, 0, 0) and found.products_peak_share == 0


def test_the_table_has_the_kernels_of_the_generations_it_was_made_for():
    for kind in ("v5p", "v6e"):
        entries = kernel_table()[kind]
        assert {"splash_fwd", "splash_bwd"} <= {entry["kernel"] for entry in entries}
        assert all(entry["cycles_per_step"] > 0 for entry in entries)


def test_generations_have_the_names_of_topologies():
    assert generation("TPU v5 lite") == "v5e" and generation("TPU7x") == "tpu7x"
    assert generation("cpu") == ""


# --- Ranges ---


def test_the_middle_adds_up_and_the_shortest_time_is_the_highest_share():
    a, b = Range.of(1.0, 2.0), Range.of(2.0, 3.0)
    assert a + b == Range(3.0, 4.0, 5.0)
    assert a.share_of(0.5) == Range(0.25, 0.5 / 1.5, 0.5)
