"""The commands of `skd` (or `python -m skd_trl`): each module parses its options and calls the package."""
