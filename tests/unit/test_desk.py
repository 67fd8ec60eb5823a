"""What a hub gives the kernels of a server that it has put into a box."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_provisioner.broker.desk import BoxDesk, Desk, _by_real_paths
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.values import as_json, of_json
from sandbox_provisioner.broker.wishes import Ahead
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, FIRST_PERSONS_ID, IDS
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.mounts import read_only
from sandbox_provisioner.records import Record, RecordFolder, pid_of, start_time
from sandbox_provisioner.spec import Limits, SandboxSpec, Volume

GATEWAY = NetworkWish(mode=Network.GATEWAY, allow=("*.example.org:443",))
DESK = BoxDesk(
    box="0123456789ab",
    name="ann",
    first_id=FIRST_PERSONS_ID,
    ways={"/home/ann": "/home/ann", "/data": "/srv/data/ann", "/data/old": "/srv/old"},
    volumes=(Volume(source="/srv/data/ann", target="/data", readonly=False),),
    shown=("/opt/jupyter", "/home/ann", "/srv/data/ann", "/srv/old"),
    limits=Limits(memory_bytes=1 << 30),
    network=NetworkWish(),
    folder="/run/x-hub/0123456789ab/hub/kernels",
    runtime="/run/x",
)


def test_a_desk_is_the_same_for_the_next_hub() -> None:
    assert of_json(BoxDesk, json.loads(json.dumps(as_json(DESK))), "desk.json") == DESK


def test_what_is_ready_is_a_users_or_a_boxs_and_within_bounds() -> None:
    peer = Peer("ann", 1000, 1000, frozenset({1000}), "/home/ann")
    wish = Ahead(spares=1000, idle_seconds=1e6, lonely_seconds=1e6)
    server = os.pidfd_open(os.getpid())
    try:
        with ExitStack() as opened:
            found = [desk.warmth(peer, wish, server, opened) for desk in (Desk(), DESK)]
            shared = Desk().warmth(peer, replace(wish, alone=False), server, opened)
    finally:
        os.close(server)
    process = f"{os.getpid()} {start_time(os.getpid())}"
    assert [warmth.owners for warmth in (*found, shared)] == [
        (f"1000 {process}", "1000"), (f"{DESK.box} {process}", DESK.box), ("1000",)
    ]  # fmt: skip
    assert [warmth.watched for warmth in (*found, shared)] == [server, server, -1]
    bounds = {(one.spares, one.idle_seconds, one.lonely_seconds) for one in found}
    assert bounds == {(4, 86400.0, 86400.0)}


def test_what_is_ready_for_all_servers_of_a_box_ends_with_it(tmp_path: Path) -> None:
    peer = Peer("ann", 1000, 1000, frozenset({1000}), "/home/ann")
    pid, desk = os.getpid(), replace(DESK, runtime=str(tmp_path))
    record = Record(sandbox_id=DESK.box, init_pid=pid, init_start=start_time(pid))
    folder, _ = RecordFolder.create(tmp_path, record, ids=False)
    with ExitStack() as opened:
        opened.callback(folder.remove)
        found = desk.warmth(peer, Ahead(alone=False), -1, opened)
        assert (pid_of(found.watched), found.owners) == (pid, (DESK.box,))
        folder.write(replace(record, init_start=1))
        with pytest.raises(SpecError, match="that one has ended"):
            desk.warmth(peer, Ahead(alone=False), -1, opened)


def test_it_listens_to_the_ids_of_its_box_alone() -> None:
    first = DESK.first_id
    assert [DESK.refusal(uid) for uid in (first, first + 1000, first + IDS - 1)] == [""] * 3
    assert all(DESK.refusal(uid) for uid in (0, 1000, first - 1, first + IDS, FIRST_ID + 1000))
    assert Desk().refusal(0) and Desk().refusal(first + 1000) and not Desk().refusal(1000)


def test_a_desk_has_the_kernels_that_were_asked_for_there() -> None:
    beside = Record(sandbox_id="a" * 12, uid=1001, box=DESK.box)
    other = replace(beside, box="b" * 12)
    public = replace(beside, box="")
    assert [DESK.has(record) for record in (beside, other, public)] == [True, False, False]
    assert [Desk().has(record) for record in (beside, other, public)] == [False, False, True]
    assert not DESK.has(replace(beside, kind="server"))


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("/home/ann/work", "/home/ann/work"),
        ("/data", "/srv/data/ann"),
        ("/data/a/b", "/srv/data/ann/a/b"),
        ("/data/old/a", "/srv/old/a"),
        ("/opt/jupyter/lib", "/opt/jupyter/lib"),
        ("/usr/share", "/usr/share"),
        ("/database", ""),
        ("/home/bob", ""),
        ("/tmp", ""),
        ("/", ""),
    ],
)
def test_what_is_at_a_place_of_the_box_is_looked_for_where_it_lies(
    inside: str, outside: str
) -> None:
    assert DESK.outside(inside) == outside


@pytest.mark.parametrize("network", [GATEWAY, NetworkWish()], ids=["gateway", "none"])
def test_a_kernel_has_the_network_of_its_server_or_none(network: NetworkWish) -> None:
    desk = replace(DESK, network=network)
    more = replace(GATEWAY, allow=("*.example.com:443",))
    for untouched, asked, given in (
        ({"network"}, NetworkWish(), network),
        (set(), NetworkWish(), NetworkWish()),
        (set(), more, network),
    ):
        spec = SandboxSpec(workdir="/home/ann", network=asked, untouched=frozenset(untouched))
        found, told = desk.allowed(spec)
        assert found.network == given
        assert bool(told) == (asked == more)


def test_memory_that_nobody_has_named_is_half_of_what_the_person_has() -> None:
    spec = SandboxSpec(workdir="/home/ann", limits=Limits(memory_bytes=2 << 30))
    assert DESK.allowed(spec)[0].limits.memory_bytes == 2 << 30  # below the sum it is all the same
    spec = replace(spec, untouched=frozenset({"mem_limit"}))
    assert DESK.allowed(spec)[0].limits.memory_bytes == 512 << 20
    little = replace(spec, limits=Limits(memory_bytes=64 << 20))
    assert DESK.allowed(little)[0].limits.memory_bytes == 64 << 20


def test_a_kernel_has_no_wider_limit_of_its_work_directory_than_its_server() -> None:
    """It would set that of the home anew, which it works in, too."""
    desk = replace(DESK, workdir_bytes=10 << 30, workdir_inodes=100_000)
    wide = Limits(workdir_bytes=1 << 40, workdir_inodes=1 << 30)
    narrow, usual = Limits(workdir_bytes=1 << 30, workdir_inodes=1000), Limits()
    server = Limits(workdir_bytes=desk.workdir_bytes, workdir_inodes=desk.workdir_inodes)
    for one, asked, given in (
        (desk, wide, server), (desk, narrow, narrow), (desk, usual, usual), (DESK, wide, wide),
    ):  # fmt: skip
        spec, told = one.allowed(SandboxSpec(workdir="/home/ann", limits=asked))
        assert spec.limits == given
        assert len(told) == 2 * (asked != given)


def folders(tmp_path: Path, opened: ExitStack, *names: str) -> dict[str, int]:
    """Descriptors of directories in *tmp_path*, by their paths."""
    found = {}
    for path in (str(tmp_path / name) for name in names):
        os.makedirs(path, exist_ok=True)
        found[path] = os.open(path, os.O_PATH)
        opened.callback(os.close, found[path])
    return found


def test_what_came_opened_is_what_it_came_for_also_beside_a_root(tmp_path: Path) -> None:
    with ExitStack() as opened:
        fds = folders(tmp_path, opened, "work", "a", "b", "root")
        work, one, other, root = fds
        spec = SandboxSpec(
            workdir=work,
            rootfs=root,
            volumes=(
                Volume(source="/said/a", target="/a"),
                Volume(source="/said/b", target="/b"),
            ),
        )
        spec = replace(spec, rootfs="/said/root")
        found, by_path, brought = _by_real_paths(spec, list(fds.values()))
        assert [volume.source for volume in found.volumes] == [one, other]
        assert (found.rootfs, brought) == (root, (root, fds.pop(root)))
        assert by_path == fds


def test_no_path_is_given_twice_by_two_names(tmp_path: Path) -> None:
    """The one that is to be written would be that of the other, which may only be read."""
    with ExitStack() as opened:
        work, one = folders(tmp_path, opened, "work", "a").values()
        name = str(tmp_path / "a")
        as_workdir = SandboxSpec(workdir=name, volumes=(Volume(source="/said", target="/a"),))
        twice = SandboxSpec(
            workdir=str(tmp_path / "work"),
            volumes=tuple(Volume(source=f"/said/{n}", target=f"/{n}") for n in "ab"),
        )
        again = os.dup(one)
        opened.callback(os.close, again)
        for spec, fds in ((as_workdir, [work, one]), (twice, [work, one, again])):
            with pytest.raises(SpecError, match="one path is given twice"):
                _by_real_paths(spec, fds)


@pytest.mark.parametrize(
    ("path", "frozen", "is_refused"),
    [
        ("/home/ann", "/home/ann/.venv", True),
        ("/home/ann/work", "/home/ann/.venv", False),
        ("/data", "/data/sub/ro", True),
        ("/data", "/data/old", False),  # which lies elsewhere outside
        ("/home/ann", "/home/anna", False),
    ],
)
def test_nothing_is_written_that_has_a_part_which_the_server_can_only_read(
    path: str, frozen: str, is_refused: bool
) -> None:
    assert bool(DESK.frozen_below(path, (frozen,))) == is_refused


def test_a_kernel_of_a_boxs_has_no_device_that_its_server_has_not() -> None:
    found, told = DESK.allowed(SandboxSpec(workdir="/home/ann", devices=("nvidia.com/gpu=all",)))
    assert found.devices == ()
    assert len(told) == 1


def test_mounts_that_can_only_be_read_are_seen() -> None:
    read = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if "ro" in line.split()[5].split(",")}  # fmt: skip
    assert set(read_only(os.getpid())) == read
