"""CPU time of a server on this machine, process by process, over a run."""

from __future__ import annotations

from typing import Any

import psutil

from apportion.core.errors import InvalidParameter


class ServerCpu:
    """Reads the clocks of a process and its children when made, and again at `since`. Errors: InvalidParameter for no such process."""

    def __init__(self, pid: int) -> None:
        try:
            self.root = psutil.Process(pid)
        except psutil.NoSuchProcess:
            raise InvalidParameter(f"--server-pid: there is no process {pid}") from None
        self.before = self._read()

    def since(self, num_tokens: int) -> dict[str, dict[str, Any]]:
        """{process: cpu_s, cpu_us_per_token, rss_bytes}. A process that ended meanwhile is missing; a new one counts from zero."""
        found = {}
        for pid, (name, cpu_s, rss_bytes) in self._read().items():
            spent = cpu_s - self.before.get(pid, (name, 0.0, 0))[1]
            found[f"{name} ({pid})"] = {
                "cpu_s": spent,
                "cpu_us_per_token": 1e6 * spent / num_tokens if num_tokens else 0.0,
                "rss_bytes": rss_bytes,
            }
        return found

    def _read(self) -> dict[int, tuple[str, float, int]]:
        found = {}
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                found[process.pid] = (_name(process), times.user + times.system, process.memory_info().rss)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found


def _name(process: psutil.Process) -> str:
    """The module of `python -m MODULE`, otherwise the executable's name."""
    words = process.cmdline()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return words[0].rpartition("/")[2] if words else process.name()
