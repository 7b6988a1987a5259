"""The benchmarks' reader of compiled programs, on texts as the compilers write them."""

import re

import pytest
from tools.hlo import Work, read, size_of

TPU = """HloModule jit_step, is_scheduled=true

%fused (param_0: f32[1024]) -> f32[1024] {
  %param_0 = f32[1024]{0:T(1024)} parameter(0)
  ROOT %inside = f32[1024]{0:T(1024)} add(%param_0, %param_0), CYCLES(7)
}

%body (at: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %at = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(0)
  %x = f32[1024]{0:T(1024)} get-tuple-element(%at), index=1
  %twice = f32[1024]{0:T(1024)} fusion(%x), calls=%fused, CYCLES(100)
  ROOT %next = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) tuple(%i, %twice)
}

%going (at: (s32[], f32[1024])) -> pred[] {
  %at.1 = (s32[]{:T(128)}, f32[1024]{0:T(1024)}) parameter(0)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i, %n), direction=LT
}

%small (b: (f32[1024])) -> (f32[1024]) {
  %b = (f32[1024]{0:T(1024)}) parameter(0)
  ROOT %same = (f32[1024]{0:T(1024)}) tuple(%b)
}

%large (c: (f32[1024])) -> (f32[1024]) {
  %c = (f32[1024]{0:T(1024)}) parameter(0)
  %y = f32[1024]{0:T(1024)} get-tuple-element(%c), index=0
  ROOT %sorted = f32[1024]{0:T(1024)} sort(%y), dimensions={0}, to_apply=%order
}

ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  %copy-start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start)
  %near = f32[1024]{0:T(1024)S(1)} fusion(%copy-done), calls=%fused, CYCLES(10)
  %far = f32[1024]{0:T(1024)} fusion(%near, %p), calls=%fused, metadata={op="f(x), y"}, CYCLES(20)
  %loop = (s32[], f32[1024]{0:T(1024)}) while(%start), body=%body, condition=%going, TRIPS(5)
  %branch = (f32[1024]{0:T(1024)}) conditional(%which, %t, %t), branch_computations={%small, %large}
  ROOT %out = f32[1024]{0:T(1024)} get-tuple-element(%branch), index=0
}
"""
TPU = re.sub(r"CYCLES\((\d+)\)", r'backend_config={"estimated_cycles":"\1"}', TPU)
TPU = re.sub(r"TRIPS\((\d+)\)", r'backend_config={"known_trip_count":{"n":"\1"}}', TPU)

GPU = """HloModule jit_step, is_scheduled=true

ENTRY %main.3 (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %sort.0 = (f32[8,4]{1,0}, u8[100]{0}) custom-call(%p), custom_call_target="__cub$DeviceRadixSort"
  %gte = f32[8,4]{1,0} get-tuple-element(%sort.0), index=0
  %loop = (s32[]) while(%start), condition=%going, body=%body
  ROOT %both = f32[8,4]{1,0} fusion(%gte, %gte), calls=%fused
}

%body (at: (s32[])) -> (s32[]) {
  ROOT %copy.1 = (s32[]) copy(%at)
}

%going (at: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""


def test_a_loop_counts_in_each_trip_and_a_fusion_once():
    assert read(TPU).least.cycles == 10 + 20 + 5 * 100
    assert read(TPU).least.kernels == 2 + 5


def test_bytes_are_those_in_the_memory_of_the_device():
    copied, near, far, trip = 4096, 0, 2 * 4096, 2 * 4096
    assert read(TPU).least.bytes == copied + near + far + 5 * trip


def test_conditionals_take_the_cheaper_branch_and_the_dearer():
    program = read(TPU)
    assert program.most.bytes - program.least.bytes == 2 * 4096
    assert program.most.kernels - program.least.kernels == 1
    assert (program.conditionals, program.sorts, program.loops) == (1, 1, 1)


def test_a_custom_call_may_sort_and_a_loop_have_unknown_trips():
    program = read(GPU)
    assert (program.sorts, program.loops, program.loops_of_unknown_trips) == (1, 1, 1)
    array, scratch, trip = 8 * 4 * 4, 100, 4 + 1
    # The fusion reads one array, which it names twice.
    assert program.least == Work(0, (array + array + scratch) + 2 * array + trip, 2, 1)


def test_sizes_of_types():
    assert size_of("(f32[2,3]{1,0}, bf16[4], pred[], /*index=3*/s4[6])") == 24 + 8 + 1 + 3
    assert size_of("f32[8]{0:T(128)S(1)}", device_only=True) == 0


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match=r"as_text"):
        read("HloModule nothing")
