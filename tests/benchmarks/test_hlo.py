"""The counter of compiled programs, on texts and programs whose counts are known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

pytestmark = pytest.mark.optimized

F32 = 4

# A loop of unknown length around one of 128 steps and one of 16 updates. A step launches 3 kernels,
# an update 2; 3 more lie beside them, and the unknown loop's condition is one.
TRAINING = (
    """
HloModule jit_train, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

FileNames
1 "/somewhere/train.py"

FunctionNames
1 "learn.<locals>.all_updates"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused_write (p0: f32[128,8,4], p1: f32[8,4], p2: s32[]) -> f32[128,8,4] {
  %p0 = f32[128,8,4]{2,1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8,4]{2,1,0} bitcast(%p1)
  ROOT %write = f32[128,8,4]{2,1,0} dynamic-update-slice(%p0, %row, %p2, %zero, %zero)
}

%fused_double (q0: f32[8,4]) -> f32[8,4] {
  %q0 = f32[8,4]{1,0} parameter(0)
  ROOT %double = f32[8,4]{1,0} add(%q0, %q0)
}

%act_body (a: (s32[], f32[8,4], f32[128,8,4])) -> (s32[], f32[8,4], f32[128,8,4]) {
  %a = (s32[], f32[8,4]{1,0}, /*index=2*/f32[128,8,4]{2,1,0}) parameter(0)
  %a.step = s32[] get-tuple-element(%a), index=0
  %a.x = f32[8,4]{1,0} get-tuple-element(%a), index=1
  %a.all = f32[128,8,4]{2,1,0} get-tuple-element(%a), index=2
  %a.y = f32[8,4]{1,0} fusion(%a.x), kind=kLoop, calls=%fused_double
  %a.new = f32[128,8,4]{2,1,0} fusion(%a.all, %a.y, %a.step), kind=kLoop, calls=%fused_write
  %one = s32[] constant(1)
  %a.next = s32[] add(%a.step, %one)
  ROOT %a.out = (s32[], f32[8,4]{1,0}, f32[128,8,4]{2,1,0}) tuple(%a.next, %a.y, %a.new)
}

%update_body (u: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %u = (s32[], f32[4,4]{1,0}) parameter(0)
  %u.step = s32[] get-tuple-element(%u), index=0
  %u.w = f32[4,4]{1,0} get-tuple-element(%u), index=1
  %u.product = (f32[4,4]{1,0}, s8[1024]{0}) custom-call(%u.w, %u.w), GEMM
  %u.new = f32[4,4]{1,0} get-tuple-element(%u.product), index=0
  %u.copy-start = (f32[4,4]{1,0}, f32[4,4]{1,0}) copy-start(%u.new)
  %u.copy = f32[4,4]{1,0} copy-done(%u.copy-start)
  ROOT %u.out = (s32[], f32[4,4]{1,0}) tuple(%u.step, %u.copy)
}

%condition (c: (s32[], f32[4,4])) -> pred[] {
  %c = (s32[], f32[4,4]{1,0}) parameter(0)
  %c.step = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(16)
  ROOT %less = pred[] compare(%c.step, %limit), direction=LT
}

