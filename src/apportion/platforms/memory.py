"""Memory of this machine as this process may use it: the system's and its control groups' limits, whichever is smaller."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_memory() -> int:
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """What the system calls available, or what is left under the tightest limit of a control group (page cache can be dropped)."""
    return max(0, min([_meminfo("MemAvailable"), *(limit - used for limit, used in _limits())]))


def pss_bytes(pid: int | str = "self") -> int:
    """Proportional set size of a process: a page that n processes map counts 1 / n in each."""
    return _field(PROC / str(pid) / "smaps_rollup", "Pss:") * 1024


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: large temporaries otherwise stay in the process."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def cgroup_folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups, innermost first, each with whether it is version 2."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controller if controllers else CGROUP
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_dir():
                yield folder, not controllers
            if folder == root:
                break


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group of this process that has a limit; droppable page cache is not used."""
    for folder, is_v2 in cgroup_folders("memory"):
        limit_name, used_name, cache_name = _V2 if is_v2 else _V1
        if not (folder / limit_name).exists():
            continue
        limit = (folder / limit_name).read_text().strip()
        if limit != "max":
            yield int(limit), int((folder / used_name).read_text()) - _field(folder / "memory.stat", cache_name)


def _meminfo(name: str) -> int:
    return _field(PROC / "meminfo", f"{name}:") * 1024


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of lines 'name number [unit]'."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    raise KeyError(f"{path} has no line {name!r}")
