"""The same key in triton's cache for the same function, whatever the process has compiled before.

A function's key covers the global constants that its callees use only if these have keys already. Which have depends on
what was launched before, so a process may compile anew what another one has put into the cache.
"""

from __future__ import annotations

from types import ModuleType

from triton.runtime import JITFunction


def settle(*modules: ModuleType) -> None:
    """Give keys to all functions of the modules, in their order, in which callees come before their callers."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.cache_key  # noqa: B018  found once, and kept