%iteration_body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %t.step = s32[] get-tuple-element(%t), index=0
  %t.x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %t.all = f32[128,8,4]{2,1,0} broadcast(%t.step), dimensions={}
  %t.in = (s32[], f32[8,4]{1,0}, f32[128,8,4]{2,1,0}) tuple(%t.step, %t.x, %t.all)
  %t.act = (s32[], f32[8,4], f32[128,8,4]) while(%t.in), ACT
  %t.w = f32[4,4]{1,0} slice(%t.x), slice={[0:4], [0:4]}
  %t.pair = (s32[], f32[4,4]{1,0}) tuple(%t.step, %t.w)
  %t.learn = (s32[], f32[4,4]{1,0}) while(%t.pair), LEARN
  %t.next = s32[] add(%t.step, %t.step)
  ROOT %t.out = (s32[], f32[8,4]{1,0}) tuple(%t.next, %t.x)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %start = s32[] constant(0)
  %in = (s32[], f32[8,4]{1,0}) tuple(%start, %x)
  %all = (s32[], f32[8,4]{1,0}) while(%in), condition=%condition, body=%iteration_body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%all), index=1
}
""".replace("GEMM", 'custom_call_target="__cublas$gemm"')
    .replace(
        "ACT",
        "condition=%condition, body=%act_body,"
        ' backend_config={"known_trip_count":{"n":"128"},"note":"(a {b"}',
    )
    .replace(
        "LEARN",
        'condition=%condition, body=%update_body, metadata={op_name="jit(train)/while"'
        ' stack_frame_id=1}, backend_config={"known_trip_count":{"n":"16"}}',
    )
)


def module(body: str, fused: str = "") -> str:
    """A module of one computation, and one of a fusion."""
    return f"{fused}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def compiled(function: Callable[..., Any], *arguments: Any) -> hlo.Program:
    return hlo.count(jax.jit(function).lower(*arguments).compile().as_text() or "")


def test_launches_of_a_known_program_are_trips_times_instructions_that_launch() -> None:
    program = hlo.count(TRAINING)
    iteration = program.main.inner[0]
    # The condition of a loop of unknown length is computed: one launch.
    assert iteration.launches == 3 + 1
    assert [loop.total() for loop in iteration.inner] == [3, 2]
    assert program.main.total() == 4 + 128 * 3 + 16 * 2


def test_an_in_place_write_in_a_fusion_counts_its_row_and_not_the_buffer() -> None:
    act, update = hlo.count(TRAINING).main.inner[0].inner
    row = 8 * 4 * F32
    # double: read and write a row; write: read and write one, and the index; step: read two, write.
    assert act.bytes == 2 * row + (2 * row + F32) + 3 * F32
    # A product of two matrices into a third, without cuBLAS's scratch memory; a copy.
    assert update.bytes == 3 * 16 * F32 + 2 * 16 * F32


def test_regions_are_found_by_their_numbers_of_repetitions() -> None:
    found = hlo.regions(hlo.count(TRAINING).main, env_steps=128, updates=16, gae_steps=128)
    assert (found.env_step, found.update, found.rest) == (3, 2, 4)
    assert found.iteration == 4 + 128 * 3 + 16 * 2
    assert found.gae_step is None and found.gae_steps == 0
    assert found.inside == {"all", "t.act", "t.learn"}


def test_steps_written_out_in_a_trip_are_steps_all_the_same() -> None:
    found = hlo.regions(hlo.count(TRAINING).main, env_steps=512, updates=64)
    assert (found.env_step, found.update) == (3 / 4, 2 / 4)


def test_epochs_of_minibatches_and_a_scan_of_sixteen_steps_a_trip_are_told_apart() -> None:
    minibatch = hlo.Loop("minibatch", trips=2, launches=48, bytes=1e9, products=9)
    epoch = hlo.Loop("epoch", trips=8, launches=17, products=1, inner=[minibatch])
    scan = hlo.Loop("scan", trips=8, launches=5)
    act = hlo.Loop("act", trips=128, launches=33, products=2)
    iteration = hlo.Loop("iteration", trips=4, launches=90, inner=[act, scan, epoch])
    main = hlo.Loop("main", launches=50, inner=[iteration])
    found = hlo.regions(main, env_steps=128, updates=16, gae_steps=128)
    assert (found.env_step, found.update, found.update_bytes) == (33, 48, 1e9)
    assert (found.gae_step, found.gae_steps) == (5 / 16, 128)
    assert found.rest == 90 + 8 * 17
    assert found.iteration == 128 * 33 + 8 * 5 + 16 * 48 + found.rest


def test_a_scan_of_advantages_in_each_update_is_part_of_it() -> None:
    scan = hlo.Loop("scan", trips=128, launches=3)
    update = hlo.Loop("update", trips=16, launches=78, products=9, inner=[scan])
    act = hlo.Loop("act", trips=128, launches=26, products=2)
    main = hlo.Loop("main", launches=97, inner=[act, update])
    found = hlo.regions(main, env_steps=128, updates=16, gae_steps=128)
    assert (found.gae_step, found.gae_steps) == (3, 16 * 128)
    assert found.update == 78 + 128 * 3 and found.rest == 97


def test_an_iteration_of_one_update_has_no_loop_of_updates() -> None:
    act = hlo.Loop("act", trips=8, launches=22, products=2)
    scan = hlo.Loop("scan", trips=8, launches=3)
    main = hlo.Loop("main", inner=[hlo.Loop("all", trips=None, launches=141, inner=[act, scan])])
    found = hlo.regions(main, env_steps=8, updates=1, gae_steps=8)
    assert (found.env_step, found.gae_step, found.update, found.rest) == (22, 3, None, 141)


def test_numbers_that_no_loop_has_are_refused() -> None:
    with pytest.raises(ValueError, match="no loop of 100 steps beside one of 16 updates"):
        hlo.regions(hlo.count(TRAINING).main, env_steps=100, updates=16)


def test_a_loop_of_unknown_length_is_a_read_back_and_those_of_known_length_are_none() -> None:
    assert hlo.count(TRAINING).read_backs == (hlo.ReadBack("loop", "all", "", ()),)


COUNTED_LOOP = """
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %b.step = s32[] get-tuple-element(%b), index=0
  %b.copy = s32[] copy(%b.step)
  %b.x = f32[8]{0} get-tuple-element(%b), index=1
  %b.by = s32[] constant(3)
  %b.next = s32[] add(%b.copy, %b.by)
  ROOT %b.out = (s32[], f32[8]{0}) tuple(%b.next, %b.x)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %c.step = s32[] get-tuple-element(%c), index=0
  %limit = s32[] LIMIT
  ROOT %less = pred[] compare(%c.step, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %start = s32[] constant(-2)
  %in = (s32[], f32[8]{0}) tuple(%start, %x)
  ROOT %all = (s32[], f32[8]{0}) while(%in), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("limit", "trips"), [("constant(18)", 7), ("constant(-2)", 0), ("negate(%c.step)", None)]
)
def test_trips_that_xla_does_not_note_are_told_by_the_counter(
    limit: str, trips: int | None
) -> None:
    # From -2 in steps of 3: -2, 1, 4, 7, 10, 13, 16.
    program = hlo.count(COUNTED_LOOP.replace("LIMIT", limit))
    assert program.main.inner[0].trips == trips
    assert [read_back.kind for read_back in program.read_backs] == ["loop"] * (trips is None)


