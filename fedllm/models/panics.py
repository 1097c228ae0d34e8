"""Native code that panics, as Rust may: it prints a message of its own, which can quote a text.

What it raises is no `Exception`, and quotes the text too.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

_STDERR = RLock()  # of two threads that put it back in the wrong order, one would lose it for good


@contextmanager
def panics_refused(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Raise `refusal` (of its kind) in place of a panic, and drop what goes to stderr meanwhile."""
    with _STDERR, open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as panic:
            raise refusal(type(panic).__name__) from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)
