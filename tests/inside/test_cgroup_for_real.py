"""The control groups of this machine: caps that bite, and nothing left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from groups import ended, removed

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import (
    CgroupFacts,
    CgroupTree,
    leftover_names,
    open_tree,
    survey,
)
from sandbox_provisioner.spec import Limits

pytestmark = pytest.mark.requires("cgroup")

MIB = 1 << 20
PATIENCE_SECONDS = 20.0

JOIN = """
import os, sys
for file in sys.argv[2:]:
    with open(file, "w") as stream:
        stream.write("0")
print("joined", flush=True)
"""

Open = Callable[..., CgroupTree]


def every_form() -> list[CgroupFacts]:
    """What `survey` finds, and on a hybrid machine the v2 tree too, which has no controllers."""
    found = survey()
    forms = [found]
    mounts = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    groups = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    points = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    own = [line.removeprefix("0::") for line in groups if line.startswith("0::")]
    base = "".join(points[:1] + own[:1]).rstrip("/")
    if found.version == 1 and points and os.access(base, os.W_OK):
        forms.append(CgroupFacts(version=2, bases={"freezer": base}, missing={}))
    return forms


def groups_of(tree: CgroupTree) -> list[Path]:
    return [Path(file).parent for file in tree.join_files]


@pytest.fixture(params=every_form(), ids=lambda facts: f"v{facts.version}")
def any_facts(request: pytest.FixtureRequest) -> CgroupFacts:
    facts: CgroupFacts = request.param
    return facts


def end_tree(tree: CgroupTree) -> None:
    tree.kill()
    asyncio.run(removed(tree))


@pytest.fixture
def new_tree() -> Iterator[Open]:
    trees: list[CgroupTree] = []

    def new(limits: Limits, facts: CgroupFacts | None = None) -> CgroupTree:
        name = f"test-{os.getpid()}-{len(trees)}"
        tree = open_tree(facts or survey(), name, limits, lambda facility: False, pytest.fail)
        tree.create(limits)
        trees.append(tree)
        return tree

    yield new
    for tree in trees:
        end_tree(tree)
    assert not [group for tree in trees for group in groups_of(tree) if group.exists()]


@pytest.fixture
def member() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []

    def start(tree: CgroupTree, code: str, argument: str = "") -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-SI", "-c", JOIN + code, argument, *tree.join_files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "joined\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        # Not communicate(): it would wait for the grandchildren, which the tree ends afterwards.
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


Member = Callable[..., subprocess.Popen[str]]


def answer_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.requires("cgroup-memory")
def test_a_process_over_the_memory_cap_dies_and_is_counted(new_tree: Open, member: Member) -> None:
    tree = new_tree(Limits(memory_bytes=64 * MIB))
    child = member(tree, "block = bytearray(256 << 20); print('survived', flush=True)")
    assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    usage = tree.usage()
    # memory.oom.group of v2 makes the kernel meet its first victim again, and count it twice.
    assert usage.oom_kills == 1 or (survey().version, usage.oom_kills) == (2, 2)
    assert usage.memory_limit_bytes == 64 * MIB
    # memory.peak is there since Linux 5.19.
    assert usage.memory_peak_bytes is None or 32 * MIB < usage.memory_peak_bytes <= 64 * MIB


@pytest.mark.requires("cgroup-swap")
@pytest.mark.parametrize(("swap_bytes", "v1_bytes"), [(None, 64 * MIB), (16 * MIB, 80 * MIB)])
def test_linux_gets_as_much_swap_as_was_asked_for(
    new_tree: Open, swap_bytes: int | None, v1_bytes: int
) -> None:
    """v1 caps the sum of memory and swap, v2 the swap."""
    tree = new_tree(Limits(memory_bytes=64 * MIB, swap_bytes=swap_bytes))
    names = {"memory.memsw.limit_in_bytes": v1_bytes, "memory.swap.max": swap_bytes or 0}
    files = [(g / name, size) for g in groups_of(tree) for name, size in names.items()]
    found = [(int(file.read_text()), size) for file, size in files if file.exists()]
    assert len(found) == 1
    assert all(told == size for told, size in found)


@pytest.mark.requires("cgroup-pids")
def test_the_fork_over_the_pids_cap_gets_eagain(new_tree: Open, member: Member) -> None:
    most = 8
    tree = new_tree(Limits(pids=most))
    code = """
