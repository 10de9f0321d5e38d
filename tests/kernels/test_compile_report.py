"""What the report reads out of the compiler's output."""

import pytest

pytest.importorskip("triton")

from benchmarks.compile_report import unguarded

# Two tiles in place, then a loop's first two loads: under the condition that the loop has such a step.
PTX = """
	setp.eq.b32 	%p9, %r7, 0;
	@%p9 mbarrier.init.shared::cta.b64 [%r68], 1;
	@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r68], 8192;
	@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r68], 8192;
	and.pred 	%p7, %p9, %p20;
	@%p7 mbarrier.arrive.expect_tx.shared.b64 _, [%r74], 8192;
	and.pred 	%p8, %p9, %p21;
	@%p8 mbarrier.arrive.expect_tx.shared.b64 _, [%r76], 256;
"""


def test_loads_that_a_loop_without_steps_would_begin():
    assert unguarded(PTX, in_place=2) == 0
    assert unguarded(PTX.replace("@%p8", "@%p9"), in_place=2) == 1


def test_none_without_descriptors():
    assert unguarded("cp.async.ca.shared.global [ %r348 + 0 ], [ %rd93 + 0 ], 0x4;", in_place=2) == 0
