"""How much a home may hold, by the spawner's option: real servers' boxes, without a hub."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import disks
import pytest
from limited import MIB, held, project_of

from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.hub.persons import as_person
from sandbox_provisioner.hub.servers import Judge, Servers, as_root
from sandbox_provisioner.policy.hub import HubTerms
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.read import parse_policy
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.spec import Limits, NetworkWish

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "project-quotas")

UID, ACCOUNT = 4326, 4330
SIZE = 8 * MIB
# A program, which is in the box of a server as that one is. It goes on where there is no room.
FILL = "dd if=/dev/zero of=file bs=65536; echo went on; cat"
FULL = {"xfs": "No space left on device", "ext4": "Disk quota exceeded"}


@pytest.fixture
def home(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ann's, whom this process alone knows; pytest has looked for its own user before."""
    with disks.disk_with_quotas(kind) as disk:
        folder = disk / "ann"
        folder.mkdir(mode=0o700)
        os.chown(folder, UID, UID)
        ann = pwd.struct_passwd(("ann", "x", UID, UID, "", str(folder), "/bin/sh"))
        monkeypatch.setattr(pwd, "getpwnam", {"ann": ann}.__getitem__)
        monkeypatch.setattr(pwd, "getpwuid", {UID: ann}.__getitem__)
        monkeypatch.setattr(grp, "getgrall", list)
        monkeypatch.setattr(os, "getgrouplist", lambda _, gid: [gid])
        yield folder


@pytest.fixture
def runtime(runtime_dir: Path) -> Iterator[Path]:
    """Where boxes have their records, and beside it their doors."""
    yield runtime_dir
    for name in ("hub", "ways"):
        shutil.rmtree(f"{runtime_dir}-{name}", ignore_errors=True)


def terms_of(policy: str, person: Person) -> Terms | None:
    return parse_policy(policy.encode(), "p.toml").for_person(person) if policy else None


def served(home: Path, size: int, servers: Servers, told: int) -> Any:
    """What ann's server finds which may hold *size*, and what its kernels are given; it ends."""
    wish = ServerWish(
        person="ann", user="ann", argv=("sh", "-c", FILL), port=8888, api_port=8081,
        environment={"PATH": os.defpath}, sum=Limits(), box=Limits(workdir_bytes=size),
        network=NetworkWish(),
    )  # fmt: skip

    async def serve() -> Any:
        server = await servers.start(wish, Stdio(subprocess.DEVNULL, told, told))
        try:
            await server.handle.wait()
            return json.loads(server.doors.desk_file.read_text())["workdir_bytes"]
        finally:
            await server.close()

    return asyncio.run(serve())


@pytest.mark.parametrize(
    ("kind", "judge", "account", "given"),
    [
        ("xfs", as_root, 0, 2 * SIZE),
        ("ext4", partial(as_person, HubTerms(account="jupyterhub")), ACCOUNT, SIZE),
    ],
    ids=["hub-of-root", "broker"],
)
def test_a_home_holds_what_the_spawner_says_and_for_others_than_root_the_policy_at_the_most(
    kind: str, home: Path, runtime: Path, tmp_path: Path, judge: Judge, account: int, given: int
) -> None:
    policy = '[everyone.ceilings]\nworkdir_limit = "8M"\n'
    warned: list[str] = []
    servers = Servers(
        judge=judge, terms_for=partial(terms_of, policy), warn=warned.append, log=print,
        runtime_dir=str(runtime), state_dir=str(tmp_path), account=account,
    )  # fmt: skip
    out = tmp_path / "out"
    with out.open("wb") as told:
        assert served(home, 2 * SIZE, servers, told.fileno()) == given
    assert FULL[kind] in out.read_text()
    assert "went on" in out.read_text()
    assert given * 0.9 < (home / "file").stat().st_size <= given
    assert any("workdir_limit is 8 MiB" in text for text in warned) is bool(account)
    found = held(home)
    assert found
    assert (found.size_bytes, found.is_own) == (given, True)
    assert project_of(home / "file") == found.project
    assert (home / "file").stat().st_uid == UID
