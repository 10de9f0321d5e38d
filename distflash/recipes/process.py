"""Ends the process of a job with an exit code, and without a traceback if the user stopped it."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def end_with(job: Callable[[], int]) -> NoReturn:
    """Run a job, and end the process with its exit code.

    Ctrl-C prints one line, unless the job handles it. A closed output, as with `| head`, prints nothing. Both have the
    exit codes of a shell: 128 + the signal.
    """
    try:
        code = job()
    except SystemExit as asked:  # `--help`, or options that are refused
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted", file=sys.stderr)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    sys.stderr.flush()
    # Threads of torch.distributed and autograd sometimes outlive the group, and abort an ordinary exit.
    os._exit(code)
