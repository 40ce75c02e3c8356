"""The command line: one file per command. Starting it imports neither torch nor pydantic; commands do."""

from moesys.cli.app import main

__all__ = ["main"]
