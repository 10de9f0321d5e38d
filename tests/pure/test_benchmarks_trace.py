"""Spans, kinds, gaps and sums of a small hand-made trace."""

import pytest

from benchmarks import trace
from benchmarks.trace import BACKWARD, COPY, FORWARD, NCCL, OTHER, Span

KERNELS = [
    # stream, start, duration, name
    (7, 900.0, 5.0, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
    (7, 1000.0, 10000.0, "spin_kernel(long)"),
    (20, 11040.0, 400.0, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"),
    (7, 11050.0, 300.0, "forward_kernel"),
    (7, 11351.0, 100.0, "forward_kernel"),
    (7, 11460.0, 3.0, "void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<float>>(int)"),
    (20, 11470.0, 60.0, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"),
    (7, 11500.0, 200.0, "hopper_backward"),
    (7, 11760.0, 2.0, "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>(int)"),
]


def exported(kernels=KERNELS, base=5):
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}
        for stream, start, duration, name in kernels
    ]
    events += [
        {"ph": "X", "cat": "cpu_op", "name": "distflash::attention", "ts": 10.0, "dur": 90.0, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "ts": 11.0, "dur": 1.0, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "distflash::attention_backward", "ts": 110.0, "dur": 40.0, "tid": 1},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 11770.0, "dur": 1.0, "args": {"stream": 7}},
        {"ph": "i", "cat": "kernel", "name": "no duration", "ts": 1.0},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    if not kernels:
        events = [e for e in events if e.get("cat") != "gpu_memcpy"]
    return {"baseTimeNanoseconds": base, "traceEvents": events}


def test_kinds():
    spans = trace.spans_of(exported(), rank=0)
    kinds = [span.kind for span in spans]
    assert kinds == [NCCL, NCCL, FORWARD, FORWARD, OTHER, NCCL, BACKWARD, COPY, COPY]
    for name, kind in {
        "dkdv_kernel": BACKWARD,
        "dq_kernel": BACKWARD,
        "statistics_kernel": OTHER,
        "kernel_cutlass_flash_fwd_sm90": FORWARD,
        "kernel_cutlass_flash_bwd_sm90": BACKWARD,
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<int>": COPY,
        "void at::native::vectorized_elementwise_kernel<4, forward>": OTHER,
        "Memset (Device)": COPY,
    }.items():
        assert trace.kind_of(name) == kind, name


def test_names_are_short_and_the_waiting_is_left_out():
    names = [span.name for span in trace.spans_of(exported(), rank=0)]
    assert names[1] == "ncclDevKernel_SendRecv" and "elementwise_kernel" in names
    assert not any("spin" in name for name in names)


def test_a_trace_without_a_device_gives_the_outermost_operators():
    spans = trace.spans_of(exported(kernels=[]), rank=3)
    assert [(s.name, s.kind, s.stream, s.rank) for s in spans] == [
        ("attention", FORWARD, 1, 3),
        ("attention_backward", BACKWARD, 1, 3),
    ]


def test_together_starts_at_the_first_and_keeps_clocks_apart():
    one, other = (trace.spans_of(exported(), rank) for rank in (0, 1))
    spans = trace.together([(2_000_000, one), (2_030_000, other)])
    # The all-reduce before the waiting is left out; the exchange shortly before the first attention kernel is not.
    assert len(spans) == 2 * (len(one) - 1)
    starts = {span.rank: span.start for span in reversed(spans)}
    assert starts == {0: 0.0, 1: 30.0}
    assert spans[1].start == pytest.approx(10.0) and spans[1].duration == 300.0


def test_gaps_lie_on_the_compute_stream_between_attention_kernels():
    spans = trace.together([(0, trace.spans_of(exported(), rank=0))])
    assert trace.compute_stream(spans) == 7
    found = trace.gaps_of(spans, least=5.0)
    assert [(gap.start, gap.duration, gap.after, gap.before) for gap in found] == [
        (411.0, 9.0, "forward_kernel", "elementwise_kernel"),
        (423.0, 37.0, "elementwise_kernel", "hopper_backward"),
    ]
    assert found[0].meanwhile == {} and found[1].meanwhile == {NCCL: 30.0}
    assert [gap.duration for gap in trace.gaps_of(spans, least=0.5)] == [1.0, 9.0, 37.0]
    assert trace.gaps_of([span for span in spans if span.kind == NCCL], least=0) == []


def test_a_kernel_within_another_makes_no_gap():
    def span(start, duration):
        return Span(0, 7, "k", FORWARD, start, duration)

    found = trace.gaps_of([span(0, 100), span(10, 20), span(130, 10)], least=5)
    assert [(gap.start, gap.duration) for gap in found] == [(100, 30)]


def test_summary():
    sums = trace.summary(trace.together([(0, trace.spans_of(exported(), rank=0))]))
    # From the first attention kernel to the end of the last: the first exchange began before it, the copies after.
    assert sums == {FORWARD: 400.0, BACKWARD: 200.0, NCCL: 60.0, COPY: 0, OTHER: 3.0, "all": 650.0, "idle": 47.0}
    assert trace.summary([]) == {}
