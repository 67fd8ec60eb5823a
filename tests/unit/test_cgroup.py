"""The survey and the v2 driver, against plain files that stand in for a cgroup file system."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from groups import ended, removed

from sandbox_provisioner.errors import HostError, SpecError, in_lines
from sandbox_provisioner.facilities.caps.cgroup import (
    Bound,
    CgroupFacts,
    CgroupTree,
    NullTree,
    Usage,
    allows_less,
    files,
    free_bytes,
    leftover_names,
    memory_bounds,
    narrowest_bound,
    open_existing,
    open_to_join,
    open_tree,
    survey,
    write_sum,
)
from sandbox_provisioner.facilities.caps.cgroup.above import Above
from sandbox_provisioner.facilities.caps.cgroup.remedies import own_v1
from sandbox_provisioner.facilities.caps.cgroup.tree import hits_of
from sandbox_provisioner.facilities.caps.wish import FACILITIES
from sandbox_provisioner.spec import Limits

CONTROLLERS = ["cpu", "cpuset", "io", "memory", "pids"]
ALL = " ".join(["cpuset", "cpu", "io", "memory", "pids"])
MIB = 1 << 20

CORE = {
    "cgroup.procs": "",
    "cgroup.type": "domain",
    "cgroup.events": "populated 0\nfrozen 0",
    "cgroup.freeze": "0",
    "cgroup.kill": "",
    "cgroup.subtree_control": "",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000",
}
BY_CONTROLLER = {
    "memory": {
        "memory.current": "1048576",
        "memory.peak": "2097152",
        "memory.max": "max",
        "memory.swap.max": "max",
        "memory.oom.group": "0",
        "memory.events": "low 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 1",
    },
    "pids": {"pids.current": "3", "pids.max": "max", "pids.events": "max 4"},
    "cpu": {"cpu.max": "max 100000", "cpu.weight": "100"},
    "io": {"io.max": ""},
    "cpuset": {"cpuset.cpus": "", "cpuset.cpus.effective": "0-3"},
}


@dataclass
class FakeKernel:
    """A directory in which mkdir, rmdir and writing do what cgroup v2 does.

    *refusals* are errnos by the end of a path, *lies* what a file says instead of what was written.
    """

    top: Path
    refusals: dict[str, int] = field(default_factory=dict)
    lies: dict[str, str] = field(default_factory=dict)
    written: list[tuple[str, str]] = field(default_factory=list)
    _mkdir = staticmethod(os.mkdir)
    _rmdir = staticmethod(os.rmdir)

    def fill(self, group: Path, controllers: str) -> None:
        contents = dict(CORE, **{"cgroup.controllers": controllers})
        for controller in controllers.split():
            contents.update(BY_CONTROLLER.get(controller, {}))
        for name, text in contents.items():
            (group / name).write_text(f"{text}\n")

    def group(self, path: str, *, controllers: str = "", hands_down: str = "") -> Path:
        group = self.top / path.lstrip("/")
        group.mkdir(parents=True, exist_ok=True)
        self.fill(group, controllers)
        (group / "cgroup.subtree_control").write_text(hands_down)
        return group

    def refuse(self, path: str) -> None:
        for end, number in self.refusals.items():
            if path.endswith(end):
                raise OSError(number, os.strerror(number), path)

    def mkdir(self, path: str | Path, mode: int = 0o777) -> None:
        self.refuse(str(path))
        self._mkdir(path, mode)
        above = Path(path).parent
        if (above / "cgroup.subtree_control").exists():
            self.fill(Path(path), (above / "cgroup.subtree_control").read_text())

    def rmdir(self, path: str | Path) -> None:
        group = Path(path)
        if group.is_dir() and (
            any(child.is_dir() for child in group.iterdir())
            or "populated 1" in (group / "cgroup.events").read_text()
        ):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        for file in group.glob("*"):
            file.unlink()
        self._rmdir(path)

    def put(self, path: str, value: str) -> None:
        self.refuse(path)
        self.written.append((str(Path(path).relative_to(self.top)), value))
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        name = file.name
        if name == "cgroup.subtree_control":
            value = " ".join([*file.read_text().split(), *value.replace("+", "").split()])
        file.write_text(f"{self.lies.get(name, value)}\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel(top=tmp_path / "cgroup fs")
    fake.group("/", controllers=ALL)
    monkeypatch.setattr(os, "mkdir", fake.mkdir)
    monkeypatch.setattr(os, "rmdir", fake.rmdir)
    monkeypatch.setattr(files, "put", fake.put)
    return fake


@pytest.fixture
def facts(kernel: FakeKernel) -> CgroupFacts:
    bases = dict.fromkeys([*CONTROLLERS, "freezer"], str(kernel.top))
    return CgroupFacts(version=2, bases=bases, missing={})


def refuse(facility: str) -> bool:
    return False


# --- the survey


class Proc:
    """A /proc with one process, "self", and the cgroup mounts that a test gives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mounts: list[str] = []
        self.groups: list[str] = []

    def mount(self, kind: str, point: Path, options: str = "", root: str = "/") -> None:
        escaped = str(point).replace(" ", r"\040")
        self.mounts.append(f"31 23 0:28 {root} {escaped} rw shared:9 - {kind} {kind} rw{options}")

    def survey(self) -> CgroupFacts:
        own = self.path / "self"
        own.mkdir(parents=True, exist_ok=True)
        (own / "mountinfo").write_text("\n".join(["23 1 8:1 / / rw - ext4 sda rw", *self.mounts]))
        (own / "cgroup").write_text("\n".join(self.groups))
        return survey(proc=str(self.path), run=str(self.path / "run"))


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "proc")


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories that are not ours, for which the tests need not drop root."""
    paths: list[Path] = []
    access = os.access

    def check(path: str | Path, mode: int) -> bool:
        directory = Path(path) if Path(path).is_dir() else Path(path).parent
        return access(path, mode) and not (mode & os.W_OK and directory in paths)

    monkeypatch.setattr(os, "access", check)
    return paths


V1_NAMES = ("memory", "cpu,cpuacct", "cpuset", "pids", "blkio", "freezer")


def v1_mounts(proc: Proc, tmp_path: Path, group: str, *, root: str = "/") -> dict[str, Path]:
    points = {}
    for number, names in enumerate(V1_NAMES):
        point = points[names] = tmp_path / "v1" / names
        shown = group.removeprefix(root) if root != "/" else group
        (point / shown.lstrip("/")).mkdir(parents=True)
        if names == "memory":
            (point / shown.lstrip("/") / "memory.memsw.limit_in_bytes").touch()
        proc.mount("cgroup", point, f",{names}", root)
        proc.groups.append(f"{number + 2}:{names}:{group}")
    return points


def test_root_on_v2_uses_the_root_of_the_mount(proc: Proc, kernel: FakeKernel) -> None:
    (kernel.top / "cgroup.type").unlink()
    (kernel.top / "cgroup.procs").write_text("1\n2\n")
    kernel.group("/system.slice", controllers=ALL, hands_down="memory pids")
    kernel.group("/system.slice/hub.service", controllers="memory pids")
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/system.slice/hub.service"]
    facts = proc.survey()
    assert (facts.version, dict(facts.missing)) == (2, {})
    assert set(facts.bases) == {*ALL.split(), "freezer"}
    assert set(facts.bases.values()) == {str(kernel.top)}


def test_root_on_v2_prefers_a_group_that_systemd_delegated(
    proc: Proc, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel.top / "cgroup.type").unlink()
    service = kernel.group("/hub.service", controllers=ALL)
    kernel.group("/hub.service/server", controllers="")

    def getxattr(path: str, name: str) -> bytes:
        if (path, name) == (str(service), "user.delegate"):
            return b"1"
        raise OSError(errno.ENODATA, "no such attribute")

    monkeypatch.setattr(os, "getxattr", getxattr)
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/hub.service/server"]
    assert proc.survey().bases["memory"] == str(service)


def user_groups(
    proc: Proc, kernel: FakeKernel, unwritable: list[Path], delegated: str
) -> tuple[Path, Path]:
    slice_ = kernel.group("/user-1000.slice", controllers=ALL, hands_down=ALL)
    manager = kernel.group("/user-1000.slice/user@1000.service", controllers=delegated)
    own = kernel.group("/user-1000.slice/user@1000.service/lab.scope")
    (own / "cgroup.procs").write_text("77\n")
    unwritable.extend([kernel.top, slice_])
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/user-1000.slice/user@1000.service/lab.scope"]
    return manager, own


def test_a_user_with_delegation_uses_the_nearest_group_that_can_hand_controllers_down(
    proc: Proc, kernel: FakeKernel, unwritable: list[Path]
) -> None:
    manager, _ = user_groups(proc, kernel, unwritable, ALL)
    facts = proc.survey()
    assert (facts.version, dict(facts.missing)) == (2, {})
    assert set(facts.bases.values()) == {str(manager)}


def test_a_user_without_cpu_is_told_so_with_the_line_for_systemd(
    proc: Proc, kernel: FakeKernel, unwritable: list[Path]
) -> None:
    manager, _ = user_groups(proc, kernel, unwritable, "memory pids")
    facts = proc.survey()
    assert facts.missing["cpu"] == f"controller 'cpu' is not delegated to {manager}"
    assert set(facts.missing) == {"cpu", "cpuset", "io"}
    assert "Delegate=cpu cpuset io memory pids" in " ".join(facts.remedy("cpu"))


def test_a_login_session_is_not_ours(
    proc: Proc, kernel: FakeKernel, unwritable: list[Path]
) -> None:
    manager, own = user_groups(proc, kernel, unwritable, ALL)
    unwritable.extend([manager, own])
    facts = proc.survey()
    assert (facts.version, dict(facts.bases)) == (0, {})
    assert facts.missing["memory"] == f"{own} is not writable for uid {os.getuid()}"
    assert "in a login session of systemd" in " ".join(facts.remedy("memory"))


def test_v1_has_a_base_for_each_controller(proc: Proc, tmp_path: Path) -> None:
    points = v1_mounts(proc, tmp_path, "/batch/job 7")
    facts = proc.survey()
    assert (facts.version, dict(facts.missing)) == (1, {})
    assert facts.bases["memory"] == f"{points['memory']}/batch/job 7"
    assert facts.bases["io"] == f"{points['blkio']}/batch/job 7"
    assert facts.bases["cpu"] == facts.bases["cpuacct"] == f"{points['cpu,cpuacct']}/batch/job 7"


def test_v1_tells_what_is_not_mounted_and_what_is_not_ours(
    proc: Proc, tmp_path: Path, unwritable: list[Path]
) -> None:
    points = v1_mounts(proc, tmp_path, "/")
    del proc.mounts[2], proc.mounts[3]
    unwritable.append(points["memory"])
    facts = proc.survey()
    assert dict(facts.missing) == {
        "memory": f"{points['memory']} is not writable for uid {os.getuid()}",
        "swap": f"{points['memory']} is not writable for uid {os.getuid()}",
        "cpuset": "controller 'cpuset' is not mounted",
        "io": "controller 'blkio' is not mounted",
    }
    assert "cgroup_disable=" in " ".join(facts.remedy("cpuset"))
    assert "administrator" in " ".join(facts.remedy("memory"))


def test_a_hybrid_machine_is_v1_while_v2_has_no_controllers(
    proc: Proc, tmp_path: Path, kernel: FakeKernel
) -> None:
    v1_mounts(proc, tmp_path, "/")
    kernel.group("/", controllers="hugetlb")
    proc.mount("cgroup2", kernel.top)
    proc.groups.append("0::/")
    assert proc.survey().version == 1


def test_a_machine_whose_v1_has_only_systemds_names_is_v2(
    proc: Proc, tmp_path: Path, kernel: FakeKernel
) -> None:
    proc.mount("cgroup", tmp_path, ",name=systemd")
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["1:name=systemd:/", "0::/"]
    assert (proc.survey().version, proc.survey().missing) == (2, {})


def test_a_v1_container_sees_its_own_group_at_the_mount(proc: Proc, tmp_path: Path) -> None:
    points = v1_mounts(proc, tmp_path, "/docker/4f2a", root="/docker/4f2a")
    assert proc.survey().bases["pids"] == str(points["pids"])


def test_a_mount_that_shows_another_part_of_the_hierarchy_is_no_base(
    proc: Proc, tmp_path: Path
) -> None:
    v1_mounts(proc, tmp_path, "/docker/4f2a", root="/docker/4f")
    facts = proc.survey()
    assert facts.version == 0
    assert "no mount shows our own group" in facts.missing["memory"]


def test_a_v2_container_with_processes_at_its_root_is_told_to_move_them(
    proc: Proc, kernel: FakeKernel
) -> None:
    (kernel.top / "cgroup.procs").write_text("1\n")
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/"]
    facts = proc.survey()
    assert dict(facts.bases) == {"freezer": str(kernel.top)}
    assert "has processes of its own" in facts.missing["memory"]
    assert f"mkdir {kernel.top}/init" in " ".join(facts.remedy("memory"))


def test_what_lies_above_a_cgroup_namespace_is_no_base(proc: Proc, kernel: FakeKernel) -> None:
    proc.mount("cgroup2", kernel.top, root="/../..")
    proc.groups = ["0::/"]
    assert proc.survey().missing["pids"] == "no mount of cgroup v2 shows our own group"


def test_a_machine_without_cgroups_has_nothing_and_says_so(proc: Proc) -> None:
    facts = proc.survey()
    assert (facts.version, list(facts.missing)) == (0, [*FACILITIES])
    assert facts.missing["memory"] == "no cgroup file system is mounted"
    assert "mount -t cgroup2" in " ".join(facts.remedy("memory"))


# --- opening


NOTHING = CgroupFacts(
    version=0, bases={}, missing=dict.fromkeys(CONTROLLERS, "there are no cgroups")
)


def test_a_cap_that_cannot_be_enforced_is_refused_with_a_remedy() -> None:
    with pytest.raises(HostError) as caught:
        open_tree(NOTHING, "7f3a", Limits(memory_bytes=512 * MIB), refuse, pytest.fail)
    assert caught.value.attempt == "cap memory at 512 MiB"
    assert caught.value.answer == "there are no cgroups"
    alone, command, *_, administrator = caught.value.steps
    assert alone.startswith("By yourself you can do without: then nothing but the machine limits")
    assert command == "  jupyter sandbox install --replace --on-missing=memory=warn"
    assert "mount -t cgroup2" in administrator


def test_all_caps_that_are_missing_are_told_at_once_and_what_helps_once() -> None:
    facts = CgroupFacts(version=1, bases={}, missing={"memory": "no", "cpu": "no", "pids": "never"})
    limits = Limits(memory_bytes=512 * MIB, cpu_cores=1, pids=64, by_default=frozenset({"pids"}))
    with pytest.raises(HostError) as caught:
        open_tree(facts, "7f3a", limits, refuse, pytest.fail)
    assert caught.value.attempt == "cap memory at 512 MiB and cap CPU time at 1 core"
    assert caught.value.answer == "no"
    assert '{"memory": "warn", "cpu": "warn"}' in caught.value.remedy
    assert caught.value.remedy.count("sudo chown") == 1


def test_on_v1_an_administrator_makes_the_groups_and_the_user_starts_the_server_in_them() -> None:
    told = own_v1(["/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,cpuacct"], "alice")
    assert in_lines("\n".join(told)).split("\n") == [
        "As administrator, make control groups for alice, after each boot:",
        "  for c in cpu,cpuacct memory; do",
        "    sudo mkdir -p /sys/fs/cgroup/$c/jupyter-alice &&",
        "    sudo chown -R alice /sys/fs/cgroup/$c/jupyter-alice;",
        "  done",
        "Then, by yourself, start the server in them:",
        "  for c in cpu,cpuacct memory; do",
        "    echo $$ > /sys/fs/cgroup/$c/jupyter-alice/cgroup.procs;",
        "  done; jupyter lab",
    ]
    whole = own_v1(["/sys/fs/cgroup/cpuset"], "alice")
    assert any("cp /sys/fs/cgroup/cpuset/$f" in step for step in whole)  # else nobody can join


def test_what_is_mounted_read_only_is_no_question_of_owners(
    proc: Proc, kernel: FakeKernel, unwritable: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, own = user_groups(proc, kernel, unwritable, ALL)
    unwritable += [manager, own]
    room = sys.modules["sandbox_provisioner.facilities.caps.cgroup.survey"]
    monkeypatch.setattr(room, "_is_read_only", lambda directory: True)
    facts = proc.survey()
    assert facts.missing["memory"] == f"{own} is mounted read-only"
    assert "podman run" in " ".join(facts.remedy("memory"))


def test_on_v1_too_what_a_container_may_only_read_is_told_as_that(
    proc: Proc, tmp_path: Path, unwritable: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = v1_mounts(proc, tmp_path, "/podman/1", root="/podman/1")
    unwritable += groups.values()
    room = sys.modules["sandbox_provisioner.facilities.caps.cgroup.survey"]
    monkeypatch.setattr(room, "_is_read_only", lambda directory: True)
    facts = proc.survey()
    assert facts.missing["memory"] == f"{groups['memory']} is mounted read-only"
    assert "podman run" in " ".join(facts.remedy("memory"))


def test_a_waived_cap_is_dropped_with_a_warning() -> None:
    warnings: list[str] = []
    limits = Limits(pids=64, cpu_guarantee_cores=0.5)
    tree = open_tree(NOTHING, "7f3a", limits, lambda facility: True, warnings.append)
    assert isinstance(tree, NullTree)
    assert ["guarantee 0.5 cores of CPU time" in text for text in warnings] == [True, False]
    assert "cap processes at 64" in warnings[1]


def test_a_cap_that_is_only_a_default_is_given_up() -> None:
    limits = Limits(pids=64, memory_bytes=MIB << 6, by_default=frozenset({"pids", "memory"}))
    assert isinstance(open_tree(NOTHING, "7f3a", limits, refuse, pytest.fail), NullTree)
    with pytest.raises(HostError, match="cap memory at 64 MiB"):
        asked = Limits(pids=64, memory_bytes=MIB << 6, by_default=frozenset({"pids"}))
        open_tree(NOTHING, "7f3a", asked, refuse, pytest.fail)


def test_the_caps_of_the_groups_above_are_known(kernel: FakeKernel, tmp_path: Path) -> None:
    kernel.group("/", controllers=ALL)
    (kernel.group("/a", controllers=ALL) / "memory.max").write_text(f"{3 << 30}\n")
    (kernel.group("/a/b", controllers=ALL) / "memory.max").write_text(f"{5 << 30}\n")
    facts = CgroupFacts(version=2, bases={"memory": f"{kernel.top}/a/b"}, missing={})
    assert memory_bounds(facts) == [5 << 30, 3 << 30]
    (tmp_path / "memory.stat").write_text("cache 12\nhierarchical_memory_limit 4096\n")
    assert memory_bounds(CgroupFacts(version=1, bases={"memory": str(tmp_path)}, missing={})) == [
        4096
    ]
    assert memory_bounds(NOTHING) == []


@pytest.mark.parametrize("where", ["memory", "pids", "cpu"])
def test_whoever_shares_one_hierarchy_with_a_server_sees_its_processes(
    where: str, tmp_path: Path
) -> None:
    """Else gc takes what runs for left, where another server's memory groups lie elsewhere."""
    bases = {name: str(tmp_path / name) for name in ("memory", "cpu", "pids", "freezer")}
    group = Path(bases[where], "sandbox-provisioner", "7f3a")
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text("12\n7\n")
    tree = open_existing(CgroupFacts(version=1, bases=bases, missing={}), "7f3a")
    assert tree.pids() == [7, 12]


