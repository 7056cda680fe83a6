"""A stand-in for a CUDA graph on a CPU: operators on fixed memory, recorded once and played again without Python.

As a graph does: capturing changes nothing, waiting for the device while capturing is an error, and a replay reads and writes the very
memory of the capture, with every number of Python's as it was then.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def check_wait(func, args):
    name = func.overloadpacket.__name__
    if name in WAITS or (name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])):
        raise RuntimeError(f"operation not permitted when stream is capturing ({name})")


class Tape:
    num_captures = num_replays = 0  # of all

    def trial(self):
        return Waits()

    def capture(self, play):
        recorder = Recorder()
        try:
            with recorder:
                play()
        finally:
            recorder.undo()
        self.calls = recorder.calls
        self.addresses = [[address(x) for x in tensors((args, kwargs))] for _, args, kwargs, _ in self.calls]
        Tape.num_captures += 1

    def replay(self):
        Tape.num_replays += 1
        for (func, args, kwargs, outputs), addresses in zip(self.calls, self.addresses, strict=True):
            assert [address(x) for x in tensors((args, kwargs))] == addresses, f"{func} would read freed memory"
            for output, result in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                if address(output) != address(result):
                    output.copy_(result)


class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check_wait(func, args)
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_wait(func, args)
        inputs = tensors((args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self.keep(argument, value)
        for argument in func._schema.arguments:
            self.keep(argument, kwargs.get(argument.name))
        output = func(*args, **kwargs)
        is_view = not func._schema.is_mutable and {address(x) for x in tensors(output)} <= {address(x) for x in inputs}
        if not is_view or not inputs:
            self.calls.append((func, args, kwargs, tensors(output)))
        return output

    def keep(self, argument, value):
        if argument.alias_info is not None and argument.alias_info.is_write:
            self.before += [(x, x.clone()) for x in tensors(value)]

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
