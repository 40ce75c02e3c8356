"""The machine's profile, as commands find it: a file that was named, what was saved, or measured now."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesys.errors import ConfigError
from moesys.planning.machine import read_disk, read_machine
from moesys.planning.machine_profile import (
    MachineProfile,
    explain_absence,
    find_profile,
    find_profile_path,
    read_profiles,
    save_profile,
)
from moesys.planning.measure import Progress, measure_machine


def open_profile(path: Path, file: Path | None) -> MachineProfile:
    """Returns the profile for models at ``path``: the one in ``file`` if that is given, else the saved one, else one
    that is measured now, which is said on stderr.

    Raises `ConfigError` for a file that holds no profile of the disk, or several and none of this machine.
    """
    machine, disk = read_machine(), read_disk(path)
    if file is not None:
        if not file.exists():
            raise ConfigError(f"--profile {file} does not exist; moesys doctor writes {find_profile_path()}")
        profiles = read_profiles(file)
        found = find_profile(profiles, machine, disk)
        if found is None and len(profiles) != 1:
            raise ConfigError(
                f"--profile {file} holds {len(profiles)} profiles and none of this machine and disk: "
                f"{explain_absence(profiles, machine, disk)}; run moesys doctor --folder {path}"
            )
        return profiles[0] if found is None else found
    profiles = _read_saved()
    found = find_profile(profiles, machine, disk)
    if found is not None:
        return found
    print(f"{explain_absence(profiles, machine, disk)}; measuring, less than a minute", file=sys.stderr)
    return measure_and_save(path)[0]


def measure_and_save(path: Path) -> tuple[MachineProfile, Path]:
    """Measures behind a bar on stderr; returns the profile and the file that it was saved in."""
    with show_steps() as on_progress:
        profile = measure_machine(path, on_progress)
    file = find_profile_path()
    save_profile(file, profile, _read_saved())
    return profile, file


@contextmanager
def show_steps() -> Iterator[Progress]:
    """Gives what moves a bar on a terminal's stderr, which vanishes at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("measuring"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    is_silent = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_silent) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _read_saved() -> tuple[MachineProfile, ...]:
    """Returns the saved profiles; a file that cannot be read is said on stderr and will be replaced."""
    try:
        return read_profiles(find_profile_path())
    except ConfigError as error:
        print(f"WARNING: {error}; it is replaced", file=sys.stderr)
        return ()
