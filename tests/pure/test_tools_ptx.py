"""Conditions of loads, and waits of barriers, read from PTX."""

from tools.ptx import unconditional_loads, unordered_arrivals

# Two tiles in place, then a loop's first two loads, each if the loop has such a step.
PTX = """
	mov.u32 	%r6, %tid.x;
	and.b32 	%r7, %r6, 127;
	setp.eq.b32 	%p9, %r7, 0;
	@%p9 mbarrier.init.shared::cta.b64 [%r68], 1;
	@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r68], 8192;
	@%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r68], 8192;
	@%p1 ld.global.b32 { %r33 }, [ %rd11 + 0 ];
	shr.s32 	%r34, %r33, 6;
	elect.sync 	%r120|%p31, -1;
	setp.gt.s32 	%p20, %r34, 0;
	setp.gt.s32 	%p21, %r34, 1;
	and.pred 	%p7, %p9, %p20;
	@%p7 mbarrier.arrive.expect_tx.shared.b64 _, [%r74], 8192;
	and.pred 	%p8, %p31, %p21;
	@%p8 mbarrier.arrive.expect_tx.shared.b64 _, [%r76], 256;
"""


def test_loads_that_depend_on_the_thread_alone():
    assert unconditional_loads(PTX) == 2
    assert unconditional_loads(PTX.replace("@%p7", "@%p9")) == 3
    assert unconditional_loads(PTX.replace("%p31, %p21;", "%p31, %p9;")) == 3


def test_a_condition_that_is_set_in_two_places():
    twice = PTX.replace("	@%p8", "	mov.pred 	%p8, %p9;\n	@%p8")
    assert unconditional_loads(twice) == 2


def test_none_without_descriptors():
    assert unconditional_loads("	cp.async.ca.shared.global [ %r348 + 0 ], [ %rd93 + 0 ], 0x4;") == 0


ARRIVALS = """
	ld.shared.b32 %r1, [%r2];
	bar.sync 0, 128;
	@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
	st.shared.b32 [%r4], %r5;
	bar.warp.sync -1;
	@%p1 mbarrier.arrive.shared::cta.b64 _, [%r6];
	@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r7], 8192;
"""


def test_arrivals_before_which_threads_meet():
    assert unordered_arrivals(ARRIVALS) == 0


def test_arrivals_that_do_not_wait_for_other_threads():
    assert unordered_arrivals(ARRIVALS.replace("bar.sync 0, 128;", "wgmma.wait_group.sync.aligned 0;")) == 1
    assert unordered_arrivals(ARRIVALS.replace("bar.warp.sync -1;", "$L__BB0_3:")) == 1
    assert unordered_arrivals("	@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];") == 1