import signal
count = 1
try:
    while os.fork():
        count += 1
    signal.pause()
except OSError as error:
    print(error.errno, count, flush=True)
    signal.pause()
"""
    assert answer_of(member(tree, code)) == f"{errno.EAGAIN} {most}"
    usage = tree.usage()
    assert usage.processes == most
    assert usage.pids_limit_hits == 1
    assert len(tree.pids()) == most


@pytest.mark.requires("cgroup-cpu")
def test_a_cpu_cap_throttles(new_tree: Open, member: Member) -> None:
    # Less than it gets on a machine that many want: who does not reach a cap is not held back.
    tree = new_tree(Limits(cpu_cores=0.02, cpu_guarantee_cores=0.5))

    def throttled() -> bool:
        stats = [file.read_text() for g in groups_of(tree) if (file := g / "cpu.stat").exists()]
        lines = [line.split() for stat in stats for line in stat.splitlines()]
        return any(int(count) > 0 for key, count in lines if key == "nr_throttled")

    member(tree, "while True: pass")
    eventually(throttled)
    assert (tree.usage().cpu_seconds or 0) > 0


@pytest.mark.requires("cgroup-cpuset")
def test_a_cpuset_confines(new_tree: Open, member: Member) -> None:
    cpu = max(os.sched_getaffinity(0))
    tree = new_tree(Limits(cpuset=frozenset({cpu})))
    assert answer_of(member(tree, "print(os.sched_getaffinity(0), flush=True)")) == f"{{{cpu}}}"


@pytest.mark.requires("cgroup-cpuset")
def test_a_cpu_that_is_not_there_is_refused_by_the_names_of_those_that_are(
    new_tree: Open,
) -> None:
    with pytest.raises(SpecError, match="the CPUs available here are 0"):
        new_tree(Limits(cpuset=frozenset({0, 4095})))


def test_freeze_stops_a_process_and_thaw_lets_it_go_on(
    new_tree: Open, member: Member, tmp_path: Path, any_facts: CgroupFacts
) -> None:
    counter_file = tmp_path / "counter"
    counter_file.write_bytes(bytes(8))
    tree = new_tree(Limits(), any_facts)
    code = """
import mmap
with open(sys.argv[1], "r+b") as file:
    counter = mmap.mmap(file.fileno(), 8)
number = 0
while True:
    number += 1
    counter[:] = number.to_bytes(8, "little")
"""
    with counter_file.open("r+b") as file, mmap.mmap(file.fileno(), 8) as counter:
        member(tree, code, str(counter_file))
        eventually(lambda: counter[:] != bytes(8))
        tree.freeze()
        frozen_at = counter[:]
        time.sleep(0.05)
        assert counter[:] == frozen_at
        tree.thaw()
        eventually(lambda: counter[:] != frozen_at)


@pytest.mark.parametrize("frozen", [False, True])
def test_kill_ends_a_process_frozen_or_not(
    new_tree: Open, member: Member, any_facts: CgroupFacts, frozen: bool
) -> None:
    tree = new_tree(Limits(), any_facts)
    child = member(tree, "import signal; signal.pause()")
    if frozen:
        tree.freeze()
    tree.kill()
    assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    eventually(lambda: not tree.pids())


@pytest.mark.requires("cgroup-pids")
@pytest.mark.parametrize("freezer", [True, False])
def test_kill_ends_a_tree_that_forks_all_the_time(
    new_tree: Open, member: Member, freezer: bool
) -> None:
    most, facts = 64, survey()
    if not freezer and facts.version == 1:
        bases = {name: base for name, base in facts.bases.items() if name != "freezer"}
        facts = dataclasses.replace(facts, bases=bases)
    tree = new_tree(Limits(pids=most), facts)
    code = """