def test_without_cgroups_and_caps_there_is_an_empty_tree() -> None:
    tree = open_tree(NOTHING, "7f3a", Limits(), refuse, pytest.fail)
    tree.create(Limits())
    tree.kill()
    tree.thaw()
    asyncio.run(removed(tree))
    assert (tree.join_files, tree.pids(), tree.usage()) == ((), [], Usage())
    with pytest.raises(HostError, match="no cgroup is usable"):
        tree.freeze()


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "two\nlines"])
def test_a_name_is_one_plain_directory_name(facts: CgroupFacts, name: str) -> None:
    with pytest.raises(SpecError, match="plain directory name"):
        open_tree(facts, name, Limits(), refuse, pytest.fail)


# --- the v2 driver

EVERYTHING = Limits(
    memory_bytes=512 * MIB + 5,
    cpu_cores=1.5,
    cpu_guarantee_cores=0.25,
    cpuset=frozenset({0, 1, 3}),
    pids=64,
    io_bytes_per_second=5 * MIB,
)
DISK = "254:0"


def create(facts: CgroupFacts, limits: Limits, name: str = "k1") -> Path:
    tree = open_tree(facts, name, limits, refuse, pytest.fail, DISK)
    tree.create(limits)
    return Path(tree.join_files[0]).parent


