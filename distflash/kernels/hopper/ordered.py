"""Adding tiles of dQ in a fixed order, the same in every run: a semaphore for each tile of queries of a head.

The blocks of keys of a head add to a tile of dQ one after the other, in ascending order. The tile's semaphore is
incremented by each of them; `turns` says at which number it is a block's turn.

Work tiles are dealt in the same order, all of them by the counter, so only to programs that run. A program works on one
at a time, in the order in which it got them, although its loading warp takes the next one early. So the first of all
unfinished work tiles waits for none, and there is no deadlock, whatever the number of programs.

[Note: memory order] TMA adds in the async proxy, on behalf of one thread of the warp. In order:

- The thread waits for the completion of its bulk groups, not only for their reads of shared memory
  (``wait_group`` without ``.read``). Completion implies a fence from the async to the generic proxy.
- The warp meets (``bar.warp.sync``), and one lane adds 1 to the semaphore, after a fence of GPU scope. This releases
  the sums, since a barrier is part of causality order.
- In the next block's program every lane reads the semaphore, and then fences (``ld.acquire``, or ``ld.relaxed`` and the
  fence of the release), and fences from the generic to the async proxy. Only then does its thread have TMA add.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def await_turn(semaphore, turn):
    """Wait until a semaphore is at ``turn``. Then the warp may add to its tile."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; "
        "AGAIN: ld.acquire.gpu.global.s32 v, [$1]; "
        "setp.ne.s32 p, v, $2; "
        "@p bra AGAIN; "
        "bar.warp.sync 0xffffffff; "
        "fence.proxy.async.global; "
        "mov.b32 $0, 0; }",
        "=r,l,r", [semaphore.to(gl.int64), turn], gl.int32, False, 1,
    )  # fmt: skip


@gluon.constexpr_function
def pass_asm():
    return (
        "{ .reg .pred p, q; .reg .b32 v, lane; "
        # In flight while the warp waits for its sums.
        "ld.relaxed.gpu.global.s32 v, [$2]; "
        "cp.async.bulk.wait_group 0; "
        "bar.warp.sync 0xffffffff; "
        "fence.acq_rel.gpu; "
        "mov.u32 lane, %laneid; "
        "setp.eq.s32 p, lane, 0; "
        "@p red.relaxed.gpu.global.add.s32 [$1], 1; "
        "setp.ne.s32 p, $4, 0; "
        "AGAIN: setp.ne.and.s32 q, v, $3, p; "
        "@!q bra DONE; "
        "ld.acquire.gpu.global.s32 v, [$2]; "
        "bra AGAIN; "
        "DONE: bar.warp.sync 0xffffffff; "
        "fence.proxy.async.global; "
        "mov.b32 $0, 0; }"
    )


@gluon.jit
def pass_turn(semaphore, following, turn, more):
    """Pass a tile on to the next block, and unless there is no ``more``, wait for the turn at the ``following`` tile.

    Args:
        semaphore: of the tile to which the warp has added, which is then the next block's.
        following: of the next tile to add to; it is the warp's turn there when the semaphore is at ``turn``.
    """
    gl.inline_asm_elementwise(
        pass_asm(),
        "=r,l,l,r,r",
        [semaphore.to(gl.int64), following.to(gl.int64), turn, more.to(gl.int32)],
        gl.int32, False, 1,
    )  # fmt: skip
