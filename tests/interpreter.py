"""Triton's interpreter, with fixes, and in half the time."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from tests import decoding, oracle

Case = TypeVar("Case", oracle.Case, decoding.Case)


def small(case: Case) -> Case:
    """With half the heads, unless it is about heads: each is a program, all of which run one after another."""
    if case.kv_heads % 2 or "heads for" in case.name:
        return case
    return replace(case, heads=case.heads // 2, kv_heads=case.kv_heads // 2)


@contextlib.contextmanager
def bfloat16_in_the_interpreter() -> Iterator[None]:
    """The interpreter multiplies bfloat16 as if its bits were integers and truncates when it rounds; mend both."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x):
        data = torch.from_numpy(x.data.view("int16").copy()).view(torch.bfloat16).float().numpy()
        return TensorHandle(data, tl.float32)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            return plain_cast(self, widened(src), dst_type)
        if dst_type.scalar == tl.bfloat16:
            wide = plain_cast(self, src, tl.float32).data.copy()
            data = torch.from_numpy(wide).bfloat16()  # to nearest, ties to even
            return TensorHandle(data.view(torch.int16).numpy().view("uint16"), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, *options):
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, d, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


@contextlib.contextmanager
def no_work_done_twice() -> Iterator[None]:
    """Every call of a function within a kernel exchanges all of triton.language again, where once a launch is enough.
    And every type is looked up in a new dictionary.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    exchange, exchanged = interpreter._patch_lang, set()

    def exchange_for_launch(fn):
        exchanged.clear()
        return exchange(fn)

    def call(self, *args, **kwargs):
        modules = frozenset(id(x) for x in self.fn.__globals__.values() if x is tl or x is tl.core)
        if modules not in exchanged:
            exchange(self.fn)
            exchanged.add(modules)
        rewritten = self.rewrite()
        try:
            return rewritten(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    plain, known = interpreter._get_np_dtype, {}

    def np_dtype(of):
        scalar = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(scalar, tl.pointer_type):
            return plain(scalar)
        if scalar.name not in known:
            known[scalar.name] = plain(scalar)
        return known[scalar.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_patch_lang", exchange_for_launch)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield


@contextlib.contextmanager
def without_overflow_checks() -> Iterator[None]:
    """Integers wrap around unseen, as on a GPU: to check every sum and product takes a quarter of the time. ``--full``
    checks them.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