def test_v2_writes_every_cap(kernel: FakeKernel, facts: CgroupFacts) -> None:
    io = f"254:0 rbps={5 * MIB} wbps={5 * MIB}"
    kernel.lies = {"cpuset.cpus": "0-1,3", "io.max": f"8:0 rbps=1\n{io} riops=max wiops=max"}
    create(facts, EVERYTHING)
    enable = "+cpu +cpuset +io +memory +pids"
    group = "sandbox-provisioner/k1"
    assert kernel.written == [
        ("cgroup.subtree_control", enable),
        ("sandbox-provisioner/cgroup.subtree_control", enable),
        (f"{group}/memory.max", str(512 * MIB)),
        (f"{group}/memory.swap.max", "0"),
        (f"{group}/memory.oom.group", "1"),
        (f"{group}/cpu.max", "150000 100000"),
        (f"{group}/cpu.weight", "25"),
        (f"{group}/cpuset.cpus", "0,1,3"),
        (f"{group}/pids.max", "64"),
        (f"{group}/io.max", io),
    ]


def test_what_runs_gets_other_caps_and_only_those(kernel: FakeKernel, facts: CgroupFacts) -> None:
    """By who has only found it, whatever caps it was made with; and no less memory than is in use,
    for which Linux would end somebody."""
    group = create(facts, Limits(memory_bytes=512 * MIB, pids=64))
    tree = open_existing(facts, "k1")
    (group / "memory.stat").write_text(f"anon {300 * MIB}\nshmem {60 * MIB}\nfile 9999\n")
    kernel.written.clear()
    for limits in (Limits(memory_bytes=359 * MIB), Limits(memory_bytes=64 * MIB, pids=99)):
        with pytest.raises(HostError, match=r"it uses 360 MiB now.*nothing was changed"):
            tree.change(limits)
    assert not kernel.written
    tree.change(Limits(memory_bytes=400 * MIB, pids=99, cpu_cores=1.5))
    assert kernel.written == [
        ("sandbox-provisioner/k1/memory.max", str(400 * MIB)),
        ("sandbox-provisioner/k1/cpu.max", "150000 100000"),
        ("sandbox-provisioner/k1/pids.max", "99"),
    ]
    without = replace(facts, bases={name: facts.bases[name] for name in ("memory", "freezer")})
    with pytest.raises(HostError, match="without a group for its number of processes"):
        open_existing(without, "k1").change(Limits(pids=99))
    with pytest.raises(HostError, match="no cgroup is usable"):
        NullTree(NOTHING, "k1").change(Limits(pids=99))