def test_a_loop_is_named_by_the_line_that_wrote_it() -> None:
    learn = hlo.count(TRAINING).main.inner[0].inner[1]
    assert learn.where == "train.py:42 learn.all_updates"


def test_a_conditional_counts_its_larger_branch_and_is_a_read_back() -> None:
    text = """
%small (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %s.out = f32[8]{0} negate(%s)
}

%large (l: f32[8]) -> f32[8] {
  %l = f32[8]{0} parameter(0)
  %l.one = f32[8]{0} negate(%l)
  ROOT %l.out = f32[8]{0} cosine(%l.one)
}

ENTRY %main (a: f32[8], i: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %b = f32[8]{0} conditional(%i, %a, %a), branch_computations={%small, %large}
}
"""
    program = hlo.count(text)
    assert program.main.launches == 2 and program.main.bytes == 4 * 8 * F32
    assert [read_back.kind for read_back in program.read_backs] == ["conditional"]


def test_collectives_are_counted_once_where_they_are_asynchronous() -> None:
    text = module(
        """
  %a = f32[8]{0} parameter(0)
  %sum-start = f32[8]{0} all-reduce-start(%a), to_apply=%add
  %sum = f32[8]{0} all-reduce-done(%sum-start)
  ROOT %moved = f32[8]{0} collective-permute(%sum), source_target_pairs={{0,1}}"""
    )
    program = hlo.count(text)
    assert program.collectives == 2 and program.main.launches == 2


def test_a_call_of_the_host_is_a_read_back() -> None:
    text = module(
        """
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} custom-call(%a), custom_call_target="xla_ffi_python_gpu_callback" """
    )
    assert [read_back.kind for read_back in hlo.count(text).read_backs] == ["host call"]


def bytes_of(body: str, fused: str = "") -> float:
    return hlo.count(module(body, fused)).main.bytes


def test_slices_and_gathers_read_what_they_take() -> None:
    table = "%t = f32[1000,4]{1,0} parameter(0)\n%i = s32[8,1]{1,0} parameter(1)\n"
    gather = "ROOT %g = f32[8,4]{1,0} gather(%t, %i), slice_sizes={1,4}"
    taken = 8 * 4 * F32
    assert bytes_of(table + gather) == 2 * taken + 8 * 4
    part = "ROOT %s = f32[8,4]{1,0} slice(%t), slice={[0:8], [0:4]}"
    assert bytes_of(table + part) == 2 * taken
    fused = f"""
%f (t: f32[1000,4], i: s32[8,1]) -> f32[8,4] {{
{table.replace("%t =", "%big =").replace("%i =", "%index =")}
  %wide = f32[1000,4]{{1,0}} negate(%big)
  ROOT %g = f32[8,4]{{1,0}} gather(%wide, %index), slice_sizes={{1,4}}
}}
"""
    call = "ROOT %y = f32[8,4]{1,0} fusion(%t, %i), kind=kLoop, calls=%f"
    assert bytes_of(table + call, fused) == 2 * taken + 8 * 4


