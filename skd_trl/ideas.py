"""The one way to make an idea (an acceptance rule, a gate, a divergence) from what a configuration says of it.

A configuration gives an idea by its name in a registry, as `"module:attribute"`, or as an object. Parameters of a named one come
from `{field}_kwargs` and from the configuration's own fields, such as `accept_top_k` for `k`, by the signature of the factory.
Whatever would have no effect is refused, and the message names what exists. This module knows no idea by name.
"""

import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class IdeaField:
    """A field of a configuration that names an idea.

    Attributes:
        name (`str`):
            The field, such as `"accept"`. Further parameters are in the field `{name}_kwargs`, if there is one.
        registry (`dict`):
            Names and factories. Names that are registered later count too.
        kind (`str`):
            What an idea of this field is, for messages: `"an AcceptanceRule"`.
        is_idea (`Callable`):
            Whether an object is such an idea, rather than a factory of one.
        parameters (`dict`):
            By parameter of a factory, the configuration's own field that sets it: `{"k": "accept_top_k"}`.
    """

    name: str
    registry: Mapping[str, Callable[..., Any]]
    kind: str
    is_idea: Callable[[Any], bool]
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Number:
    """A numeric parameter that a configuration's ideas use: its value (`None`: not given) and whether it is a whole number."""

    value: float | None
    is_whole: bool


def make_idea(field: IdeaField, config: Any) -> Any:
    """
    The idea that `config` names in `field`.

    Raises:
        `ValueError`: for an unknown name, a parameter that the factory does not take or that a field of the configuration sets,
            a missing one, parameters beside an object, a value that the factory refuses, or something that is no such idea.
    """
    entry, kwargs = _entry(field, config), _kwargs(field, config)
    chosen, takes = _chosen(field, config), _signature(field, entry)
    where = f"{field.name}_kwargs={kwargs!r}"
    if field.is_idea(entry):
        if kwargs:
            raise ValueError(
                f"{where} would have no effect: {chosen} is an object, which has its parameters (of a function that makes one, they need "
                "defaults). Drop them."
            )
        return entry
    own = {parameter: getattr(config, name) for parameter, name in field.parameters.items() if parameter in takes}
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(entry).parameters.values())
    for parameter in kwargs:
        if parameter in field.parameters and parameter in takes:
            raise ValueError(f"{where}: {parameter} is set by {field.parameters[parameter]}.")
        if parameter not in takes and not takes_anything:
            raise ValueError(
                f"{where}: unexpected {parameter!r}; {_name(field, config)} takes {_listed(takes, field)}."
            )
    missing = [name for name, p in takes.items() if p.default is p.empty and name not in {**own, **kwargs}]
    if missing:
        raise ValueError(f"{chosen} needs {', '.join(missing)}: set it in {field.name}_kwargs.")
    try:
        idea = entry(**own, **kwargs)
    except (ValueError, TypeError) as error:
        given = [
            chosen,
            *(f"{field.parameters[p]}={value!r}" for p, value in own.items()),
            *([where] if kwargs else []),
        ]
        raise ValueError(f"{', '.join(given)}: {error}") from error
    if not field.is_idea(idea):
        raise ValueError(
            f"{chosen} makes an object of type {type(idea).__name__}, and {field.name} needs {field.kind}."
        )
    return idea


def check_used(config: Any, used: Iterable[IdeaField]) -> None:
    """
    Checks that each field which sets a parameter has one to set, if it is not at its default.

    Raises:
        `ValueError`: naming the field and the ideas that it belongs to.
    """
    owners: dict[str, list[tuple[IdeaField, str]]] = {}
    for field in used:
        for parameter, name in field.parameters.items():
            owners.setdefault(name, []).append((field, parameter))
    for name, places in owners.items():
        taken = any(parameter in _signature(field, _entry(field, config)) for field, parameter in places)
        if taken or is_default(config, name):
            continue
        field, parameter = places[0]
        entry = _entry(field, config)
        reason = f"{_name(field, config)} takes {_listed(_signature(field, entry), field)}"
        if field.is_idea(entry):
            reason = "it is an object, which has its parameters (of a function that makes one, they need defaults)"
        others = [f"{field.name}={n!r}" for n, e in field.registry.items() if parameter in _signature(field, e)]
        raise ValueError(
            f"{name}={getattr(config, name)!r} would have no effect beside {_chosen(field, config)}: {reason}. It belongs to "
            f"{', '.join(others)}; leave it at {default_of(config, name)!r}."
        )