def test_a_capped_groups_memory_can_be_watched(kernel: FakeKernel, facts: CgroupFacts) -> None:
    capped, free = Limits(memory_bytes=64 * MIB), Limits(pids=64)
    group = f"{kernel.top}/sandbox-provisioner/k1"
    assert open_tree(facts, "k1", capped, refuse, pytest.fail).memory_group == (2, group)
    assert open_tree(facts, "k1", free, refuse, pytest.fail).memory_group is None
    bases = {name: f"/cg/{name}" for name in ("memory", "pids", "cpuacct", "freezer")}
    v1 = CgroupFacts(version=1, bases=bases, missing={})
    found = open_tree(v1, "k1", capped, refuse, pytest.fail).memory_group
    assert found == (1, "/cg/memory/sandbox-provisioner/k1")
    assert open_tree(v1, "k1", free, refuse, pytest.fail).memory_group is None
    lacking = CgroupFacts(version=0, bases={}, missing={"memory": "it is not there"})
    tree = open_tree(lacking, "k1", capped, lambda facility: True, lambda text: None)
    assert tree.memory_group is None


def test_v2_enables_only_what_it_needs_and_lacks(kernel: FakeKernel, facts: CgroupFacts) -> None:
    kernel.group("/", controllers=ALL, hands_down="memory")
    create(facts, Limits())
    assert kernel.written == [
        ("cgroup.subtree_control", "+pids"),
        ("cgroup.subtree_control", "+cpu"),
        ("sandbox-provisioner/cgroup.subtree_control", "+memory +pids"),
        ("sandbox-provisioner/cgroup.subtree_control", "+cpu"),
    ]


