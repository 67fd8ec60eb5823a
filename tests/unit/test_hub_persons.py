"""What a hub that is not root may have started, for whom, and with whose rights; nothing starts."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_provisioner import audit, launch
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.ids.facts import FIRST_ID
from sandbox_provisioner.hub import for_hub, persons
from sandbox_provisioner.hub.for_hub import ServersOfHub
from sandbox_provisioner.hub.persons import as_person, check_person, terms_of_hub
from sandbox_provisioner.hub.servers import Rights, Servers, account
from sandbox_provisioner.places import Place
from sandbox_provisioner.policy.current import PolicyKeeper
from sandbox_provisioner.policy.hub import HubTerms
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.policy import Policy
from sandbox_provisioner.policy.read import parse_policy
from sandbox_provisioner.policy.terms import NotAllowed, OnExcess
from sandbox_provisioner.spec import Limits, NetworkWish, SandboxSpec, Volume

ACCOUNT, ANN = 4330, 61240
UIDS = {"jupyterhub": ACCOUNT, "ann": ANN, "daemon": 7, "root": 0, "boxed": FIRST_ID + 5}

ANYBODYS = HubTerms(account="jupyterhub")


@pytest.fixture(autouse=True)
def people(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = {
        name: pwd.struct_passwd((name, "x", uid, uid, "", str(tmp_path / name), "/bin/sh"))
        for name, uid in UIDS.items()
    }
    by_uid = {entry.pw_uid: entry for entry in entries.values()}
    monkeypatch.setattr(pwd, "getpwnam", entries.__getitem__)
    monkeypatch.setattr(pwd, "getpwuid", by_uid.__getitem__)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid])
    (tmp_path / "login.defs").write_text("# UID_MIN 5\nUID_MIN\t\t 1000\n")
    monkeypatch.setattr(persons, "_LOGIN_DEFS", tmp_path / "login.defs")


def peer(uid: int) -> Peer:
    return Peer.of(uid, uid)


def test_the_account_that_the_policy_names_is_the_hubs_and_no_other() -> None:
    policy = Policy(file="p.toml", ask="Bea (bea@example.org)", hub=HubTerms(account="jupyterhub"))
    assert terms_of_hub(policy, "p.toml", peer(ACCOUNT)).account == "jupyterhub"
    with pytest.raises(HostError, match=r"runs as jupyterhub. Ask Bea.*account = \"ann\""):
        terms_of_hub(policy, "p.toml", peer(ANN))
    for none in (Policy(file="p.toml"), None):
        with pytest.raises(HostError, match="names no hub"):
            terms_of_hub(none, "p.toml", peer(ACCOUNT))
    gone = Policy(file="p.toml", hub=HubTerms(account="nobody-has-this-name"))
    with pytest.raises(HostError):
        terms_of_hub(gone, "p.toml", peer(ACCOUNT))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("root", "account of the system"),
        ("daemon", "uid is 7, and people's begin at 1000"),
        ("jupyterhub", "account of the hub itself"),
        ("boxed", "one of those for sandboxes"),
    ],
)
def test_who_is_no_person_has_no_server(name: str, answer: str) -> None:
    check_person("ann", ACCOUNT, ANYBODYS)
    with pytest.raises(HostError, match=answer):
        check_person(name, ACCOUNT, ANYBODYS)


def test_a_server_has_no_devices_and_no_disk_beyond_the_policy() -> None:
    """For a hub of root's, whose configuration is root's too, they are as they were asked for."""
    told: list[str] = []
    text = (
        b'[everyone.ceilings]\ndevices = ["/dev/nvidia*"]\ndisk_limit = "1G"\n'
        b'workdir_limit = "5G"\n'
    )
    terms = parse_policy(text, "p.toml").for_person(Person("ann", ANN))
    spec = SandboxSpec(
        workdir="/home/ann",
        devices=("/dev/kvm", "/dev/nvidia0", "nvidia.com/gpu=all"),
        limits=Limits(disk_bytes=1 << 40, workdir_bytes=1 << 40),
        volumes=(Volume(source="/srv/a", target="/a"),),
    )
    for uid in (ACCOUNT, 0):
        servers = Servers(
            judge=None, terms_for=lambda _: terms, warn=told.append, log=print, account=uid
        )
        found = servers._within(terms, spec)
        limits = Limits(disk_bytes=1 << 30, workdir_bytes=5 << 30)
        narrower = replace(spec, devices=("/dev/nvidia0",), limits=limits)
        assert found == (narrower if uid else spec)
        nothing = SandboxSpec(workdir="/home/ann", volumes=spec.volumes)
        assert servers._within(terms, nothing) == nothing
    assert sorted(text.partition(" ")[0] for text in told) == [
        "devices",
        "disk_limit",
        "workdir_limit",
    ]
    with pytest.raises(NotAllowed, match="disk_limit"):
        strict = replace(terms, on_excess=OnExcess.REFUSE)
        Servers(judge=None, terms_for=lambda _: strict, warn=print, log=print, account=5)._within(
            strict, spec
        )


def test_who_is_in_none_of_the_hubs_groups_has_no_server() -> None:
    theirs, others = (replace(ANYBODYS, groups=("staff", group)) for group in (str(ANN), "x"))
    assert check_person("ann", ACCOUNT, theirs) == "ann"
    with pytest.raises(HostError, match="for the groups staff, x, by the policy"):
        check_person("ann", ACCOUNT, others)
    for system in ("root", "daemon"):  # whose group the policy names all the same
        with pytest.raises(HostError, match="account of the system"):
            check_person(system, ACCOUNT, replace(ANYBODYS, groups=("0", "7", "root", "daemon")))


def test_one_person_is_one_whatever_directory_servers_call_him(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ann = pwd.getpwnam("ann")
    monkeypatch.setattr(pwd, "getpwnam", {"ann": ann, "Ann@corp": ann}.__getitem__)
    assert {check_person(name, ACCOUNT, ANYBODYS) for name in ("ann", "Ann@corp")} == {"ann"}
    assert check_person("nobody-has-this-name", ACCOUNT, ANYBODYS) == "nobody-has-this-name"


def test_who_is_not_the_hub_writes_nobody_elses_name_into_the_audit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    monkeypatch.setattr(audit, "refused", lambda _, *, person, **more: told.append(person))
    policy = tmp_path / "policy.toml"
    hub = HubTerms(account="jupyterhub")
    monkeypatch.setattr(PolicyKeeper, "policy", lambda _: Policy(file=str(policy), hub=hub))
    servers = ServersOfHub(str(tmp_path), str(policy), print)
    for asker in (ANN, ACCOUNT):
        with pytest.raises(HostError):
            asyncio.run(servers.start(peer(asker), wished("daemon"), (), -1))
    assert told == ["ann", "daemon"]


class Slow:
    """Servers whose homes lie on a file server that does not answer."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.goes_on = asyncio.Event()

    async def start(self, wish: ServerWish, *_: object) -> None:
        self.begun.append(wish.person)
        await self.goes_on.wait()
        raise HostError(attempt="start", answer="it takes too long", remedy="Wait.")


