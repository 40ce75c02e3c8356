"""A model opened for writing text while a bar on stderr shows how much of it has been read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moesys.cli.progress import show_bytes
from moesys.inference import OpenModel, open_model


@contextmanager
def open_behind_bar(folder: Path, dtype: str | None, host_memory: str | None) -> Iterator[OpenModel]:
    """Opens a model as `open_model` does; the bar has vanished before anything is done with it."""
    with ExitStack() as opened:
        with show_bytes("loading") as on_progress:
            model = opened.enter_context(
                open_model(folder, dtype=dtype, host_memory=host_memory, on_progress=on_progress)
            )
        yield model
