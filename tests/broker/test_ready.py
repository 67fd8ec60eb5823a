"""Kernels that come from what the broker had ready: whose that is, what holds them, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import users
from brokers import OTHER, Broker, Refused, User
from facilities import roots_python
from test_kernels import IDENTITY, INTERRUPTED

from sandbox_provisioner import removal
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.warm.found import leads_to

pytestmark = [
    pytest.mark.timeout(300),  # on a busy machine what is made ahead waits, and is polite
    pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python"),
]

START = "kernel = Kernel(**options); answer = [kernel.nursery, kernel.manager.provisioner.pid]"
WARM = {"warm": True}
AUTO = {"warm": "auto", "spares": 1}
CAP = "print(open('/sys/fs/cgroup/memory.max').read().strip())"
HALF_MADE = {"nursery": {"warm": "auto", "preload": ["this"]}, "spare": AUTO | {"spares": 3}}
MAKE = """
import threading
def make():
    with contextlib.suppress(Exception):  # its broker is killed, or we are
        prepare(**wish)
threading.Thread(target=make).start()
"""
SPARE = {"warm": True, "spares": 1}
# Of one user the broker makes one thing after the other: this, which it refuses, comes after what
# it was making for a server that has ended. Of the refusal it keeps nothing but under this name.
LAST_IN_LINE = """
import askers
manager = askers.manager
def named(**options):
    made = manager(**options)
    made._kernel_spec.display_name = "the last in line"
    return made
askers.manager = named
os.environ["BROWSER"] = "x:y"
prepare(warm="auto", env_keep=["BROWSER"])
"""


@pytest.fixture(autouse=True)
def _roots_environment() -> None:
    if found := roots_python():
        pytest.skip(f"not root's alone: {found}")


@pytest.fixture
def guest(broker: Broker) -> Iterator[User]:
    """A user with a process of this test's own; nothing that was ready for it outlives it."""
    with User(broker.home, users.USER) as made:
        made.sit_down(broker)
        yield made
    with User(broker.home, users.USER) as last:
        last.sit_down(broker)
        with pytest.raises(Refused, match=r"imports nothing with BROWSER|nurseries already"):
            last(LAST_IN_LINE)
    assert broker.nothing_is_left()


def _of_kind(broker: Broker, kind: str, uid: int = users.USER) -> list[str]:
    """The ids of those which run, and are that user's."""
    found = []
    for path in broker.runtime.glob("*/record.json"):
        if path.parent.is_symlink() or removal.is_aside(path.parent.name):
            continue
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(path.read_text())
            if (told["kind"], told["uid"]) == (kind, uid) and told["init_pid"]:
                found.append(path.parent.name)
    return found


def test_a_kernel_of_a_nursery_is_what_a_cold_one_is(broker: Broker, guest: User) -> None:
    cold = json.loads(guest("kernel = Kernel(warm='auto'); answer = kernel(code)", code=IDENTITY))
    guest("again = Kernel(warm='auto')")  # the second one is worth a nursery
    name = broker.heard("nursery")["id"]
    nursery, _ = guest(START, options={"warm": "auto"})
    assert nursery == name
    (inside, first), cwd, cap = json.loads(guest("answer = kernel(code)", code=IDENTITY))
    assert (inside, cwd, cap) == (1000, str(broker.home / "work"), str(256 << 20))
    assert first >= 0x70000000 and first != cold[0][1]
    assert guest(INTERRUPTED) == "KeyboardInterrupt"
    guest("kernel.restart()")
    assert guest("answer = kernel.nursery") == name
    listed = "from sandbox_provisioner.broker.launcher import kernels_through\n"
    shown = guest(listed + "answer = [r.kind for r, _, _ in kernels_through(place['socket'])]")
    assert sorted(shown) == ["kernel", "kernel", "kernel", "nursery"]
    assert guest("answer = [kernel.end(), again.end()]") == ["exit", "exit"]


@pytest.mark.parametrize("options", [WARM, SPARE], ids=["nursery", "spare"])
def test_what_is_ready_for_one_user_is_nobody_elses(
    broker: Broker, guest: User, options: dict[str, Any]
) -> None:
    """Of the same kernelspec with the same options, in the same place; also where it is for all
    servers of that user."""
    everybodys = broker.home / "others"
    everybodys.mkdir(exist_ok=True)
    os.chown(everybodys, OTHER, OTHER)
    made = guest("answer = prepare(own=False, **options)", options=options)
    assert made == len(options)
    (ready,) = _of_kind(broker, "nursery")
    with User(broker.home, OTHER) as other:
        other.sit_down(broker)
        told = other(
            "kernel = Kernel(cwd, **options); answer = kernel.nursery",
            options=options, cwd=str(everybodys),
        )  # fmt: skip
        assert told == ""
        assert other("answer = kernel.end()") == "exit"
    with User(broker.home, users.USER) as same:
        same.sit_down(broker)
        nursery, _ = same(START, options=options)
        assert nursery == ready
        assert same("answer = kernel.end()") == "exit"