async def begun(tmp_path: Path, people: list[str]) -> list[str]:
    """Whose servers begin to start if all of *people* ask for one."""
    hub = HubTerms(account="jupyterhub")
    servers, slow = ServersOfHub(str(tmp_path), str(tmp_path / "policy"), print), Slow()
    servers._servers = lambda *_: slow  # type: ignore[assignment, method-assign]
    itself = os.pidfd_open(os.getpid())
    starts = [
        asyncio.ensure_future(servers._start(peer(ACCOUNT), hub, wished(person), (1, 2), itself))
        for person in people
    ]
    for _ in range(50):  # nothing of it waits for anything but its turn
        await asyncio.sleep(0)
    found = list(slow.begun)
    slow.goes_on.set()
    await asyncio.gather(*starts, return_exceptions=True)
    os.close(itself)
    assert not servers._starting and not servers._gates
    assert sorted(slow.begun) == sorted(people)
    return found


def test_one_persons_starts_that_hang_keep_nobody_else_from_a_server(tmp_path: Path) -> None:
    hanging = ["ann"] * 9
    assert asyncio.run(begun(tmp_path, [*hanging, "bob"])) == ["ann", "ann", "bob"]


def test_who_takes_too_long_makes_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    people = [f"p{number}" for number in range(9)]
    assert asyncio.run(begun(tmp_path, people)) == people[:8]
    monkeypatch.setattr(for_hub, "_PLACE_SECONDS", 0)
    assert asyncio.run(begun(tmp_path, people)) == people


