"""How much a work directory may hold, through the broker: root sets what its user asks for, or what
a policy says, and it stays when the kernel has ended."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import disks
import pytest
import users
from brokers import Broker, User
from limited import MIB, held, project_of

from sandbox_provisioner.app.quota import QuotaApp

pytestmark = pytest.mark.requires(
    "userns", "root", "cgroup-memory", "setpriv", "public-python", "project-quotas"
)

# What Linux answers to who writes more than a project may have.
FULL = {"xfs": "ENOSPC", "ext4": "EDQUOT"}
SIZE = 8 * MIB
FILL = """
import errno
file = open("file", "wb", buffering=0)
try:
    while True:
        file.write(bytes(1 << 16))
except OSError as error:
    print(errno.errorcode[error.errno])
"""
START = "kernel = Kernel(cwd=work, **options)"
# A start by hand, of a kernel that need not be Python's, which is over when this is.
ASK = """
message = wish(cwd=work)
message["start"]["spec"]["workdir"] = work
message["start"]["spec"]["limits"]["workdir_bytes"] = size
answer = send(message, [*streams(), directory(work)])
send(dict(ask="close", sandbox_id=message["start"]["sandbox_id"]), [])
"""


@pytest.fixture(scope="module", autouse=True)
def places() -> Iterator[dict[str, Path]]:
    """Where file systems with quotas are, by their kinds, before the broker has its mounts."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(disks.disk_with_quotas(kind)) for kind in disks.KINDS}


@pytest.fixture(params=disks.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def work(kind: str, places: dict[str, Path]) -> Iterator[Path]:
    """A directory of the user's."""
    folder = places[kind] / "work"
    folder.mkdir()
    os.chown(folder, users.USER, users.USER)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def policy(broker: Broker) -> Iterator[Path]:
    """Where the broker looks for one."""
    path = broker.home / "policy.toml"
    yield path
    path.unlink()


def fill(user: User, kind: str, work: Path) -> None:
    """Its kernel writes until there is no more room, is told why, and goes on."""
    told = user("answer = kernel.told_until('is full', code)", code=FILL)
    assert FULL[kind] in told.splitlines(), told
    assert f"{work} is full; it holds {SIZE // MIB} MiB" in told
    assert "raise workdir_limit" in told
    # A sentence may stand before what the cell answers.
    assert user("answer = kernel('print(6 * 7)')").splitlines()[-1] == "42"
    assert user("answer = kernel.end()") == "exit"


def asked(user: User, work: Path, size: int | None) -> str:
    """What the broker tells of a start with a limit of *size*."""
    told = user(ASK, work=str(work), size=size)
    return str(told.get("error") or told["warnings"])


def size_of(work: Path) -> int:
    found = held(work)
    return found.size_bytes if found else 0


def test_what_a_work_directory_may_hold_is_what_its_user_has_asked_for_and_stays(
    broker: Broker, user: User, kind: str, work: Path
) -> None:
    user(START, work=str(work), options={"workdir_limit": "8M"})
    fill(user, kind, work)
    found = held(work)
    assert found
    assert (found.size_bytes, found.is_own) == (SIZE, True)
    assert SIZE * 0.9 < found.used_bytes <= SIZE
    assert project_of(work / "file") == found.project
    # One without a limit leaves it, one with another sets that; and what is full lets a kernel run.
    assert asked(user, work, None) == "[]"
    assert held(work) == found
    assert asked(user, work, 2 * SIZE) == "[]"
    assert size_of(work) == 2 * SIZE
    assert project_of(work) == found.project
    QuotaApp.launch_instance([str(work), "--clear"])
    QuotaApp.clear_instance()
    assert project_of(work) == project_of(work / "file") == 0


@pytest.mark.parametrize("kind", ["ext4"])
def test_a_policy_says_how_much_a_work_directory_may_hold(
    broker: Broker, user: User, policy: Path, kind: str, work: Path
) -> None:
    policy.write_text('[everyone.forced]\nworkdir_limit = "8M"\n')
    user(START, work=str(work), options={})
    fill(user, kind, work)
    assert size_of(work) == SIZE
    policy.write_text('[everyone.ceilings]\nworkdir_limit = "9M"\n')
    for size, said in ((10 * MIB, "10 MiB"), (None, "without a limit")):
        told = asked(user, work, size)
        assert f"workdir_limit is 9 MiB in place of {said}, by the policy" in told
        assert size_of(work) == 9 * MIB
    assert asked(user, work, SIZE) == "[]"
    assert size_of(work) == SIZE
    policy.write_text('[everyone]\non_excess = "refuse"\n' + policy.read_text())
    told = asked(user, work, 10 * MIB)
    assert "workdir_limit" in told
    assert "line 4" in told
    assert size_of(work) == SIZE
