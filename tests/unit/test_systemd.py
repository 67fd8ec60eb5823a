"""Scopes by systemd, against plain files and a bus that answers what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from groups import ended, removed
from jeepney import DBusErrorResponse, HeaderFields, MessageType
from jeepney.low_level import Header, Message

from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import (
    CgroupFacts,
    common,
    files,
    leftover_names,
    make_common_scope,
    manager,
    open_tree,
    survey,
    systemd,
)
from sandbox_provisioner.facilities.caps.cgroup.systemd import SystemdTree
from sandbox_provisioner.facilities.caps.wish.cap import Property
from sandbox_provisioner.spec import Limits

MIB = 1 << 20
LIMITS = Limits(
    memory_bytes=64 * MIB,
    cpu_cores=1.5,
    cpu_guarantee_cores=0.25,
    cpuset=frozenset({0, 9}),
    pids=40,
    io_bytes_per_second=5 * MIB,
)

OFFERED = "cpuset cpu io memory hugetlb pids"
FILES = {
    "cgroup.procs": "", "cgroup.kill": "", "cgroup.events": "populated 0", "memory.max": "max",
    "memory.swap.max": "max", "memory.oom.group": "0", "memory.events": "oom_kill 3",
    "memory.peak": "4096", "cpu.max": "max 100000", "cpu.weight": "100", "pids.max": "max",
    "io.max": "", "cpuset.cpus": "", "cpu.stat": "usage_usec 1500000", "pids.events": "max 2",
}  # fmt: skip


@dataclass
class FakeManager:
    """A systemd whose scopes are folders; it removes one when its keeper's group is all it has."""

    slice: Path
    started: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    controllers: str = "cpu cpuset io memory pids"
    makes_it: bool = True

    def start_scope(self, which: str, unit: str, properties: list[Property]) -> None:
        self.started.append((unit, {name: value for name, (_, value) in properties}))
        if self.makes_it:
            scope = self.slice / unit
            scope.mkdir(parents=True)
            (scope / "cgroup.subtree_control").write_text("")

    def stop_unit(self, which: str, unit: str) -> None:
        self.stopped.append(unit)
        self.drop(unit)

    def drop(self, unit: str) -> None:
        for path in sorted((self.slice / unit).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (self.slice / unit).rmdir()

    def make_directory(self, path: str, *, attempt: str, remedy: str) -> str:
        os.mkdir(path)
        for name, text in FILES.items():
            Path(path, name).write_text(text)
        return path

    def remove_group(self, path: str) -> bool:
        if Path(path, "cgroup.events").exists():
            if "populated 1" in Path(path, "cgroup.events").read_text():
                return False
            for name in os.listdir(path):
                Path(path, name).unlink()
            os.rmdir(path)
        return True

    def put(self, path: str, value: str) -> None:
        if not os.path.exists(path):
            raise FileNotFoundError(2, "No such file or directory", path)
        if path.endswith("subtree_control"):
            words = {word.removeprefix("+") for word in value.split()}
            value = " ".join(sorted(words & set(self.controllers.split())))
        # As Linux tells it: with the limits on operations.
        Path(path).write_text(f"{value} riops=max wiops=max" if path.endswith("io.max") else value)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    made = FakeManager(tmp_path / "user@7.service" / "app.slice")
    made.slice.mkdir(parents=True)
    (made.slice.parent / "cpuset.cpus.effective").write_text("0-11\n")
    monkeypatch.setattr(manager, "start_scope", made.start_scope)
    monkeypatch.setattr(manager, "stop_unit", made.stop_unit)
    monkeypatch.setattr(files, "make_directory", made.make_directory)
    monkeypatch.setattr(files, "remove_group", made.remove_group)
    monkeypatch.setattr(files, "put", made.put)
    return made


@pytest.fixture
def facts(fake: FakeManager) -> CgroupFacts:
    bases = dict.fromkeys([*fake.controllers.split(), "freezer"], str(fake.slice))
    return CgroupFacts(version=2, bases=bases, missing={}, manager="user")


Make = Callable[[Limits], SystemdTree]


@pytest.fixture
def make(facts: CgroupFacts, fake: FakeManager) -> Iterator[Make]:
    made: list[SystemdTree] = []

    def create(limits: Limits, pid: int = 0) -> SystemdTree:
        tree = open_tree(facts, "k1", limits, lambda facility: False, pytest.fail, "254:0")
        assert isinstance(tree, SystemdTree)
        made.append(tree)
        tree.create(limits, pid)
        return tree

    yield create
    for tree in made:
        if tree._keeper:
            tree._end_keeper()


# --- the tree


def test_a_scope_has_as_much_swap_as_was_asked_for(fake: FakeManager, make: Make) -> None:
    make(Limits(memory_bytes=64 * MIB, swap_bytes=16 * MIB))
    (_, properties), *_ = fake.started
    assert properties["MemorySwapMax"] == 16 * MIB
    group = fake.slice / "sandbox-k1.scope/k1"
    assert (group / "memory.swap.max").read_text() == str(16 * MIB)


def test_every_cap_is_a_property_of_the_scope_with_room_for_the_keeper(
    make: Make, fake: FakeManager
) -> None:
    tree = make(LIMITS)
    assert tree._keeper is not None
    ((unit, properties),) = fake.started
    assert unit == "sandbox-k1.scope"
    assert properties == {
        "Description": "Sandbox k1 of a Jupyter kernel",
        "CollectMode": "inactive-or-failed",
        "Delegate": True,
        "PIDs": [tree._keeper.pid],
        "MemoryMax": 68 * MIB,
        "MemorySwapMax": 0,
        "CPUQuotaPerSecUSec": 1_500_000,
        "CPUWeight": 25,
        "TasksMax": 41,
        "AllowedCPUs": b"\x01\x02",
        "IOReadBandwidthMax": [("/dev/block/254:0", 5 * MIB)],
        "IOWriteBandwidthMax": [("/dev/block/254:0", 5 * MIB)],
    }


def test_the_caps_that_count_are_on_a_group_below_and_read_back(
    make: Make, fake: FakeManager
) -> None:
    make(LIMITS)
    scope = fake.slice / "sandbox-k1.scope"
    assert (scope / "cgroup.subtree_control").read_text() == "cpu cpuset io memory pids"
    found = {name: (scope / "k1" / name).read_text() for name in FILES}
    assert found["memory.max"] == str(64 * MIB)
    assert found["memory.swap.max"] == "0"
    assert found["memory.oom.group"] == "1"
    assert found["cpu.max"] == "150000 100000"
    assert found["pids.max"] == "40"
    assert found["cpuset.cpus"] == "0,9"
    assert found["io.max"].startswith(f"254:0 rbps={5 * MIB} wbps={5 * MIB}")


def test_the_launcher_and_the_keeper_are_moved_below_before_controllers_are_handed_down(
    facts: CgroupFacts, fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def put(path: str, value: str) -> None:
        written.append(f"{os.path.relpath(path, fake.slice)} {value}")
        fake.put(path, value)

    monkeypatch.setattr(files, "put", put)
    tree = open_tree(facts, "k1", Limits(), lambda facility: False, pytest.fail)
    assert isinstance(tree, SystemdTree)
    tree.create(Limits(), os.getpid())
    assert tree._keeper is not None
    keeper = tree._keeper.pid
    tree._end_keeper()
    scope = "sandbox-k1.scope"
    assert fake.started[0][1]["PIDs"] == [keeper, os.getpid()]
    assert written == [
        f"{scope}/keeper/cgroup.procs {keeper}",
        f"{scope}/k1/cgroup.procs {os.getpid()}",
        f"{scope}/cgroup.subtree_control +memory +pids",
    ]


def test_the_launcher_joins_by_itself_too(make: Make, fake: FakeManager) -> None:
    assert make(Limits()).join_files == (str(fake.slice / "sandbox-k1.scope/k1/cgroup.procs"),)


def test_usage_is_that_of_the_group_below(make: Make) -> None:
    usage = make(LIMITS).usage()
    assert (usage.oom_kills, usage.memory_peak_bytes, usage.cpu_seconds) == (3, 4096, 1.5)
    assert (usage.memory_limit_bytes, usage.pids_limit_hits) == (64 * MIB, 2)


def test_the_keeper_holds_the_scope_until_the_tree_is_removed(
    make: Make, fake: FakeManager
) -> None:
    tree = make(Limits())
    keeper = tree._keeper
    assert keeper is not None
    assert keeper.poll() is None
    with pytest.raises(HostError, match="processes are still in"):
        asyncio.run(removed(tree, 0.05))
    assert keeper.returncode == 0
    fake.drop("sandbox-k1.scope")
    asyncio.run(removed(tree))


def test_a_scope_that_lingers_is_stopped(
    make: Make, fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_LINGER_SECONDS", 0.05)
    asyncio.run(removed(make(Limits())))
    assert fake.stopped == ["sandbox-k1.scope"]


def test_a_controller_that_the_manager_does_not_hand_down_is_an_error_and_ends_the_keeper(
    facts: CgroupFacts, fake: FakeManager
) -> None:
    fake.controllers = "memory pids"
    tree = open_tree(facts, "k1", LIMITS, lambda facility: False, pytest.fail, "254:0")
    assert isinstance(tree, SystemdTree)
    with pytest.raises(HostError, match=r"enable cpu, cpuset, io, .* reads 'memory pids'"):
        tree.create(LIMITS)
    assert tree._keeper is not None
    assert tree._keeper.returncode == 0


def test_a_keeper_that_cannot_start_is_an_error_that_says_so(
    facts: CgroupFacts, fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> subprocess.Popen[bytes]:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(systemd, "_spawn_keeper", refuse)
    tree = open_tree(facts, "k1", Limits(), lambda facility: False, pytest.fail)
    with pytest.raises(HostError, match="starting its keeper: EAGAIN"):
        tree.create(Limits())
    assert fake.started == []


def test_a_scope_that_is_not_where_we_look_is_an_error(
    facts: CgroupFacts, fake: FakeManager
) -> None:
    fake.makes_it = False
    tree = open_tree(facts, "k1", Limits(), lambda facility: False, pytest.fail)
    with pytest.raises((HostError, FileNotFoundError)):
        tree.create(Limits())


def test_cpus_that_the_manager_has_not_are_refused_before_anything_starts(
    facts: CgroupFacts, fake: FakeManager
) -> None:
    limits = Limits(cpuset=frozenset({12}))
    tree = open_tree(facts, "k1", limits, lambda facility: False, pytest.fail)
    with pytest.raises(SpecError, match="the CPUs available here are 0-11"):
        tree.create(limits)
    assert fake.started == []


def test_leftovers_are_found_by_the_names_of_scopes_and_their_keepers_ended(
    facts: CgroupFacts, fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_LINGER_SECONDS", 0.0)
    for name in ("sandbox-left.scope", "sandbox.scope", "app-browser.scope"):
        (fake.slice / name).mkdir()
    assert leftover_names(facts) == ["left"]
    fake.make_directory(str(fake.slice / "sandbox-left.scope/keeper"), attempt="", remedy="")
    with subprocess.Popen(["/bin/sleep", "60"]) as keeper:
        procs = fake.slice / "sandbox-left.scope/keeper/cgroup.procs"
        procs.write_text(f"{keeper.pid}\n")
        ended(facts, "left")
        assert keeper.wait(20) == -signal.SIGKILL
    assert leftover_names(facts) == []
    ended(facts, "left")


# --- the bus


def message(kind: MessageType, body: Any, **fields: Any) -> Message:
    named = {HeaderFields[name]: value for name, value in fields.items()}
    return Message(Header(0, kind, 0, 1, 0, 1, named), body)


@dataclass
class FakeBus:
    """A connection: calls are noted, *reply* and then the *signals* are what comes back."""

    reply: Message
    signals: list[tuple[int, str, str, str]] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def filter(self, rule: Any, bufsize: int) -> Iterator[list[Any]]:
        yield []

    def send(self, call: Message) -> None:
        self.calls.append((call.header.fields[HeaderFields.member], call.body))

    def send_and_get_reply(self, call: Message, timeout: float) -> Message:
        self.send(call)
        return self.reply

    def recv_until_filtered(self, queue: Any, timeout: float) -> Message:
        if not self.signals:
            raise TimeoutError
        return message(MessageType.signal, self.signals.pop(0))

    def __enter__(self) -> FakeBus:
        return self

    def __exit__(self, *_: object) -> None:
        pass


JOB = "/org/freedesktop/systemd1/job/7"


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> FakeBus:
    made = FakeBus(message(MessageType.method_return, (JOB,)))
    monkeypatch.setattr(manager, "open_dbus_connection", lambda *_, **__: made)
    return made


def refusal(name: str) -> Message:
    return message(MessageType.error, ("it says why",), error_name=name)


def test_a_scope_has_started_when_its_own_job_is_done(bus: FakeBus) -> None:
    bus.signals = [(6, "/other", "b.scope", "failed"), (7, JOB, "a.scope", "done")]
    manager.start_scope("user", "a.scope", [("PIDs", ("au", [1]))])
    assert [name for name, _ in bus.calls] == ["AddMatch", "Subscribe", "StartTransientUnit"]
    assert bus.calls[-1][1] == ("a.scope", "fail", [("PIDs", ("au", [1]))], [])
    assert bus.signals == []


def test_a_job_that_fails_is_an_error(bus: FakeBus) -> None:
    bus.signals = [(7, JOB, "a.scope", "failed")]
    with pytest.raises(HostError, match=r"a\.scope .*'failed'.*journalctl --user --unit a\.scope"):
        manager.start_scope("user", "a.scope", [])


def test_a_manager_that_refuses_is_quoted(bus: FakeBus) -> None:
    bus.reply = refusal("org.freedesktop.systemd1.UnitExists")
    with pytest.raises(HostError, match=r"UnitExists: it says why"):
        manager.start_scope("system", "a.scope", [])


def test_a_manager_that_is_silent_is_not_waited_for_forever(bus: FakeBus) -> None:
    with pytest.raises(HostError, match="no answer within 20 seconds"):
        manager.start_scope("system", "a.scope", [])


def test_a_bus_that_is_not_there_is_told_with_the_way_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(manager, "bus_path", lambda which: str(tmp_path / "bus"))
    with pytest.raises(HostError, match="No such file") as caught:
        manager.start_scope("user", "a.scope", [])
    assert "dbus-user-session" in caught.value.remedy


def test_stopping_a_unit_that_is_gone_is_fine(bus: FakeBus) -> None:
    bus.reply = refusal("org.freedesktop.systemd1.NoSuchUnit")
    manager.stop_unit("user", "a.scope")
    bus.reply = refusal("org.freedesktop.DBus.Error.AccessDenied")
    with pytest.raises(HostError, match="AccessDenied") as caught:
        manager.stop_unit("user", "a.scope")
    assert isinstance(caught.value.__cause__, DBusErrorResponse)


# --- the survey


@dataclass
class Machine:
    """A v2 hierarchy, a process in a login session, and the sockets of systemd."""

    top: Path

    def group(self, path: str, controllers: str = OFFERED) -> Path:
        group = self.top / "cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.procs", "cgroup.type", "cgroup.subtree_control"):
            (group / name).write_text("")
        (group / "cgroup.controllers").write_text(controllers)
        return group

    def survey(self, own: str) -> CgroupFacts:
        process = self.top / "proc/self"
        process.mkdir(parents=True, exist_ok=True)
        point = self.top / "cgroup"
        mount = f"31 23 0:28 / {point} rw shared:9 - cgroup2 cgroup2 rw"
        (process / "mountinfo").write_text(mount)
        (process / "cgroup").write_text(f"0::/{own}\n")
        return survey(proc=str(self.top / "proc"), run=str(self.top / "run"))


SESSION = "user.slice/user-7.slice/session-1.scope"
MANAGER = "user.slice/user-7.slice/user@7.service"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of uid 7, who may write to the groups of their manager."""
    made = Machine(tmp_path)
    made.group("")
    made.group(SESSION)
    made.group(MANAGER, "cpu memory pids")
    for path in ("systemd/system", "user/7", "dbus"):
        (tmp_path / "run" / path).mkdir(parents=True)
    (tmp_path / "run/user/7/bus").touch()
    (tmp_path / "run/dbus/system_bus_socket").touch()
    access = os.access

    def of_uid_7(path: str, mode: int) -> bool:
        may = MANAGER in str(path) or str(tmp_path / "run") in str(path)
        return access(path, mode) and (may or not mode & os.W_OK)

    monkeypatch.setattr(os, "geteuid", lambda: 7)
    monkeypatch.setattr(os, "access", of_uid_7)
    return made


def test_a_login_session_asks_its_users_manager(machine: Machine) -> None:
    facts = machine.survey(SESSION)
    assert (facts.version, facts.manager) == (2, "user")
    assert set(facts.bases) == {"cpu", "memory", "pids", "freezer"}
    assert set(facts.bases.values()) == {f"{machine.top}/cgroup/{MANAGER}/app.slice"}
    assert set(facts.missing) == {"cpuset", "io"}


def test_a_controller_that_is_not_delegated_comes_with_the_drop_in(machine: Machine) -> None:
    machine.group(MANAGER, "memory pids")
    facts = machine.survey(SESSION)
    assert set(facts.missing) == {"cpu", "cpuset", "io"}
    remedy = " ".join(facts.remedy("cpu"))
    assert "/etc/systemd/system/user@.service.d/delegate.conf" in remedy
    assert "Delegate=cpu cpuset io memory pids" in remedy


def test_a_controller_that_linux_has_not_cannot_be_delegated(machine: Machine) -> None:
    machine.group("", "cpuset memory pids")
    machine.group(MANAGER, "memory pids")
    assert "cgroup_disable=" in " ".join(machine.survey(SESSION).remedy("cpu"))


def test_a_user_without_a_manager_is_told_how_to_get_one(machine: Machine) -> None:
    (machine.top / "run/user/7/bus").unlink()
    facts = machine.survey(SESSION)
    assert (facts.version, facts.manager) == (0, "")
    assert "systemd's user manager does not answer on" in facts.missing["memory"]
    assert "dbus-user-session" in " ".join(facts.remedy("memory"))


def test_the_managers_own_groups_are_not_ours_to_write_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = machine.group(f"{MANAGER}/app.slice/lab.scope", "")
    (own / "cgroup.procs").write_text("1\n")
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if path.endswith("e") else b"0")
    assert machine.survey(f"{MANAGER}/app.slice/lab.scope").manager == "user"


def test_what_was_delegated_to_us_is_used_directly(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = machine.group(f"{MANAGER}/app.slice/hub.service", "cpu memory pids")
    (machine.group(f"{MANAGER}/app.slice/hub.service/server", "") / "cgroup.procs").write_text("1")

    def getxattr(path: str, name: str) -> bytes:
        return b"1" if path == str(service) else b"0"

    monkeypatch.setattr(os, "getxattr", getxattr)
    facts = machine.survey(f"{MANAGER}/app.slice/hub.service/server")
    assert (facts.manager, facts.bases["memory"]) == ("", str(service))


def test_a_group_of_no_unit_in_a_scope_shows_that_it_was_delegated(machine: Machine) -> None:
    scope = machine.group(f"{MANAGER}/app.slice/lab.scope", "cpu memory pids")
    (machine.group(f"{MANAGER}/app.slice/lab.scope/lab", "") / "cgroup.procs").write_text("1")
    facts = machine.survey(f"{MANAGER}/app.slice/lab.scope/lab")
    assert (facts.manager, facts.bases["memory"]) == ("", str(scope))


def test_root_asks_the_manager_of_the_machine(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.exists(path))
    (machine.top / "cgroup/cgroup.type").unlink()
    facts = machine.survey("user.slice/user-0.slice/session-1.scope")
    assert (facts.manager, dict(facts.missing)) == ("system", {})
    assert facts.bases["cpuset"] == f"{machine.top}/cgroup/system.slice"


COMMON = "system.slice/jupyter-sandboxes.scope"


def test_root_makes_groups_in_the_scope_for_all_where_there_is_one_and_nobody_else_does(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if path.endswith(COMMON) else b"0")
    scope = machine.group(COMMON, OFFERED)
    (scope / "memory.swap.max").touch()
    assert machine.survey(SESSION).manager == "user"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.exists(path))
    (machine.top / "cgroup/cgroup.type").unlink()
    facts = machine.survey("system.slice/hub.service")
    assert (facts.manager, facts.bases["memory"], dict(facts.missing)) == ("", str(scope), {})
    # What is not delegated is systemd's, whatever it is called.
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"0")
    assert machine.survey("system.slice/hub.service").manager == "system"


# --- the scope for all


@pytest.fixture
def by_system(facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "survey", lambda: replace(facts, manager="system"))


@pytest.mark.usefixtures("by_system")
def test_the_scope_for_all_is_kept_by_a_process_below_it(fake: FakeManager) -> None:
    make_common_scope()
    ((unit, properties),) = fake.started
    (keeper,) = properties["PIDs"]
    try:
        assert (unit, properties["Delegate"]) == ("jupyter-sandboxes.scope", True)
        assert "MemoryMax" not in properties
        assert (fake.slice / unit / "keeper/cgroup.procs").read_text() == str(keeper)
        status = Path(f"/proc/{keeper}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" not in status
        assert os.getsid(keeper) != os.getsid(0)
    finally:
        os.kill(keeper, signal.SIGKILL)


@pytest.mark.usefixtures("by_system")
def test_a_scope_for_all_that_cannot_be_had_is_an_error_and_leaves_no_process(
    fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(which: str, unit: str, properties: list[Property]) -> None:
        fake.start_scope(which, unit, properties)
        raise HostError(attempt="start it", answer="it is there", remedy="None.")

    monkeypatch.setattr(manager, "start_scope", refuse)
    with pytest.raises(HostError, match="it is there"):
        make_common_scope()
    ((_, properties),) = fake.started
    pidfd = -1
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(properties["PIDs"][0])
    if pidfd >= 0:
        assert is_readable(pidfd, 20)
        os.close(pidfd)


@pytest.mark.usefixtures("by_system")
def test_a_keeper_that_has_died_is_told_even_where_its_scope_is_still_seen(
    fake: FakeManager, facts: CgroupFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, text: str, **told: str) -> None:
        monkeypatch.setattr(common, "survey", lambda: replace(facts, manager=""))
        raise HostError(attempt="move it", answer="No such process", remedy="None.")

    def gone(pid: int, number: int) -> None:
        kill(pid, number)
        raise ProcessLookupError

    kill = os.kill
    monkeypatch.setattr(common.files, "write", fail)
    monkeypatch.setattr(common.os, "kill", gone)
    with pytest.raises(HostError, match="No such process"):
        make_common_scope()


def test_whoever_has_groups_makes_no_scope_for_all(
    facts: CgroupFacts, fake: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for manager_of in ("", "user"):
        found = replace(facts, manager=manager_of)
        monkeypatch.setattr(common, "survey", lambda found=found: found)
        make_common_scope()
    assert fake.started == []
