"""Writes libraries' FutureWarnings to a file, since users of a job cannot act on them."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_THE_FUTURE = re.compile(r"\S.*:\d+: FutureWarning: ")


@contextmanager
def future_warnings_in(path: Path, active: bool) -> Iterator[None]:
    """Within it, FutureWarnings go to the file, created on the first one. All others go to standard error.

    active: False on all ranks except 0, which drop FutureWarnings.
    """
    logger = logging.getLogger("py.warnings")
    kept: logging.Handler = logging.FileHandler(path, delay=True) if active else logging.NullHandler()
    shown = logging.StreamHandler(sys.stderr)
    kept.addFilter(lambda record: OF_THE_FUTURE.match(record.getMessage()) is not None)
    shown.addFilter(lambda record: OF_THE_FUTURE.match(record.getMessage()) is None)
    logging.captureWarnings(True)
    for handler in (kept, shown):
        logger.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for handler in (kept, shown):
            logger.removeHandler(handler)
            handler.close()
