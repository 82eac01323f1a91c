"""Python's cyclic garbage collector, held back where millions of objects are made that all stay.

While a registry of thousands of documents is loaded nothing becomes garbage, and yet the collector walks everything
made so far, again and again: that doubles what loading costs.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collections meanwhile, in the whole process; the outermost of several sets the collector going again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
