"""How the process of a job ends: with an exit code, and without a traceback where the user ended it."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def end_with(job: Callable[[], int]) -> NoReturn:
    """Run a job, and end the process with its exit code.

    Ctrl-C ends it with a line, where the job does not make more of it. Output that nobody reads any more, as behind
    `| head`, ends it without. Both have the exit code that a shell gives such an end.
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
    # Threads of torch's communication and of autograd outlive the group now and then, and abort an ordinary exit.
    os._exit(code)
