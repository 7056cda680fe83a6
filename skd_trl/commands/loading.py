"""Models of a command, by name or path: what cannot be loaded is named, with its role."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(role: str, name: str | None) -> None:
    """Raises `ValueError` for a path without a folder, before anything is asked of a hub."""
    looks_local = name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1)
    if looks_local and not Path(str(name)).expanduser().is_dir():
        raise ValueError(f"the {role} {name!r} does not exist: there is no such folder.")


@contextmanager
def naming(role: str, name: str | None) -> Iterator[None]:
    """What is loaded inside is the `role` (student, teacher) called `name`.

    Raises:
        `ValueError`: for a path without a folder, and for whatever the loading raises.
    """
    check_folder(role, name)
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the {role} {name!r} cannot be loaded, neither here nor from the hub. {reason}") from error
