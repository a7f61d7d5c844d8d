"""How many threads encode, with a clock and a meter that stand where the test puts them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import threadpoolctl
import torch

from autoembed.process import threads
from autoembed.process.threads import Policy

BULK = 4000


@dataclass
class Machine:
    """Seconds by the clock, of all processes, and of our own."""

    clock: float = 1000.0
    used: float = 5000.0
    own: float = 10.0

    def run(self, seconds: float, own: float, others: float = 0.0) -> None:
        """For so long, on so many cores."""
        self.clock += seconds
        self.own += own * seconds
        self.used += (own + others) * seconds

    def monotonic(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        pass

    def process_time(self) -> float:
        return self.own


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Of four cores."""
    made = Machine()
    monkeypatch.setattr(threads, "time", made)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    return made


def policy(machine: Machine, fixed: int | None = None) -> Policy:
    return Policy(fixed, 1_000_000, lambda: machine.used)


def test_a_lone_run_has_all_cores(machine: Machine) -> None:
    one = policy(machine)
    assert one.threads(BULK) == 4
    for _ in range(3):
        machine.run(1, own=4)
        assert one.threads(BULK) == 4


@pytest.mark.parametrize(("others", "left"), [(0.2, 4), (1, 3), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_what_neighbours_take_is_left_to_them(machine: Machine, others: float, left: int) -> None:
    one = policy(machine)
    machine.run(1, own=1, others=others)
    assert one.threads(BULK) == left


def test_cores_that_become_free_are_taken_again(machine: Machine) -> None:
    one = policy(machine)
    machine.run(1, own=1, others=3)
    assert one.threads(BULK) == 1
    machine.run(1, own=1)
    assert one.threads(BULK) == 4


def test_a_look_too_short_for_the_kernels_clock_changes_nothing(machine: Machine) -> None:
    one = policy(machine)
    machine.run(0.05, own=1, others=3)
    assert one.threads(BULK) == 4
    machine.run(0.06, own=1, others=3)
    assert one.threads(BULK) == 1


@pytest.mark.parametrize(("running", "left"), [(1, 4), (2, 3), (9, 1)])
def test_what_is_over_does_not_count(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, running: int, left: int
) -> None:
    """After a pause, who runs now decides, and not who has run in it."""
    monkeypatch.setattr(threads, "running", lambda: running)
    one = policy(machine)
    machine.run(60, own=0, others=4)
    assert one.threads(BULK) == left


def test_this_process_runs() -> None:
    assert threads.running() >= 1


def test_a_query_has_one_and_a_bulk_run_after_it_has_all(machine: Machine) -> None:
    one = policy(machine)
    assert one.threads(11) == 1
    machine.run(1, own=1)
    assert one.threads(threads.WORK_FOR_ONE // 1_000_000) == 1
    assert one.threads(threads.WORK_FOR_ONE // 1_000_000 + 1) == 4


@pytest.mark.parametrize("fixed", [1, 3, 16])
def test_a_fixed_number_overrides_all(machine: Machine, fixed: int) -> None:
    one = policy(machine, fixed)
    machine.run(1, own=1, others=4)
    assert [one.threads(BULK), one.threads(11)] == [fixed, fixed]


@pytest.mark.parametrize(
    ("limit", "allowed", "expected"),
    [
        ("max 100000", 8, 8),
        ("200000 100000", 8, 2),
        ("250000 100000", 8, 2),
        ("50000 100000", 8, 1),
        ("1600000 100000", 8, 8),
        ("nonsense", 8, 8),
        (None, 3, 3),
    ],
)
def test_cores_are_those_that_the_container_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, allowed: int, expected: int
) -> None:
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert threads.cores() == expected


def test_under_a_quota_the_containers_own_seconds_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n")
    assert threads.meter()() == 2.5


def test_elsewhere_the_seconds_of_our_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """user, nice, system, irq and softirq; not idling, waiting for disks, what a hypervisor stole, or guests twice."""
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 12})
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    lines = [
        "cpu  9 9 9 9 9 9 9 9 9 9",
        "cpu1 100 20 30 5000 600 7 8 9 50 50",
        "cpu12 1000 0 0 1 1 0 0 0 0 0",
        "cpu2 5 5 5 5 5 5 5 5 5 5",
        "intr 1 2 3",
    ]
    (tmp_path / "stat").write_text("\n".join(lines) + "\n")
    assert threads.meter()() == pytest.approx((100 + 20 + 30 + 7 + 8 + 1000) / 100)


def test_without_a_meter_all_cores_are_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    assert threads.meter()() == 0.0


def test_the_kernels_own_figures_can_be_read() -> None:
    first = threads.meter()()
    assert 0 < first <= threads.meter()()
    assert threads.cores() >= 1


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if torch were linked to the BLAS that numpy brings along, an OpenBLAS with pthreads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    threads.blas_libraries.cache_clear()
    yield
    threads.use(before)
    threads.blas_libraries.cache_clear()


def test_a_blas_with_threads_of_its_own_has_as_many_as_torch(linked: None) -> None:
    for count in (1, 2):
        threads.use(count)
        own = [each["num_threads"] for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]
        assert own
        assert set(own) == {torch.get_num_threads()} == {count}


def test_where_torch_has_its_own_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    threads.blas_libraries.cache_clear()
    assert threads.blas_libraries() == []
    threads.blas_libraries.cache_clear()
