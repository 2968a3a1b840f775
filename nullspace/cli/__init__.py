"""The command line."""

from nullspace.cli.commands import app, main

__all__ = ["app", "main"]