def test_a_fusion_that_takes_slices_and_the_whole_reads_the_whole_once() -> None:
    fused = """
%f (p: f32[100]) -> f32[10] {
  %p = f32[100]{0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
  %part = f32[10]{0} slice(%p), slice={[0:10]}
  %wide = f32[10]{0} broadcast(%sum), dimensions={}
  ROOT %y = f32[10]{0} multiply(%part, %wide)
}
"""
    call = "%t = f32[100]{0} parameter(0)\nROOT %y = f32[10]{0} fusion(%t), kind=kInput, calls=%f"
    assert bytes_of(call, fused) == (100 + 10) * F32


def test_a_write_into_a_new_array_counts_all_of_it() -> None:
    fused = """
%f (p: f32[], u: f32[10]) -> f32[100] {
  %p = f32[] parameter(0)
  %u = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %new = f32[100]{0} broadcast(%p), dimensions={}
  ROOT %y = f32[100]{0} dynamic-update-slice(%new, %u, %zero)
}
"""
    call = """%p = f32[] parameter(0)
%u = f32[10]{0} parameter(1)
ROOT %y = f32[100]{0} fusion(%p, %u), kind=kLoop, calls=%f"""
    assert bytes_of(call, fused) == (100 + 10 + 1) * F32


@pytest.mark.parametrize(
    ("dtype", "expected"), [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("s4", 0.5), ("c64", 8)]
)
def test_bytes_of_an_element(dtype: str, expected: float) -> None:
    assert hlo.item_bytes(dtype) == expected


def test_a_copy_onto_the_chip_of_a_tpu_only_reads_memory() -> None:
    start = "%s = (f32[8]{0:S(1)}, f32[8]{0}) copy-start(%a)"
    assert bytes_of(f"%a = f32[8]{{0}} parameter(0)\n{start}") == 8 * F32
    part = "%s = ((f32[8]{0}), f32[2]{0:S(1)}) slice-start(%a), slice={[0:2]}"
    assert bytes_of(f"%a = f32[8]{{0}} parameter(0)\n{part}") == 2 * F32
    back = "%s = f32[2]{0} slice(%a), slice={[0:2]}"
    assert bytes_of(f"%a = f32[8]{{0:S(1)}} parameter(0)\n{back}") == 2 * F32


def test_layouts_and_tuples_of_a_tpu_are_read() -> None:
    line = (
        "%a = (f32[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, bf16[]) custom-call(%b, %c), x=1"
    )
    (instruction,) = hlo.parse(f"ENTRY %main (b: f32[]) -> f32[] {{\n  {line}\n}}")[0][
        "main"
    ].values()
    assert (instruction.opcode, instruction.operands) == ("custom-call", ("b", "c"))
    # The first array, S(1), lies on the chip.
    assert instruction.bytes == 4 + 2 and instruction.size == 8 * 128 + 2


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.count("HloModule nothing")


def test_nested_scans_of_a_compiled_program_count_their_products() -> None:
    def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(w @ w), w[0]

    def train(w: jax.Array) -> Any:
        def iteration(w: jax.Array, _: None) -> Any:
            w, rows = jax.lax.scan(step, w, None, length=24)
            w, _ = jax.lax.scan(lambda w, _: (jnp.sin(w @ w @ w), None), w, None, length=5)
            return w, rows

        return jax.lax.scan(iteration, w, None, length=3)

    main = compiled(train, jnp.zeros((64, 64))).main
    assert main.total("products") == 3 * (24 + 5 * 2)
    (iteration,) = main.inner
    assert [(loop.trips, loop.total("products")) for loop in iteration.inner] == [(24, 1), (5, 2)]
    assert iteration.inner[0].where.split()[-1].endswith("iteration")
    found = hlo.regions(main, env_steps=24, updates=5)
    assert (
        found.env_step == iteration.inner[0].total() and found.update == iteration.inner[1].total()
    )
    assert (
        iteration.total() == found.iteration == 24 * found.env_step + 5 * found.update + found.rest
    )


def test_a_compiled_loop_whose_end_depends_on_data_is_listed() -> None:
    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: jnp.sin(x) + x, x)

    (read_back,) = compiled(until, jnp.ones(8)).read_backs
    assert read_back.kind == "loop" and read_back.where.startswith("test_hlo.py:")


def test_a_compiled_write_in_a_loop_counts_rows() -> None:
    big, row = 10_000, 64

    def fill(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 50, lambda i, x: x.at[i].set(jnp.sin(rows[i])), x)

    main = compiled(fill, jnp.zeros((big, row)), jnp.zeros((50, row))).main
    (loop,) = main.inner
    # The sine of a row read and written, that row copied in, and the counter: not the 10,000 rows.
    assert loop.total("bytes") < 8 * row * F32
