"""The parameters of a configuration in its docstring, written from the help of its fields: each option is explained in one place."""

import dataclasses
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
        lines += [f"    {name} (`{_type_name(field)}`, *optional*{default}):", f"        {field.metadata['help']}"]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])
    return cls


def _type_name(field: dataclasses.Field) -> str:
    """Such as `int` or `str`, without the `None` that "optional" says."""
    if isinstance(field.type, type):
        return field.type.__name__
    names = re.sub(r"\b(\w+\.)+", "", str(field.type))  # without the modules
    return " or ".join(part for part in names.split(" | ") if part != "None")
