"""The figures of a box: which are told, how they are written, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden import ASKERS

from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts, open_tree
from sandbox_provisioner.facilities.figures import inside, plan
from sandbox_provisioner.facilities.figures.inside import text, watch
from sandbox_provisioner.plan import Start
from sandbox_provisioner.spec import Limits

GIB = 1 << 30
V1 = b"cache 1\nrss 2\ntotal_cache 4096000\ntotal_rss 8192000\ntotal_inactive_file 2048000\n"
V2 = b"anon 8192000\nfile 4096000\ninactive_file 2048000\nslab_reclaimable 1024000\n"


def start_with(limits: Limits, asker: str = "root", **site: Any) -> Start:
    request, found = ASKERS[asker]
    spec = replace(request.spec, limits=limits)
    capped = {"memory": limits.memory_bytes, "cpu": limits.cpu_count}
    groups = {name: found.figure_groups[name] for name, cap in capped.items() if cap}
    found = replace(found, figure_groups=groups)
    return Start(replace(request, spec=spec), replace(found, **site))


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (Limits(), []),
        (Limits(pids=64), []),
        (Limits(memory_bytes=GIB), ["usage", "stat", "limit"]),
        (Limits(cpu_cores=1.5), ["cpu"]),
        (Limits(cpuset=frozenset({0, 3})), ["cpu"]),
        (Limits(memory_bytes=GIB, cpu_cores=2), ["usage", "stat", "limit", "cpu"]),
    ],
)
def test_what_a_cap_concerns_is_told_and_nothing_else(limits: Limits, names: list[str]) -> None:
    assert [*plan.files(start_with(limits))] == names
    assert len([*plan.show(start_with(limits))]) == bool(names)


def test_swap_is_read_where_version_2_has_it() -> None:
    limits = Limits(memory_bytes=GIB, swap_bytes=GIB)
    assert "swap" in plan.files(start_with(limits, "user"))
    assert "swap" not in plan.files(start_with(limits))


@pytest.mark.parametrize(
    ("version", "limits", "sums", "expected"),
    [
        (1, Limits(), {}, {}),
        (1, Limits(pids=64), {}, {}),
        (1, Limits(memory_bytes=GIB), {}, {"memory": "/m/{}/hub/ann/server/x"}),
        (1, Limits(cpu_cores=1), {}, {"cpu": "/a/{}/hub/ann/server/x"}),
        (2, Limits(cpuset=frozenset({0})), {}, {"cpu": "/v2/{}/hub/ann/server/x"}),
        (
            1, Limits(),
            {"hub/ann": Limits(memory_bytes=GIB, cpu_cores=1),
             "hub/ann/server": Limits(memory_bytes=GIB)},
            {"memory": "/m/{}/hub/ann/server", "cpu": "/a/{}/hub/ann"},
        ),
        (2, Limits(), {"hub/ann": Limits(cpu_cores=1)}, {"cpu": "/v2/{}/hub/ann"}),
    ],
)  # fmt: skip
def test_the_nearest_group_with_a_cap_tells_what_is_used(
    version: int, limits: Limits, sums: dict[str, Limits], expected: dict[str, str]
) -> None:
    bases = {
        "memory": "/m",
        "cpu": "/c",
        "cpuacct": "/a",
        "cpuset": "/s",
        "pids": "/p",
        "freezer": "/f",
    }
    bases = bases if version == 1 else dict.fromkeys(bases, "/v2")
    facts = CgroupFacts(version=version, bases=bases, missing={})
    tree = open_tree(facts, "hub/ann/server/x", limits, lambda _: False, print, sums=sums)
    assert tree.figure_groups == {
        name: (version, path.format("sandbox-provisioner")) for name, path in expected.items()
    }


def test_a_persons_cap_is_told_where_the_box_has_none_of_its_own() -> None:
    start = start_with(Limits(), figure_groups={"memory": (2, "/ann"), "cpu": (2, "/ann")})
    sums = {
        "hub/ann": Limits(memory_bytes=GIB, cpu_cores=2),
        "hub/ann/x": Limits(memory_bytes=GIB >> 1),
    }
    start = Start(replace(start.request, sums=sums), start.site)
    (step,) = plan.show(start)
    assert step.words[2:] == (str(GIB >> 1), "0", "2", "usage", "stat", "limit", "cpu")
    assert plan.files(start)["cpu"] == "/ann/cpu.stat"


def test_the_least_that_is_allowed_is_the_total_and_a_part_of_a_cpu_is_one() -> None:
    start = start_with(Limits(memory_bytes=1 << 40, cpu_cores=1.2), "user")
    (step,) = plan.show(start)
    assert start.site.memory_above
    assert step.words[2] == str(start.site.memory_above.limit_bytes)
    assert step.words[4] == "2"


@pytest.mark.parametrize("stat", [V1, V2], ids=["v1", "v2"])
def test_a_groups_counts_are_told_by_the_names_of_meminfo(stat: bytes) -> None:
    real = b"MemTotal:  9 kB\nMemFree: 8 kB\nMemAvailable: 7 kB\nCached: 1 kB\nAnonPages: 1 kB\n"
    real += b"HugePages_Total:       3\nHugepagesize:       2048 kB\nNew:      5 kB\n"
    made = text.MemoryText(real).text(GIB, 16_384_000, (0, 0), text.keyed(stat))
    reclaimable = 2000 + (1000 if stat == V2 else 0)
    assert [line.split() for line in made.splitlines()] == [
        [b"MemTotal:", b"1048576", b"kB"],
        [b"MemFree:", b"1032576", b"kB"],
        [b"MemAvailable:", b"%d" % (1032576 + reclaimable), b"kB"],
        [b"Cached:", b"4000", b"kB"],
        [b"AnonPages:", b"8000", b"kB"],
        [b"HugePages_Total:", b"0"],
        [b"Hugepagesize:", b"2048", b"kB"],
        [b"New:", b"0", b"kB"],
    ]


def test_each_text_has_the_same_length_every_time() -> None:
    memory = text.MemoryText(b"MemTotal:  9 kB\nMemFree: 8 kB\nSwapFree: 1 kB\n")
    lengths = {
        len(memory.text(total, used, (total, 5), text.keyed(V2)))
        for total in (1 << 20, 1 << 42) for used in (0, 1 << 20, 1 << 50)
    }  # fmt: skip
    assert len(lengths) == 1
    cpu = text.CpuText(2, 0.0, 1)
    found = set()
    for second in (1, 10, 1 << 20):
        cpu.saw(second * 1.5, float(second))
        found.add((len(cpu.stat()), len(cpu.load([1, second]))))
    assert len(found) == 1


def test_cpu_time_is_shared_out_and_idle_time_never_falls() -> None:
    cpu, idle = text.CpuText(2, 100.0, 7), 0
    for used, now in ((1.0, 101.0), (5.0, 102.0), (5.0, 110.0)):
        cpu.saw(used, now)
        lines = [line.split() for line in cpu.stat().splitlines()]
        assert [int(line[1]) for line in lines[:3]] == [used * 100, used * 50, used * 50]
        assert int(lines[0][4]) >= idle
        idle = int(lines[0][4])
    assert idle == 1500
    assert b"btime 7\n" in cpu.stat()


def test_the_load_comes_to_what_is_used_and_fades() -> None:
    cpu = text.CpuText(2, 0.0, 7)
    for second in range(1, 601):
        cpu.saw(1.5 * second, float(second))
    one, five, fifteen = map(float, cpu.load([1, 9]).split()[:3])
    assert one == pytest.approx(1.5, abs=0.01) and five > 1.2 and five > fifteen > 0.6
    cpu.saw(900.0, 3600.0)
    assert float(cpu.load([1]).split()[0]) == 0
    assert cpu.load([1, 9, 4]).split()[3:] == [b"1/3", b"9"]


@pytest.mark.parametrize(
    ("told", "seconds"), [(b"1500000000\n", 1.5), (b"usage_usec 1500000\nuser_usec 5\n", 1.5)]
)
def test_cpu_time_is_read_in_either_version(told: bytes, seconds: float) -> None:
    assert text.cpu_seconds(told) == seconds


def test_of_the_processors_so_many_are_told_as_cores_of_one_package() -> None:
    info = b"".join(
        b"processor\t: %d\nphysical id\t: 1\ncore id\t\t: 7\ncpu cores\t: 64\nflags\t: a:b\n\n" % n
        for n in range(4)
    )
    assert text.cpus_of(info, 2) == b"".join(
        b"processor\t: %d\nphysical id\t: 0\ncore id\t\t: %d\ncpu cores\t: 2\nflags\t: a:b\n\n"
        % (n, n)
        for n in range(2)
    )
    assert text.mask(3) == b"00000008\n" and text.mask(33) == b"00000002,00000000\n"


def test_the_files_of_many_cpus_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus, page = 64, os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(inside, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(inside, "_attach", lambda *_: None)
    inside._show_folder(None, cpus)  # type: ignore[arg-type]
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    sizes += [cpus * 3000, cpus * 200]  # cpuinfo, stat
    assert len(sizes) * page > 1 << 20
    assert sum(-(-size // page) * page for size in sizes) <= inside._room_bytes(cpus)


# -- when they are written


class Leases:
    """Linux: which files have a lease, and which somebody has open or waits for."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.open: set[int] = set()

    def take_lease(self, fd: int) -> bool:
        if fd in self.open:
            return False
        self.held.add(fd)
        return True

    def has_lease(self, fd: int) -> bool:
        return fd in self.held and fd not in self.open

    def leave_lease(self, fd: int) -> None:
        self.held.discard(fd)

    def signal_fd(self, _: tuple[int, ...]) -> int:
        return self.signals

    signals = -1


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Leases]:
    found = Leases()
    monkeypatch.setattr(watch, "kernel", found)
    monkeypatch.setattr(watch.time, "monotonic", lambda: found.now)
    found.now = 1000.0  # type: ignore[attr-defined]
    yield found


