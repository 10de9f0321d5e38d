"""distflash: exact attention over many GPUs. The public names are those of `distflash.public`."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distflash.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """The first public name that is asked for loads all of them, and torch with them: `--help` needs none."""
        from importlib import import_module, util

        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if util.find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]