def test_v2_without_weights_for_the_cpu_is_no_refusal(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    """EINVAL is what Linux says while a real-time thread is below."""
    kernel.group("/", controllers=ALL, hands_down="memory pids")
    kernel.refusals = {"cgroup.subtree_control": errno.EINVAL}
    kernel.group("/sandbox-provisioner", controllers="memory pids", hands_down="memory pids")
    create(facts, Limits())


def test_v2_leaves_out_a_waived_cap(kernel: FakeKernel) -> None:
    bases = dict.fromkeys(["memory", "pids", "freezer"], str(kernel.top))
    facts = CgroupFacts(version=2, bases=bases, missing={"cpu": "it is not delegated"})
    warnings: list[str] = []
    limits = Limits(cpu_cores=1, pids=64)
    tree = open_tree(facts, "k1", limits, lambda facility: True, warnings.append)
    tree.create(limits)
    assert len(warnings) == 1
    assert not any("cpu" in path or "cpu" in value for path, value in kernel.written)


def test_v2_gives_as_much_swap_as_was_asked_for(kernel: FakeKernel, facts: CgroupFacts) -> None:
    create(facts, Limits(memory_bytes=64 * MIB, swap_bytes=16 * MIB + 5))
    swap = [value for path, value in kernel.written if path.endswith("memory.swap.max")]
    assert swap == [str(16 * MIB)]


@pytest.mark.parametrize("base", ["/", "/hub.service"])
def test_where_linux_counts_no_swap_a_wish_for_it_is_refused_or_waived(
    proc: Proc, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """The root of v2 has no file of memory's, so that a group below it tells."""
    contents = {n: t for n, t in BY_CONTROLLER["memory"].items() if n != "memory.swap.max"}
    monkeypatch.setitem(BY_CONTROLLER, "memory", contents)
    for path in kernel.top.iterdir():
        path.unlink()
    kernel.group("/", controllers=ALL, hands_down=ALL)
    kernel.group("/hub.service", controllers=ALL, hands_down=ALL)
    if base == "/":
        (kernel.top / "cgroup.type").unlink()
    proc.mount("cgroup2", kernel.top)
    proc.groups = [f"0::{base}"]
    facts = proc.survey()
    assert dict(facts.missing) == {"swap": "this Linux has no memory.swap.max"}
    limits = Limits(memory_bytes=64 * MIB, swap_bytes=MIB)
    with pytest.raises(HostError, match=r"cap swap at 1 MiB.*swapaccount=1"):
        open_tree(facts, "k1", limits, refuse, pytest.fail)
    warnings: list[str] = []
    tree = open_tree(facts, "k1", limits, lambda facility: True, warnings.append)
    tree.create(limits)
    assert ["cap swap at 1 MiB" in text for text in warnings] == [True]
    assert not any(path.endswith("memory.swap.max") for path, _ in kernel.written)


def test_at_the_root_of_v2_a_group_below_tells_whether_linux_counts_swap(
    proc: Proc, kernel: FakeKernel
) -> None:
    for path in kernel.top.iterdir():
        if path.name.startswith("memory.") or path.name == "cgroup.type":
            path.unlink()
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/"]
    assert dict(proc.survey().missing) == {}
    kernel.group("/hub.service", controllers=ALL)
    assert dict(proc.survey().missing) == {}
    (kernel.top / "hub.service" / "memory.swap.max").unlink()
    assert [*proc.survey().missing] == ["swap"]


def test_v2_knows_its_join_file_before_it_is_made(kernel: FakeKernel, facts: CgroupFacts) -> None:
    tree = open_tree(facts, "k1", Limits(), refuse, pytest.fail)
    assert tree.join_files == (f"{kernel.top}/sandbox-provisioner/k1/cgroup.procs",)
    assert not (kernel.top / "sandbox-provisioner").exists()


def test_v1_is_joined_by_one_thread_at_a_time(tmp_path: Path) -> None:
    """Linux lets a process move itself at once so."""
    bases = {name: str(tmp_path / name) for name in ("memory", "pids")}
    tree = open_tree(
        CgroupFacts(version=1, bases=bases, missing={}), "k1", Limits(), refuse, pytest.fail
    )
    groups = [f"{tmp_path}/{name}/sandbox-provisioner/k1" for name in bases]
    assert tree.join_files == tuple(f"{group}/tasks" for group in groups)


def test_who_may_not_open_a_group_is_told_which(tmp_path: Path) -> None:
    bases = {name: str(tmp_path / name) for name in ("memory", "pids")}
    tree = open_tree(
        CgroupFacts(version=1, bases=bases, missing={}), "k1", Limits(), refuse, pytest.fail
    )
    first, second = map(Path, tree.join_files)
    first.parent.mkdir(parents=True)
    first.touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match=rf"opening {second}: ENOENT"):
        open_to_join(tree)
    assert os.listdir("/proc/self/fd") == before


def test_v2_tells_usage_in_plain_units(facts: CgroupFacts) -> None:
    limits = Limits(memory_bytes=512 * MIB)
    create(facts, limits)
    assert open_tree(facts, "k1", limits, refuse, pytest.fail).usage() == Usage(
        memory_bytes=MIB,
        memory_peak_bytes=2 * MIB,
        memory_limit_bytes=512 * MIB,
        cpu_seconds=2.5,
        processes=3,
        oom_kills=1,
        pids_limit_hits=4,
    )


@pytest.mark.parametrize(
    ("limit", "most", "counted"),
    [("64", "64", 4), ("64", "63", 0), ("max", "64", 0), ("64", "", 4)],
)
def test_who_was_refused_a_process_by_a_group_above_has_not_met_its_own_limit(
    tmp_path: Path, limit: str, most: str, counted: int
) -> None:
    (tmp_path / "pids.events").write_text("max 4\n")
    (tmp_path / "pids.max").write_text(f"{limit}\n")
    if most:  # since Linux 6.1
        (tmp_path / "pids.peak").write_text(f"{most}\n")
    assert hits_of(str(tmp_path)) == counted


def test_v2_tells_none_where_the_kernel_is_too_old(kernel: FakeKernel, facts: CgroupFacts) -> None:
    group = create(facts, Limits())
    (group / "memory.peak").unlink()
    usage = open_tree(facts, "k1", Limits(), refuse, pytest.fail).usage()
    assert (usage.memory_peak_bytes, usage.memory_limit_bytes) == (None, None)


@pytest.mark.parametrize("file", ["memory.swap.max", "memory.oom.group"])
def test_v2_does_without_files_of_other_kernels(
    kernel: FakeKernel, facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    contents = {name: text for name, text in BY_CONTROLLER["memory"].items() if name != file}
    monkeypatch.setitem(BY_CONTROLLER, "memory", contents)
    create(facts, Limits(memory_bytes=512 * MIB))
    assert not any(path.endswith(file) for path, _ in kernel.written)


@pytest.mark.parametrize(
    ("end", "number", "told"),
    [
        ("pids.max", errno.EACCES, r"cap processes at 64 .*'64' to .*pids\.max: EACCES \(Perm"),
        ("memory.max", errno.EINVAL, r"memory\.max: EINVAL .* A group above this one"),
        ("cgroup.subtree_control", errno.EBUSY, r"EBUSY .* On EBUSY, .* has processes of its own"),
        ("/k1", errno.EAGAIN, r"make a cgroup for sandbox k1: making .*/k1: EAGAIN"),
        ("/sandbox-provisioner", errno.EROFS, r"making .*/sandbox-provisioner: EROFS"),
    ],
)
def test_a_refusal_names_the_file_the_value_and_errno_and_leaves_nothing(
    kernel: FakeKernel, facts: CgroupFacts, end: str, number: int, told: str
) -> None:
    kernel.refusals = {end: number}
    with pytest.raises(HostError, match=told):
        create(facts, EVERYTHING)
    assert not (kernel.top / "sandbox-provisioner" / "k1").exists()


def test_a_value_that_does_not_stay_is_an_error(kernel: FakeKernel, facts: CgroupFacts) -> None:
    kernel.lies = {"memory.max": "max"}
    with pytest.raises(HostError, match=r"memory\.max reads 'max' after '536870912' was written"):
        create(facts, EVERYTHING)
    assert not (kernel.top / "sandbox-provisioner").exists()


def test_a_controller_that_stays_off_is_an_error(kernel: FakeKernel, facts: CgroupFacts) -> None:
    kernel.lies = {"cgroup.subtree_control": "memory"}
    with pytest.raises(HostError, match=r"enable cpu, cpuset, io, memory, pids .* reads 'memory'"):
        create(facts, EVERYTHING)


def test_cpus_that_are_not_there_are_answered_with_those_that_are(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    with pytest.raises(SpecError, match="the CPUs available here are 0-3"):
        create(facts, Limits(cpuset=frozenset({3, 4})))
    assert kernel.written == []


def test_caps_that_were_not_announced_to_open_tree_are_a_mistake(facts: CgroupFacts) -> None:
    tree = open_tree(facts, "k1", Limits(), refuse, pytest.fail)
    with pytest.raises(ValueError, match="open_tree"):
        tree.create(Limits(pids=64))


def test_create_outlives_the_removal_of_our_directory_by_another_process(
    kernel: FakeKernel, facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = [True, True]

    def mkdir_after_removal(path: str, mode: int = 0o777) -> None:
        if path.endswith("/k1") and removals:
            removals.pop()
            kernel.rmdir(os.path.dirname(path))
        kernel.mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir_after_removal)
    assert create(facts, Limits()).exists()
    assert not removals


def test_the_last_tree_takes_our_directory_along(kernel: FakeKernel, facts: CgroupFacts) -> None:
    for name in ("k1", "k2"):
        create(facts, Limits(), name)
    assert leftover_names(facts) == ["k1", "k2"]
    ended(facts, "k1")
    assert leftover_names(facts) == ["k2"]
    tree = open_tree(facts, "k2", Limits(), refuse, pytest.fail)
    asyncio.run(removed(tree))
    asyncio.run(removed(tree))
    assert not (kernel.top / "sandbox-provisioner").exists()
    assert leftover_names(facts) == []


def test_removal_by_name_kills_first_and_gives_up_in_time(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    group = create(facts, Limits())
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (group / "cgroup.procs").write_text("0\n")
    seconds, begin = 0.05, time.monotonic()
    with pytest.raises(HostError, match="pids: unknown to this pid namespace"):
        ended(facts, "k1", seconds)
    assert time.monotonic() - begin >= seconds
    assert kernel.written[-1] == ("sandbox-provisioner/k1/cgroup.kill", "1")


def test_freeze_and_thaw_write_and_freeze_waits(kernel: FakeKernel, facts: CgroupFacts) -> None:
    group = create(facts, Limits())
    (group / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    tree = open_tree(facts, "k1", Limits(), refuse, pytest.fail)
    tree.freeze()
    tree.thaw()
    name = "sandbox-provisioner/k1/cgroup.freeze"
    assert kernel.written[-2:] == [(name, "1"), (name, "0")]


def test_a_group_tells_whether_it_is_frozen(kernel: FakeKernel, facts: CgroupFacts) -> None:
    group = create(facts, Limits())
    tree = open_tree(facts, "k1", Limits(), refuse, pytest.fail)
    for number in (0, 1):
        (group / "cgroup.events").write_text(f"populated 1\nfrozen {number}\n")
        assert tree.is_frozen() == bool(number)
    assert not open_tree(facts, "other", Limits(), refuse, pytest.fail).is_frozen()
    base = kernel.top / "v1"
    freezer = base / "sandbox-provisioner/k1/freezer.state"
    freezer.parent.mkdir(parents=True)
    on_v1 = CgroupFacts(version=1, bases={"freezer": str(base)}, missing={})
    for state in ("THAWED", "FREEZING", "FROZEN"):
        freezer.write_text(f"{state}\n")
        assert open_existing(on_v1, "k1").is_frozen() == (state == "FROZEN")
    without = CgroupFacts(version=1, bases={"pids": str(base)}, missing={})
    assert not open_existing(without, "k1").is_frozen()


def test_before_cgroup_kill_each_process_gets_a_signal(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    group = create(facts, Limits())
    (group / "cgroup.kill").unlink()
    (group / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        (group / "cgroup.procs").write_text(f"{child.pid}\n0\n")
        open_tree(facts, "k1", Limits(), refuse, pytest.fail).kill()
        assert child.wait(20) == -signal.SIGKILL


def test_a_group_that_never_freezes_is_thawed_and_told(
    kernel: FakeKernel, facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(facts, Limits())
    monkeypatch.setattr("sandbox_provisioner.facilities.caps.cgroup.v2.FREEZE_SECONDS", 0.0)
    with pytest.raises(HostError, match="freeze sandbox k1: its processes were still running"):
        open_tree(facts, "k1", Limits(), refuse, pytest.fail).freeze()
    assert kernel.written[-1] == ("sandbox-provisioner/k1/cgroup.freeze", "0")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"reading .*: EISDIR"):
        files.read(str(tmp_path))


# --- whose limit it was


def write_group(version: int, group: Path, limit: int | None, full: int, below: int = 0) -> None:
    """A group whose limit was met *full* times, and those of groups below it *below* times."""
    (group / "cgroup.controllers").write_text("memory")
    (group / "memory.failcnt").write_text(str(full))
    (group / "memory.limit_in_bytes").write_text(str(limit or 1 << 63))
    (group / "memory.max").write_text(str(limit or "max"))
    (group / "memory.events").write_text(f"oom {full + below}\noom_kill {full + below}")
    (group / "memory.events.local").write_text(f"oom {full}")
    (group / "memory.oom_control").write_text(f"oom_kill {full + below}")


@pytest.mark.parametrize(("ours", "above"), [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_the_group_whose_memory_was_full_is_named(
    tmp_path: Path, version: int, ours: int, above: int
) -> None:
    """An OOM kill is counted where the processes are, whoever had no memory left. What happened
    before a start was somebody else's."""
    base = tmp_path / "course"
    own = base / files.PARENT / "one"
    own.mkdir(parents=True)
    write_group(version, base, 300 << 20, 7)
    bases = dict.fromkeys(["memory", "freezer"], str(base))
    found = CgroupFacts(version=version, bases=bases, missing={})
    tree = open_tree(found, "one", Limits(memory_bytes=256 << 20, pids=None), refuse, print)
    write_group(version, base, 300 << 20, 7 + above, below=ours)
    write_group(version, base / files.PARENT, None, 0)
    write_group(version, own, 256 << 20, ours)
    if ours:
        assert tree.full_above() == ""
    elif above:
        assert tree.full_above() == f"the group {base}, with a memory limit of 300 MiB,"
    else:
        assert tree.full_above() == "the machine's memory"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("full", "told"),
    [
        ("hub/alice", "the memory of all that alice runs here together, for which a limit of 1.5"),
        ("hub/alice/kernels", "the memory of all of alice's kernels together, for which a limit"),
        ("", "with a memory limit of 1.5 GiB"),
    ],
)
def test_the_limit_that_was_met_is_told_as_whose_it_is(
    tmp_path: Path, version: int, full: str, told: str
) -> None:
    """Of a person's groups that of the sum may be full, that of his kernels, or one of the host."""
    bases = dict.fromkeys(["memory", "freezer"], str(tmp_path))
    found = CgroupFacts(version=version, bases=bases, missing={})
    own = tmp_path / files.PARENT / "hub/alice/kernels/one"
    own.mkdir(parents=True)
    above = [*own.parents][: len(own.parts) - len(tmp_path.parts)]
    for group in (own, *above):
        write_group(version, group, 1536 << 20, 0)
    tree = open_tree(found, "hub/alice/kernels/one", Limits(memory_bytes=1 << 30), refuse, print)
    met = tmp_path / files.PARENT / full if full else tmp_path
    write_group(version, met, 1536 << 20, 1)
    assert told in tree.full_above()
    assert tree.full_above_too() == ("" if version == 2 else tree.full_above())


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_cap_of_its_own_somebody_elses_memory_was_full(
    tmp_path: Path, version: int
) -> None:
    own = tmp_path / files.PARENT / "one"
    own.mkdir(parents=True)
    write_group(version, tmp_path, 300 << 20, 0)
    bases = dict.fromkeys(["memory", "freezer"], str(tmp_path))
    found = CgroupFacts(version=version, bases=bases, missing={})
    tree = open_tree(found, "one", Limits(), refuse, print)
    write_group(version, own, None, 0)
    write_group(version, tmp_path, 300 << 20, 1)
    assert "with a memory limit of 300 MiB" in tree.full_above()


def test_where_the_top_that_we_see_is_no_root_the_full_one_may_be_out_of_sight(
    tmp_path: Path,
) -> None:
    """In a container's cgroup namespace."""
    write_group(2, tmp_path, None, 0)
    (tmp_path / "cgroup.type").write_text("domain")
    assert "cannot be seen from here" in Above(2, str(tmp_path)).full()


@pytest.mark.parametrize("version", [1, 2])
def test_where_no_group_can_be_made_the_one_that_we_are_in_is_looked_at(
    tmp_path: Path, version: int
) -> None:
    write_group(version, tmp_path, 300 << 20, 3)
    found = CgroupFacts(version=0, bases={}, missing={}, surroundings=(version, str(tmp_path)))
    tree = open_tree(found, "one", Limits(), refuse, print)
    assert tree.usage().oom_kills == 0
    write_group(version, tmp_path, 300 << 20, 4)
    assert tree.usage().oom_kills == 1
    assert tree.full_above() == f"the group {tmp_path}, with a memory limit of 300 MiB,"
    assert not tree.is_own
    assert NullTree(NOTHING, "one").usage() == Usage()


@pytest.mark.parametrize("version", [1, 2])
def test_a_smaller_cap_above_is_told(tmp_path: Path, version: int) -> None:
    inner = tmp_path / "hub"
    inner.mkdir()
    write_group(version, tmp_path, 1 << 30, 0)
    write_group(version, inner, 5 << 30, 0)
    made_here = CgroupFacts(version=version, bases={"memory": str(inner)}, missing={})
    none_made = CgroupFacts(version=0, bases={}, missing={}, surroundings=(version, str(inner)))
    for found in (made_here, none_made):
        above = narrowest_bound(found)
        assert above == Bound(group=str(tmp_path), limit_bytes=1 << 30)
        assert allows_less(1 << 30, above) == allows_less(None, above) == ""
        told = allows_less(4 << 30, above)
        assert f"mem_limit is 4 GiB, but the group {tmp_path} above allows 1 GiB" in told
    assert narrowest_bound(NOTHING) is None


@pytest.mark.parametrize(
    ("version", "files_of"),
    [
        (1, {"memory.limit_in_bytes": 1 << 30, "memory.usage_in_bytes": 600 << 20}),
        (2, {"memory.max": 1 << 30, "memory.current": 600 << 20}),
    ],
)
def test_what_is_left_below_a_bound_counts_what_can_be_forgotten(
    tmp_path: Path, version: int, files_of: dict[str, int]
) -> None:
    (tmp_path / ("memory.failcnt" if version == 1 else "cgroup.controllers")).touch()
    for name, number in files_of.items():
        (tmp_path / name).write_text(f"{number}\n")
    inactive = "total_inactive_file" if version == 1 else "inactive_file"
    (tmp_path / "memory.stat").write_text(f"cache 7\n{inactive} {100 << 20}\n")
    found = CgroupFacts(version=version, bases={"memory": str(tmp_path)}, missing={})
    assert free_bytes(found) == 524 << 20
    assert free_bytes(NOTHING) is None


def test_the_group_that_we_are_charged_to_is_the_nearest_with_the_controller(
    proc: Proc, kernel: FakeKernel
) -> None:
    kernel.group("/", controllers=ALL)
    service = kernel.group("/hub.service", controllers="memory")
    kernel.group("/hub.service/server")
    proc.mount("cgroup2", kernel.top)
    proc.groups = ["0::/hub.service/server"]
    assert proc.survey().surroundings == (2, str(service))


@pytest.mark.parametrize("options", ["", ",nsdelegate,favordynmods"])
def test_where_moves_into_groups_wait_is_told(proc: Proc, kernel: FakeKernel, options: str) -> None:
    kernel.group("/", controllers=ALL)
    proc.mount("cgroup2", kernel.top, options)
    proc.groups = ["0::/"]
    assert proc.survey().favors_moves == bool(options)


def test_on_v1_it_is_the_one_of_that_hierarchy(proc: Proc, tmp_path: Path) -> None:
    proc.mount("cgroup", tmp_path, ",memory")
    proc.groups = ["4:memory:/job_7"]
    assert proc.survey().surroundings == (1, f"{tmp_path}/job_7")


# --- people's groups, and their sums

SUM = Limits(memory_bytes=512 * MIB, pids=100)
SUMS = {"hub/ann": SUM}


def of_person(facts: CgroupFacts, name: str, sums: dict[str, Limits] = SUMS) -> CgroupTree:
    return open_tree(facts, name, Limits(), refuse, pytest.fail, "", sums)


def written_of(kernel: FakeKernel, group: str) -> list[tuple[str, str]]:
    return [(file.rpartition("/")[2], value) for file, value in kernel.written
            if file.rpartition("/")[0] == f"sandbox-provisioner/{group}"]  # fmt: skip


def test_a_sum_is_written_before_a_group_is_made_below_it(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    of_person(facts, "hub/ann/server/k1").create(Limits())
    assert written_of(kernel, "hub/ann") == [
        ("cgroup.subtree_control", "+memory +pids"),
        ("cgroup.subtree_control", "+cpu"),
        ("memory.max", str(512 * MIB)),
        ("memory.swap.max", "0"),
        ("pids.max", "100"),
    ]
    assert (kernel.top / "sandbox-provisioner/hub/ann/server/k1/memory.max").exists()


def test_a_sum_that_holds_already_is_not_written_again_and_a_new_one_is(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    of_person(facts, "hub/ann/server/k1").create(Limits())
    kernel.written.clear()
    of_person(facts, "hub/ann/kernels/k2").create(Limits())
    assert written_of(kernel, "hub/ann") == []
    of_person(facts, "hub/ann/kernels/k3", {"hub/ann": Limits(pids=50)}).create(Limits())
    assert written_of(kernel, "hub/ann") == [("pids.max", "50")]


def test_beside_a_server_a_kernel_makes_no_sum_wider(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    """Its hub may allow less than the policy that the broker reads."""
    of_person(facts, "hub/ann/server/k1").create(Limits())
    kernel.written.clear()
    wider = {"hub/ann": Limits(memory_bytes=1024 * MIB, pids=50)}
    of_person(facts, "hub/ann/kernels/k2", wider).create(Limits())
    assert written_of(kernel, "hub/ann") == [("pids.max", "50")]
    of_person(facts, "hub/ann/server/k3", wider).create(Limits())
    assert ("memory.max", str(1024 * MIB)) in written_of(kernel, "hub/ann")


def test_without_a_server_a_kernel_has_the_sum_of_its_policy(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    of_person(facts, "hub/ann/kernels/k1").create(Limits())
    wider = {"hub/ann": Limits(memory_bytes=1024 * MIB)}
    of_person(facts, "hub/ann/kernels/k2", wider).create(Limits())
    assert ("memory.max", str(1024 * MIB)) in written_of(kernel, "hub/ann")


def test_who_finds_a_persons_group_without_its_sum_writes_it(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    """Whoever made it was killed before."""
    of_person(facts, "hub/ann/server/k1", {}).create(Limits())
    of_person(facts, "hub/ann/kernels/k2").create(Limits())
    assert ("pids.max", "100") in written_of(kernel, "hub/ann")


def test_a_sum_that_linux_refuses_is_no_start(kernel: FakeKernel, facts: CgroupFacts) -> None:
    kernel.refusals = {"ann/pids.max": errno.EBUSY}
    with pytest.raises(HostError, match="cap processes at 100 for all in hub/ann together"):
        of_person(facts, "hub/ann/server/k1").create(Limits())
    assert not (kernel.top / "sandbox-provisioner/hub/ann/server").exists()


def test_a_sum_that_cannot_be_held_here_is_refused_also_where_caps_may_lack() -> None:
    facts = CgroupFacts(version=2, bases={"freezer": "/cg"}, missing={"memory": "it is off"})
    with pytest.raises(HostError, match="it is off"):
        open_tree(facts, "hub/ann/server/k1", Limits(), lambda _: True, pytest.fail, "", SUMS)
    none = CgroupFacts(version=0, bases={}, missing={})
    with pytest.raises(HostError, match="no cgroup is usable"):
        open_tree(none, "hub/ann/server/k1", Limits(), lambda _: True, pytest.fail)


def test_where_systemd_makes_the_groups_a_persons_are_refused(facts: CgroupFacts) -> None:
    with pytest.raises(HostError, match="Delegate=yes"):
        of_person(replace(facts, manager="system"), "hub/ann/server/k1")


def test_a_persons_last_group_takes_those_above_it_along(
    kernel: FakeKernel, facts: CgroupFacts
) -> None:
    names = ["hub/ann/kernels/k2", "hub/ann/server/k1", "hub/bob/server/k3", "k4"]
    for name in names:
        of_person(facts, name, {}).create(Limits())
    assert leftover_names(facts) == names
    ended(facts, "hub/ann/server/k1")
    assert leftover_names(facts) == ["hub/ann/kernels/k2", "hub/bob/server/k3", "k4"]
    ended(facts, "hub/ann/kernels/k2")
    assert not (kernel.top / "sandbox-provisioner/hub/ann").exists()
    ended(facts, "hub/bob/server/k3")
    ended(facts, "k4")
    assert not (kernel.top / "sandbox-provisioner").exists()


def test_a_start_outlives_the_removal_of_a_persons_group_by_another_process(
    kernel: FakeKernel, facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is made anew has its sum."""
    removals = [True]

    def mkdir_after_removal(path: str, mode: int = 0o777) -> None:
        if path.endswith("/server") and removals:
            removals.pop()
            kernel.rmdir(os.path.dirname(path))
            kernel.written.clear()
        kernel.mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir_after_removal)
    of_person(facts, "hub/ann/server/k1").create(Limits())
    assert not removals
    assert ("pids.max", "100") in written_of(kernel, "hub/ann")


@pytest.mark.parametrize("name", ["hub/ann", "hub/ann/server/k1/x", "hub//server/k1", "hub",
                                  "hub/../server/k1", "hub/.a/server/k1", "ann/b/c/d"])  # fmt: skip
def test_a_persons_group_has_four_plain_names(facts: CgroupFacts, name: str) -> None:
    with pytest.raises(SpecError, match="plain directory name"):
        open_tree(facts, name, Limits(), refuse, pytest.fail)


def test_a_sum_is_changed_while_it_holds(kernel: FakeKernel, facts: CgroupFacts) -> None:
    assert not write_sum(facts, "hub/ann", SUM)
    of_person(facts, "hub/ann/server/k1").create(Limits())
    assert write_sum(facts, "hub/ann", Limits(memory_bytes=64 * MIB))
    group = kernel.top / "sandbox-provisioner/hub/ann"
    assert (group / "memory.max").read_text() == f"{64 * MIB}\n"
    assert (group / "pids.max").read_text() == "100\n"


def test_values_that_depend_on_one_another_are_tried_in_the_other_order(tmp_path: Path) -> None:
    """As of memory and memory plus swap on v1, where both grow."""
    least, most = tmp_path / "least", tmp_path / "most"
    least.write_text("1")
    most.write_text("1")
    put = files.put

    def refusing(path: str, value: str) -> None:
        if path == str(least) and int(value) > int(most.read_text()):
            raise OSError(errno.EINVAL, "no")
        put(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "put", refusing)
        files.apply_again(
            files.Setting(path=str(file), value="2", attempt="a", remedy="r")
            for file in (least, most)
        )
    assert (least.read_text(), most.read_text()) == ("2", "2")
