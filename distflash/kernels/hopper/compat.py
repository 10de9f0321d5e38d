"""The parts of Gluon whose names moved between triton 3.6 and 3.9, under one name each."""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # from 3.8 on
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):  # from 3.8 on
    async_add = tma.async_atomic_add
else:

    @builtin
    def async_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile of shared memory to global memory; what the hardware has is there before Gluon names it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory seen as another shape and layout; Gluon's own method lost its underscore in 3.9."""
    method = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)
