"""How many threads encode: as many as there are cores that nobody else uses.

Threads beyond the free cores wait for one another at every barrier: two processes with two threads each on two cores
do half the work of two with one each. Nobody tells a backend what others do, but the kernel counts the time that all
processes used since this one last looked. What others took leaves the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
STAT = Path("/proc/stat")
# In tokens times bytes of weights: a query to a small model is done before a second thread has woken up. A large one
# reads its weights twice as fast with two threads.
WORK_FOR_ONE = 3_000_000_000
# The kernel counts in hundredths of a second: a shorter look says nothing. A longer one tells of what is over,
# but a pass of a large model on one thread must fit into it.
SHORTEST_LOOK, LONGEST_LOOK = 0.1, 10.0
SAMPLES, BETWEEN_SAMPLES = 3, 0.002


def use(count: int) -> None:
    """Has torch compute with so many threads from now on."""
    import torch

    torch.set_num_threads(count)
    for library in blas_libraries():
        library.set_num_threads(count)


@cache
def blas_libraries() -> list[Any]:
    """Returns the system's BLAS that torch may be linked to: built with pthreads, it does not go by torch's number.

    Empty where torch carries MKL, and so in most sessions: looking through all libraries costs them nothing.
    """
    import torch

    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return []
    from threadpoolctl import ThreadpoolController

    found: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    return found


class Policy:
    """`fixed` is EMBEDDING_THREADS; None leaves it to what is free. `weights` are the model's, in bytes."""

    def __init__(self, fixed: int | None, weights: int, used: Callable[[], float] | None = None) -> None:
        self.fixed = fixed
        self.weights = weights
        self.cores = cores()
        self.used = used or meter()
        self.free = self.cores
        self.looked = self._look()

    def threads(self, tokens: int) -> int:
        """Returns how many serve a micro-batch of so many tokens."""
        if self.fixed is not None:
            return self.fixed
        if tokens * self.weights <= WORK_FOR_ONE:
            return 1
        clock, everyone, own = self._look()
        elapsed = clock - self.looked[0]
        if elapsed >= SHORTEST_LOOK:
            average = (everyone - self.looked[1] - (own - self.looked[2])) / elapsed
            others = average if elapsed <= LONGEST_LOOK else running() - 1
            self.free = max(1, min(self.cores, round(self.cores - others)))
            self.looked = (clock, everyone, own)
        return self.free

    def _look(self) -> tuple[float, float, float]:
        return time.monotonic(), self.used(), time.process_time()


def running() -> int:
    """Returns how many tasks run or wait for a core, this one among them; 1 where the kernel does not say.

    The least of some samples: threads that fall asleep, ours among them, are no load.
    """
    found = []
    for _ in range(SAMPLES):
        lines = STAT.read_text().splitlines() if STAT.exists() else []
        found.append(next((int(line.split()[1]) for line in lines if line.startswith("procs_running")), 1))
        time.sleep(BETWEEN_SAMPLES)
    return max(1, min(found))


def cores() -> int:
    """Returns what this process may use: fewer than the machine has under an affinity mask or a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(allowed, round(quota))) if quota else allowed


def meter() -> Callable[[], float]:
    """Returns the seconds of all processes that share our cores: the container's if it has a quota, else our cores'."""
    if _quota():
        return _container_seconds
    if STAT.exists():
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        tick = os.sysconf("SC_CLK_TCK")
        return lambda: _core_seconds(names, tick)
    return lambda: 0.0


def _core_seconds(names: set[str], tick: int) -> float:
    """Returns what these cores were busy: all columns of /proc/stat but four.

    Those are idle and iowait, what guests took, which is counted as user time already, and what the host stole, which
    grows with our own demand.
    """
    lines = (line.split() for line in STAT.read_text().splitlines())
    busy = sum(sum(map(int, [*line[1:4], *line[6:8]])) for line in lines if line and line[0] in names)
    return busy / tick


def _container_seconds() -> float:
    fields = dict(line.split() for line in (CGROUP / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6


def _quota() -> float | None:
    """Returns the cores by the container's cpu.max (Linux, cgroup v2), or None."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
