"""Where a library warns a job that a name of its own will go: into a file, since no user of the job can change it."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_THE_FUTURE = re.compile(r"\S.*:\d+: FutureWarning: ")


@contextmanager
def future_warnings_in(path: Path, active: bool) -> Iterator[None]:
    """FutureWarnings go to the file, which is made for the first one; all others to standard error, as ever.

    active: False on ranks that keep nothing, whose FutureWarnings are those of the first rank.
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