while True:
    try:
        if os.fork() and os.getpid() % 3 == 0:
            os._exit(0)
    except OSError:
        pass
"""
    member(tree, code)
    eventually(lambda: len(tree.pids()) > most // 2)
    tree.kill()
    eventually(lambda: not tree.pids())
    asyncio.run(removed(tree))
    assert not any(group.exists() for group in groups_of(tree))


def test_remove_waits_for_the_last_process(
    new_tree: Open, member: Member, any_facts: CgroupFacts
) -> None:
    tree = new_tree(Limits(), any_facts)
    child = member(tree, "sys.stdin.read()")

    async def remove_while_it_ends() -> None:
        removal = asyncio.create_task(removed(tree, PATIENCE_SECONDS))
        await asyncio.sleep(0.05)
        assert not removal.done()
        assert child.stdin is not None
        child.stdin.close()
        await removal

    asyncio.run(remove_while_it_ends())
    assert not any(group.exists() for group in groups_of(tree))


def test_remove_names_the_process_that_stays(
    new_tree: Open, member: Member, any_facts: CgroupFacts
) -> None:
    tree = new_tree(Limits(), any_facts)
    child = member(tree, "sys.stdin.read()")
    with pytest.raises(HostError, match=rf"pids: {child.pid}\)"):
        asyncio.run(removed(tree, 0.05))


def test_remove_twice_is_fine_and_takes_our_directory_along(
    new_tree: Open, any_facts: CgroupFacts
) -> None:
    tree = new_tree(Limits(), any_facts)
    for _ in range(2):
        asyncio.run(removed(tree))
    # Another test run on this machine may have groups there just now.
    for group in groups_of(tree):
        assert not group.parent.exists() or any(d.is_dir() for d in group.parent.iterdir())
    assert tree.pids() == []
    assert tree.usage().processes is None


def test_two_trees_live_side_by_side(
    new_tree: Open, member: Member, any_facts: CgroupFacts
) -> None:
    first, second = new_tree(Limits(), any_facts), new_tree(Limits(), any_facts)
    one, two = (member(tree, "import signal; signal.pause()") for tree in (first, second))
    assert (first.pids(), second.pids()) == ([one.pid], [two.pid])
    end_tree(first)
    assert one.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert two.poll() is None
    assert second.pids() == [two.pid]


def test_a_name_in_use_is_refused_and_its_owner_left_alone(new_tree: Open) -> None:
    tree = new_tree(Limits())
    name = groups_of(tree)[0].name
    twin = open_tree(survey(), name, Limits(), lambda facility: False, pytest.fail)
    with pytest.raises(HostError, match=r"EEXIST|UnitExists"):
        twin.create(Limits())
    assert all(group.exists() for group in groups_of(tree))


@pytest.mark.requires("cgroup-memory")
@pytest.mark.requires("cgroup-pids")
def test_a_create_that_fails_midway_leaves_nothing() -> None:
    # The kernel has no more than 4194304 processes, and refuses a larger cap.
    limits = Limits(memory_bytes=64 * MIB, pids=1 << 30)
    tree = open_tree(
        survey(), f"test-{os.getpid()}-half", limits, lambda facility: False, pytest.fail
    )
    with pytest.raises(HostError, match=r"cap processes at 1073741824 .*pids\.max: EINVAL"):
        tree.create(limits)
    assert not any(group.exists() for group in groups_of(tree))


def test_gc_ends_and_removes_a_tree_by_its_name(
    new_tree: Open, member: Member, any_facts: CgroupFacts
) -> None:
    tree = new_tree(Limits(), any_facts)
    name = groups_of(tree)[0].name
    child = member(tree, "import signal; signal.pause()")
    assert name in leftover_names(any_facts)
    ended(any_facts, name)
    assert child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert name not in leftover_names(any_facts)
    ended(any_facts, name)
