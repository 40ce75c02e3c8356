"""A limit on the memory of this process, page cache included: a fresh control group that it joins and leaves.

Works with cgroup v1 and v2 where this user may make groups, which usually means root; elsewhere it says why not. Memory
that the process held before it joined is not counted: join after the imports and before anything is built. Knows
nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
_PREFIX = "moesys-"


class CapUnavailableError(RuntimeError):
    """This process cannot limit its memory; the message says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A control group of the memory controller, and how its version calls the limit.

    path: its folder.
    """

    path: Path
    limit_file: str

    def make_child(self, name: str) -> MemoryGroup:
        """Makes an empty group below this one. Raises `CapUnavailableError`."""
        child = MemoryGroup(self.path / name, self.limit_file)
        try:
            child.path.mkdir()
        except OSError as error:
            raise CapUnavailableError(
                f"{child.path} cannot be made: {error.strerror}; run this as root"
            ) from None
        return child

    def limit(self, num_bytes: int) -> None:
        """Sets the limit. Raises `CapUnavailableError`."""
        try:
            (self.path / self.limit_file).write_text(str(num_bytes))
        except OSError as error:
            raise CapUnavailableError(
                f"{self.path / self.limit_file} cannot be set: {error.strerror}"
            ) from None

    def join(self) -> None:
        """Moves this process here. Raises `CapUnavailableError`."""
        try:
            (self.path / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise CapUnavailableError(f"{self.path} cannot be joined: {error.strerror}") from None


@contextmanager
def memory_cap(
    num_bytes: int, *, cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS
) -> Iterator[MemoryGroup]:
    """Limits what this process and the page cache of what it reads take from now on, until the context ends.

    The system ends a process that needs more than that. Raises `CapUnavailableError`.
    """
    home = find_own_group(cgroups, own_groups)
    parent = find_parent(home)
    remove_abandoned(parent)
    group = parent.make_child(f"{_PREFIX}{os.getpid()}")
    try:
        group.limit(num_bytes)
        group.join()
        try:
            yield group
        finally:
            home.join()
    finally:
        group.path.rmdir()


def find_own_group(cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> MemoryGroup:
    """Returns the memory group of this process. Raises `CapUnavailableError` where there is none."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        raise CapUnavailableError("this system has no control groups") from None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return MemoryGroup(_find_folder(cgroups / "memory", path), "memory.limit_in_bytes")
        if number == "0" and (cgroups / "cgroup.controllers").exists():
            folder = _find_folder(cgroups, path)
            if "memory" in (folder / "cgroup.controllers").read_text().split():
                return MemoryGroup(folder, "memory.max")
    raise CapUnavailableError("the memory controller is not there for control groups of this process")


def find_parent(home: MemoryGroup) -> MemoryGroup:
    """Returns the group below which a limited one can be made: this process's own one; of version 2, whose groups hold
    processes or groups, the one above. Raises `CapUnavailableError`."""
    if home.limit_file == "memory.limit_in_bytes":
        return home
    is_root = not (home.path / "cgroup.type").exists()
    parent = home.path if is_root else home.path.parent
    handed_on = parent / "cgroup.subtree_control"
    if "memory" not in handed_on.read_text().split():
        try:
            handed_on.write_text("+memory")
        except OSError as error:
            raise CapUnavailableError(
                f"{parent} does not hand its memory controller on: {error.strerror}; run this as root"
            ) from None
    return MemoryGroup(parent, home.limit_file)


def remove_abandoned(parent: MemoryGroup) -> None:
    """Removes the groups of processes that were ended inside and could not."""
    for path in parent.path.glob(f"{_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(_PREFIX)).exists():
            with suppress(OSError):
                path.rmdir()


def _find_folder(mount: Path, path: str) -> Path:
    """In a container the path may be that of the host, of which only the mount's root is visible."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount
