"""Error messages and exit codes of the command line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.common.errors import LostProcess, MainProcessStopped, UserError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that a user can fix into a message and exit code 1. Interrupted, after a signal, passes."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        sys.exit(1)
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # A normal exit would wait for the lost process.
    except MainProcessStopped as stop:
        sys.exit(stop.exit_code)
