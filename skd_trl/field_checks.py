"""Checks of one field of a configuration by itself: its type, its choices, its sign. What is wrong is refused by the field's name."""

import dataclasses
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ._compat import SFTConfig


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def check_positive(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_types(config: Any) -> None:
    """Refuses what is of another type in a field of numbers, of texts, or of yes and no, of those that [`~trl.SFTConfig`] does not have.

    Raises:
        `ValueError`: with the field.
    """
    own = next(one for one in type(config).__mro__ if one.__module__.startswith("skd_trl."))
    hints, inherited = get_type_hints(own), {one.name for one in dataclasses.fields(SFTConfig)}
    for name in (one.name for one in dataclasses.fields(own) if one.init and one.name not in inherited):
        hint, value = hints[name], getattr(config, name)
        kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        if value is None and type(None) in kinds:
            continue
        kinds -= {type(None)}
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if kinds <= {int, float} and not (is_number and (float in kinds or isinstance(value, Integral))):
            raise ValueError(f"{name}={value!r} must be a {'' if float in kinds else 'whole '}number.")
        if kinds == {bool} and value not in (True, False):
            raise ValueError(f"{name}={value!r} must be True or False.")
        # Paths, and devices of torch, say themselves what they are as text.
        if kinds == {str} and (value is None or isinstance(value, Real | list | dict)):
            raise ValueError(f"{name}={value!r} must be text.")