def numbers_of(field: IdeaField, config: Any) -> dict[str, Number]:
    """The numeric parameters of the idea in `field` by where the configuration sets them: `"accept_top_k"`,
    `"accept_kwargs.alpha"`."""
    kwargs, numbers = _kwargs(field, config), {}
    for parameter, p in _signature(field, _entry(field, config)).items():
        default = None if p.default is p.empty else p.default
        if parameter in field.parameters:
            path = field.parameters[parameter]
            value, is_whole = getattr(config, path), isinstance(default_of(config, path), int)
        elif hasattr(config, f"{field.name}_kwargs"):
            path, value = f"{field.name}_kwargs.{parameter}", kwargs.get(parameter, default)
            known = value if default is None else default
            is_whole = isinstance(known, int) if p.annotation is p.empty else _number_type(p.annotation) == "int"
        else:
            continue
        if is_number(value) or (
            value is None and (p.annotation is p.empty or _number_type(p.annotation) in ("int", "float"))
        ):
            numbers[path] = Number(value, is_whole)
    return numbers


def _number_type(annotation: Any) -> str | None:
    """The name of the one type that an annotation has beside `None`: `int | None`, `Optional[int]`, or their text."""
    if isinstance(annotation, str):
        inner = re.sub(r"^(typing\.)?Optional\[(.*)\]$", r"\2", annotation)
        names = {name.strip() for name in inner.split("|")}
    else:
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        names = {getattr(one, "__name__", "") for one in (typing.get_args(annotation) if is_union else (annotation,))}
    names -= {"None", "NoneType"}
    return names.pop() if len(names) == 1 else None


def describe(value: Any) -> Any:
    """An idea as reports show it: a function or class becomes `"module:attribute"`, an object its repr; names, numbers and
    dicts stay."""
    if value is None or isinstance(value, str | int | float | dict):
        return value
    return f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def default_of(config: Any, name: str) -> Any:
    """The default of a field of a dataclass."""
    return next(field.default for field in fields(config) if field.name == name)


def is_default(config: Any, name: str) -> bool:
    """Whether a field of a dataclass is at its default."""
    return getattr(config, name) == default_of(config, name)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entry(field: IdeaField, config: Any) -> Any:
    """The object or factory that the configuration means."""
    value = getattr(config, field.name)
    if not isinstance(value, str):
        if not (field.is_idea(value) or callable(value)):
            raise ValueError(
                f"{field.name}={value!r} is not {field.kind}. Give one, or a name: {', '.join(field.registry)}."
            )
        return value
    if value in field.registry:
        return field.registry[value]
    if ":" not in value:
        raise ValueError(
            f"{field.name}={value!r} is unknown; choose one of {', '.join(field.registry)}, or give {field.kind}, or name your "
            "own as 'module:attribute'."
        )
    try:
        entry = pkgutil.resolve_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{field.name}={value!r} cannot be imported: {error}. Name it as 'module:attribute', with the module installed or "
            "its folder in PYTHONPATH."
        ) from error
    if not (field.is_idea(entry) or callable(entry)):
        raise ValueError(
            f"{field.name}={value!r} is of type {type(entry).__name__}, and {field.name} needs {field.kind}."
        )
    return entry


def _kwargs(field: IdeaField, config: Any) -> dict[str, Any]:
    kwargs = getattr(config, f"{field.name}_kwargs", None) or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"{field.name}_kwargs={kwargs!r} is not a dict; write it as {{'name': value}}.")
    return kwargs


def _signature(field: IdeaField, entry: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a factory; an idea that is already made has none."""
    if field.is_idea(entry):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        return {name: p for name, p in inspect.signature(entry).parameters.items() if p.kind in named}
    except ValueError as error:  # some of what is written in C
        message = f"{field.name}={describe(entry)!r}: {error}, so its parameters are not known. Wrap it in a function."
        raise ValueError(message) from error


def _name(field: IdeaField, config: Any) -> str:
    return str(describe(getattr(config, field.name)))


def _chosen(field: IdeaField, config: Any) -> str:
    value = getattr(config, field.name)
    return f"{field.name}={value!r}" if isinstance(value, str) else f"{field.name}={describe(value)}"


def _listed(takes: Iterable[str], field: IdeaField) -> str:
    """Parameters with the field that sets them, if one does."""
    names = [f"{p} (set by {field.parameters[p]})" if p in field.parameters else p for p in takes]
    return ", ".join(names) or "no parameters"
