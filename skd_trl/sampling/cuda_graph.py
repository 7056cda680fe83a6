"""A CUDA graph, and what torch needs around its capture.

Before a capture all that it calls has run once in the same state (`without_autocast_cache`), and once in a `trial`, where a wait for the
device is an error that breaks nothing. A capture that fails all the same leaves torch's stream, allocator and generators as if it were
still going on; that is mended.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch


class Graph(Protocol):
    """What a captured round needs of a graph: [`CudaGraph`], or what a test puts in its place."""

    def trial(self) -> AbstractContextManager[None]:
        """The time in which a wait for the device is an error, and all else happens as ever."""
        ...

    def capture(self, play: Callable[[], None]) -> None:
        """Records what `play` does to the device, without doing it."""

    def replay(self) -> None:
        """Does it."""


class CudaGraph:
    """A CUDA graph, captured on `stream`. All of `pool` share memory: no two of them run at once."""

    def __init__(self, pool, stream):
        self.graph, self.pool, self.stream = torch.cuda.CUDAGraph(), pool, stream

    @contextmanager
    def trial(self):
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():  # "a prototype feature"
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, play: Callable[[], None]) -> None:
        before = torch.cuda.current_stream()
        try:
            # Other threads (a data loader that pins memory) may talk to the device while this one captures.
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                play()
        except Exception:
            self._mend(before)
            raise

    def _mend(self, stream) -> None:
        """After a capture that failed: ending it raises before torch has left its stream, before its allocator stops to take memory from the
        pool, and (2.11) before the generators know that it is over, which the end of a next capture tells them."""
        torch.cuda.set_stream(stream)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
        with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
            torch.zeros((), device="cuda")
        torch.cuda.set_stream(stream)

    def replay(self) -> None:
        self.graph.replay()


@contextmanager
def without_autocast_cache():
    """The casts that autocast keeps are freed when it ends, and a graph would go on reading them. What is compiled, is compiled again where
    they are kept and where not, so a warm-up has to run as the capture does."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
