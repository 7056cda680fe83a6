"""`skd serve`: a teacher behind a server; see `serving/server.py`."""

from ..serving.server import main as run


__all__ = ["run"]