def test_nobody_waits_for_a_home_or_a_volume_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on, done = threading.Event(), threading.Semaphore(0)

    def hang(*_: object, **more: object) -> None:
        goes_on.wait()
        done.release()
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(launch, "_ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(Place, "open", hang)
    with monkeypatch.context() as patch, pytest.raises(HostError, match="has not answered"):
        patch.setattr(os, "lstat", hang)
        account("ann")
    with ExitStack() as opened, pytest.raises(HostError, match="has not answered"):
        persons._opened_by_root("/srv/dead", opened)
    goes_on.set()
    for _ in range(2):
        done.acquire()


# -- with whose rights


def wished(person: str, *volumes: Volume) -> ServerWish:
    return ServerWish(
        person=person, user=person, argv=("python",), environment={}, port=1, api_port=2,
        sum=Limits(), box=Limits(), network=NetworkWish(), volumes=volumes,
    )  # fmt: skip


def rights(volumes: tuple[Volume, ...], opened: ExitStack, *given: str) -> Rights:
    """Those of ann, whose server is to have *volumes*, where a policy has *given* some."""
    wish = wished("ann", *volumes)
    hub = HubTerms(account="jupyterhub", volumes=given)
    return as_person(hub, pwd.getpwnam("ann"), (), wish, opened)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        if folder != Path(tempfile.gettempdir()):  # which all may write to
            folder.chmod(0o755)
    made = tmp_path / "ann"
    made.mkdir(mode=0o700)
    os.chown(made, ANN, ANN)
    return made


@pytest.mark.requires("root")
def test_a_server_is_shown_what_its_person_can_open_or_the_policy_gives(
    home: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    (closed / "deep").mkdir(parents=True)
    closed.chmod(0o700)
    deep = Volume(source=str(closed / "deep"), target="/deep")
    own = Volume(source=str(home), target="/own", readonly=False)
    with ExitStack() as opened:
        found = rights((own,), opened)
        assert found.volumes == (own,)
        assert found.caller.uid == ANN and found.caller.environment == {}
        assert set(found.caller.opened or {}) == {str(home)}
        assert found.seen_by(os.access, home, os.R_OK)
        with pytest.raises(PermissionError):
            found.seen_by(os.stat, closed / "deep")
        with pytest.raises(SpecError, match="Permission denied"):
            rights((deep,), opened)
        given = rights((deep,), opened, f"{closed}:/srv:ro")
        assert list(given.caller.granted) == [deep]
        with pytest.raises(SpecError, match="Permission denied"):  # to read is all that it gives
            rights((Volume(source=deep.source, target="/deep", readonly=False),), opened,
                   f"{closed}:/srv:ro")  # fmt: skip


@pytest.mark.requires("root")
def test_no_link_that_people_make_leads_out_of_what_the_policy_gives(
    home: Path, tmp_path: Path
) -> None:
    shared, secret = tmp_path / "shared", tmp_path / "secret"
    for folder in (shared, secret):
        folder.mkdir(mode=0o700)
    os.chown(shared, ANN, ANN)
    (shared / "link").symlink_to(secret)
    volume = Volume(source=str(shared / "link"), target="/data")
    with ExitStack() as opened, pytest.raises(SpecError, match="symbolic link"):
        rights((volume,), opened, f"{shared}:/s:rw")