def test_a_kernel_that_was_ready_dies_with_its_server(broker: Broker, guest: User) -> None:
    for options in (WARM, SPARE):
        guest("prepare(own=False, **options)", options=options)
        with User(broker.home, users.USER) as server:
            server.sit_down(broker)
            nursery, pid = server(START, options=options)
            assert nursery
            init = os.pidfd_open(pid)
            (record,) = broker.records()
            told = json.loads(record.read_text())
            assert (told["kind"], told["uid"], bool(told["group"])) == (
                "kernel", users.USER, options is SPARE
            )  # fmt: skip
            server.process.send_signal(signal.SIGKILL)
            assert is_readable(init, 30)
            os.close(init)
            broker.heard("removed", record.parent.name)


def test_what_is_being_made_for_a_server_that_is_killed_ends(broker: Broker, guest: User) -> None:
    guest(MAKE, wish=HALF_MADE["nursery"])
    while not _of_kind(broker, "nursery"):
        select.poll().poll(5)
    guest.process.send_signal(signal.SIGKILL)
    assert broker.nothing_is_left(retire=False)


POLICY = """
[everyone.ceilings]
mem_limit = "{cap}M"
[everyone.sum]
mem_limit = "1G"
"""


@pytest.fixture
def policy(broker: Broker) -> Iterator[Callable[[int], None]]:
    path = broker.home / "policy.toml"

    def write(cap: int) -> None:
        path.write_text(POLICY.format(cap=cap))

    yield write
    path.unlink()


def test_the_policy_holds_what_is_ready_and_another_one_makes_it_anew(
    broker: Broker, policy: Callable[[int], None], guest: User
) -> None:
    policy(200)
    guest("prepare(**options)", options=AUTO)
    (nursery,) = _of_kind(broker, "nursery")
    group = f"hub/{users.NAME}/kernels"
    for options in (AUTO, {"warm": "auto"}):  # the spare, then the nursery
        found, _ = guest(START, options=options)
        assert found == nursery
        name = guest("answer = kernel.manager.provisioner.sandbox_id")
        told = json.loads((broker.runtime / name / "record.json").read_text())
        assert told["group"].startswith(f"{group}/")
        assert (told["memory_limit_bytes"], told["sum_bytes"]) == (200 << 20, 1 << 30)
        mine = Path(f"/proc/{told['init_pid']}/cgroup").read_text()
        assert f"{told['group']}\n" in mine
        assert guest("answer = kernel(code)", code=CAP) == str(200 << 20)
        assert guest("answer = kernel.end()") == "exit"
    told = json.loads((broker.runtime / nursery / "record.json").read_text())
    assert (told["group"], told["memory_limit_bytes"]) == (f"{group}/{nursery}", 200 << 20)
    policy(150)
    told = guest("kernel = Kernel(warm='auto'); answer = [kernel.nursery, kernel(code)]", code=CAP)
    assert told == ["", str(150 << 20)]
    assert guest("answer = kernel.end()") == "exit"


def test_nothing_is_imported_ahead_that_others_than_root_may_change(
    broker: Broker, guest: User
) -> None:
    """PID 1 of a kernel that comes from a nursery is what that has imported."""
    guest("before = dict(os.environ)")
    own = broker.home / "work" / "packages"
    guest("os.makedirs(own); open(own + '/mine.py', 'w').close()", own=str(own))
    with_own = "os.environ['PYTHONPATH'] = own + ':' + os.environ['PYTHONPATH']; "
    asked = with_own + "import tempfile; cwd = tempfile.mkdtemp(dir=place['work'])\n"
    with pytest.raises(Refused, match=f"others than root may change {own}") as refused:
        guest(asked + "prepare(cwd, own=True, warm='auto')", own=str(own))
    assert "start cold meanwhile" in str(refused.value)
    for variable in ("BROWSER", "PYTHONWARNINGS", "MPLBACKEND", "ANY"):
        with pytest.raises(Refused, match=f"the broker imports nothing with {variable} before"):
            guest("os.environ.clear(); os.environ.update(before); os.environ[name] = 'x:y'; "
                  "prepare(warm='auto', env_keep=[name])", name=variable)  # fmt: skip
    assert guest("kernel = Kernel(warm=True); answer = kernel.nursery") == ""
    assert guest("answer = kernel.end()") == "exit"


def test_the_next_broker_finds_what_is_ready_and_ends_what_was_being_made(
    own_broker: Broker, own_user: User
) -> None:
    """Whoever kills it, and whenever."""
    own_user("prepare(**options)", options=AUTO)
    nursery, _ = own_user(START, options=AUTO)
    own_broker.kill()
    assert own_user("answer = kernel('print(6 * 7)')") == "42"
    own_broker.start()
    again, _ = own_user("one = kernel; " + START, options=AUTO)
    assert again == nursery
    assert own_user("answer = one.end()") == "exit"
    for kind, wish in HALF_MADE.items():
        known = set(_of_kind(own_broker, kind))
        own_user(MAKE, wish=wish)
        while not (new := set(_of_kind(own_broker, kind)) - known):
            select.poll().poll(5)
        own_broker.kill()
        own_broker.start()
        left = {one for each in HALF_MADE for one in _of_kind(own_broker, each)}
        assert left == leads_to(own_broker.runtime), new
        assert nursery in left
    init = os.pidfd_open(own_user("answer = kernel.manager.provisioner.pid"))
    own_broker.kill()
    own_user.process.send_signal(signal.SIGKILL)  # its nursery and its kernel end without a broker
    assert is_readable(init, 30)
    os.close(init)
    own_broker.start()
    assert own_broker.nothing_is_left(retire=False)
