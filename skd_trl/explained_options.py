"""The parameters of a configuration in its docstring, written from the help of its fields: each option is explained in one place."""

import inspect
import re
from typing import TypeVar


Config = TypeVar("Config", bound=type)


def explained(cls: Config) -> Config:
    """Class decorator of a dataclass: its docstring gets an `Args:` section of the fields that the class itself declares.

    Raises:
        `TypeError`: for a field without `help`.
    """
    lines = []
    for name in inspect.get_annotations(cls):
        field = cls.__dataclass_fields__.get(name)
        if field is None or not field.init:
            continue
        if not field.metadata.get("help"):
            raise TypeError(f"{cls.__name__}.{name} has no help in its metadata.")
        default = "" if field.default is None else f", defaults to `{field.default!r}`"
        # Such as `int` or `str`: without modules, and without the `None` that "optional" says.
        names = field.type.__name__ if isinstance(field.type, type) else re.sub(r"\b(\w+\.)+", "", str(field.type))
        type_name = " or ".join(part for part in names.split(" | ") if part != "None")
        lines += [f"    {name} (`{type_name}`, *optional*{default}):", f"        {field.metadata['help']}"]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])
    return cls