def test_nothing_is_written_while_nobody_reads_and_nothing_wakes_pid_1(
    leases: Any, tmp_path: Path
) -> None:
    written: list[float] = []

    def made() -> bytes:
        written.append(leases.now)
        return b"text"

    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    figures = watch.Figures({fd: made}, lambda: None)
    figures.serve(None, {})  # type: ignore[arg-type]
    assert (figures.patience(), written) == (None, [])

    leases.open.add(fd)  # somebody opens it
    figures.serve(None, {})  # type: ignore[arg-type]
    assert written == [1000.0] and fd not in leases.held
    assert figures.patience() == pytest.approx(101, abs=2)
    leases.now += 0.05
    figures.serve(None, {})  # type: ignore[arg-type]
    assert written == [1000.0]
    leases.now += 0.1  # has it open still
    figures.serve(None, {})  # type: ignore[arg-type]
    assert written == [1000.0, leases.now]
    assert figures.patience() == pytest.approx(1001, abs=2)

    leases.open.clear()
    leases.now += 1.1
    figures.serve(None, {})  # type: ignore[arg-type]
    assert (figures.patience(), len(written)) == (None, 2)
    os.close(fd)


@pytest.mark.parametrize("is_served", [True, False])
def test_the_first_reader_waits_where_somebody_serves_it_and_else_it_is_written_before(
    leases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_served: bool
) -> None:
    monkeypatch.setattr(inside, "kernel", leases)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    told = inside.Told()
    told.texts[fd] = lambda: b"text"
    told.begin(is_served=is_served)
    assert (tmp_path / "file").read_bytes() == (b"" if is_served else b"text")
    leases.open.add(fd)  # before PID 1 waits for anything
    figures = told.watch()
    assert figures
    figures.serve(None, {})  # type: ignore[arg-type]
    assert fd not in leases.held
    assert (tmp_path / "file").read_bytes() == b"text"
    os.close(fd)


@pytest.mark.parametrize("failing", ["text", "look"])
def test_figures_that_cannot_be_had_stay_what_they_were_and_nobody_waits(
    leases: Any, tmp_path: Path, failing: str
) -> None:
    broken: set[str] = set()

    def look() -> None:
        if "look" in broken:
            raise OSError("the group has gone")

    def made() -> bytes:
        if "text" in broken:
            raise OSError("the group has gone")
        return b"text"

    (tmp_path / "file").write_bytes(b"old")
    fd = os.open(tmp_path / "file", os.O_RDWR)
    figures = watch.Figures({fd: made}, look)
    figures.serve(None, {})  # type: ignore[arg-type]
    broken.add(failing)
    leases.open.add(fd)
    figures.serve(None, {})  # type: ignore[arg-type]
    assert fd not in leases.held
    assert (tmp_path / "file").read_bytes() == (b"old" if failing == "text" else b"text")
    os.close(fd)
