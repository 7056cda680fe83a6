"""How much memory a function needs at its worst moment, from the allocator's own record."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """
    The most bytes that `function` holds at once on the CPU beyond what was held before it, temporaries inside
    operators included: the running sum of every allocation (+) and release (-) that PyTorch's CPU allocator reports to
    the profiler. It counts what was asked for, not what malloc or the system keep. Memory of other libraries is not
    seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
