"""places.py: what is opened, and which symbolic links lead to it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandbox_provisioner import places
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import _listed, mounts_around
from sandbox_provisioner.places import Asker, Place, real_path

NOBODY = 65534
ROOT = Asker.of(0, ())
ME = Asker.of(os.geteuid(), ())
USER = Asker.of(1000, ())


def look(path: Path | str, asker: Asker = ME) -> Place:
    """What it is; the descriptor is closed."""
    with ExitStack() as opened:
        return Place.open(str(path), asker, opened, attempt="use it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that only its owner, who runs the tests, can write to."""
    (tmp_path / "real").mkdir()
    return tmp_path


# -- what is opened


def test_a_place_is_what_stands_at_its_path(folder: Path) -> None:
    status, found = os.stat(folder / "real"), look(f"{folder}//real/.")
    assert (found.path, found.source) == (f"{folder}/real", f"{folder}/real")
    assert (found.device, found.inode) == (status.st_dev, status.st_ino)
    assert (found.owner_uid, found.owner_gid) == (status.st_uid, status.st_gid)
    assert found.is_directory


def test_what_is_open_stays_what_it_was_whatever_its_name_becomes(folder: Path) -> None:
    with ExitStack() as opened:
        found = Place.open(f"{folder}/real", ME, opened, attempt="use it")
        (folder / "real").rename(folder / "moved")
        (folder / "real").mkdir()
        assert real_path(found.fd) == f"{folder}/moved"
        assert os.path.samestat(os.fstat(found.fd), os.stat(folder / "moved"))


def test_what_was_removed_has_no_path(folder: Path) -> None:
    (folder / "real (deleted)").mkdir()
    with ExitStack() as opened:
        found = Place.open(f"{folder}/real", ME, opened, attempt="use it")
        (folder / "real").rmdir()
        with pytest.raises(OSError, match="replaced"):
            real_path(found.fd)


@pytest.mark.parametrize("name", ["missing", "file/x", "real/../missing"])
def test_what_cannot_be_opened_is_told_with_what_to_do(folder: Path, name: str) -> None:
    (folder / "file").touch()
    with pytest.raises(SpecError, match=r"use it: .*Create it"):
        look(folder / name)


def test_nothing_stays_open(folder: Path) -> None:
    (folder / "link").symlink_to("real")
    before = os.listdir("/proc/self/fd")
    look(folder / "real")
    for name in ("link", "missing"):
        with pytest.raises(SpecError):
            look(folder / name)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.requires("root")
def test_a_file_system_is_told_by_its_mount_also_where_its_path_is_not_ascii(
    new_mount: Callable[[str], Path],
) -> None:
    for name in ("données", "a b", "tab\there", "back\\slash"):
        mounted = new_mount(name)
        (mounted / "below").mkdir()
        assert look(mounted).filesystem == look(mounted / "below").filesystem == "ramfs"
        assert look(mounted.parent).filesystem != "ramfs"


@pytest.fixture
def new_mount(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a ramfs at a path of that name."""
    made: list[Path] = []

    def new(name: str) -> Path:
        path = folder / name
        path.mkdir()
        subprocess.run(["mount", "-t", "ramfs", "none", path], check=True)
        made.append(path)
        return path

    yield new
    for path in made:
        subprocess.run(["umount", path], check=True)


def test_a_bind_mount_is_no_other_name_for_a_directory_of_the_system(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SYSTEM_TREES", (str(folder / "real"),))
    found = dataclasses.replace(look(folder / "real"), path="/other", source="/other")
    assert "by another name" in found.refusal(USER)


def test_a_directory_is_crowded_if_homes_lie_in_it_and_root_asks() -> None:
    homes = ["/data/homes/ann", "/root", "/nonexistent"]
    assert Asker.of(0, homes).crowded == {*places.CROWDED, "/data", "/data/homes"}
    assert Asker.of(1000, homes).crowded == set(places.CROWDED)


# -- symbolic links


def owned(path: Path, uid: int, mode: int = 0o755) -> Path:
    path.mkdir()
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


CASES = [
    # (who asks, owner and mode of the directory, a link of whom, is it one that nobody is given)
    (USER, 0, 0o755, 0, False, True),
    (USER, 0, 0o775, 0, False, False),
    (USER, 0, 0o757, 0, False, False),
    (USER, 0, 0o1777, 0, False, False),
    (USER, 0, 0o1777, 1000, True, True),
    (USER, 0, 0o1777, 0, True, True),
    (USER, 0, 0o1777, NOBODY, True, False),
    (USER, 0, 0o777, 1000, True, False),
    (USER, 1000, 0o755, 1000, False, False),
    (USER, NOBODY, 0o755, 0, True, False),
    (ROOT, 0, 0o755, 0, False, False),
    (ROOT, 0, 0o755, 0, True, True),
    (ROOT, 0, 0o775, 0, True, False),
    (ROOT, 0, 0o1777, 0, False, False),
    (ROOT, 0, 0o1777, 0, True, True),
    (ROOT, 0, 0o1777, 1000, True, False),
    (ROOT, 1000, 0o755, 1000, True, False),
]


@pytest.mark.requires("root")
@pytest.mark.parametrize(("asker", "owner", "mode", "linker", "shared", "followed"), CASES)
def test_a_link_is_followed_only_where_no_kernel_can_have_made_it(
    folder: Path,
    asker: Asker,
    owner: int,
    mode: int,
    linker: int,
    shared: bool,
    followed: bool,
) -> None:
    place = owned(folder / "place", owner, mode)
    (place / "link").symlink_to("../real")
    os.lchown(place / "link", linker, linker)
    if shared:
        asker = dataclasses.replace(asker, crowded=asker.crowded | {str(place)})
    if followed:
        assert look(place / "link", asker).source == f"{folder}/real"
        return
    with pytest.raises(SpecError, match=r"link' is a symbolic link to '../real'.*the real path"):
        look(place / "link", asker)


@pytest.mark.requires("root")
@pytest.mark.parametrize("target", ["{}/real", "../real", "../place/../real", "other"])
def test_a_home_behind_a_link_is_where_the_link_leads(folder: Path, target: str) -> None:
    place = owned(folder / "place", 0)
    (folder / "real/notebooks").mkdir()
    (place / "other").symlink_to("../real")
    (place / "me").symlink_to(target.format(folder))
    found = look(place / "me/notebooks", USER)
    assert found.path == f"{place}/me/notebooks"
    assert found.source == f"{folder}/real/notebooks"
    asker = Asker.of(0, [f"{place}/me"])
    assert look(place / "me/notebooks", asker).source == f"{folder}/real/notebooks"


@pytest.mark.requires("root")
def test_links_that_lead_in_a_circle_are_told(folder: Path) -> None:
    (folder / "one").symlink_to("other")
    (folder / "other").symlink_to("one")
    with pytest.raises(SpecError, match="Too many levels of symbolic links"):
        look(folder / "one", USER)


@pytest.mark.ordinary_user
def test_no_link_in_a_directory_of_ones_own_is_followed(folder: Path) -> None:
    (folder / "link").symlink_to("real")
    for path in (folder / "link", folder / "link/below"):
        with pytest.raises(SpecError, match="where a kernel could have made it"):
            look(path)


@pytest.mark.ordinary_user
def test_ones_own_link_in_the_hosts_tmp_is_followed(folder: Path) -> None:
    link = Path("/tmp", f"sbx-link-{os.getpid()}")
    link.symlink_to(folder / "real")
    try:
        assert look(link).source == f"{folder}/real"
    finally:
        link.unlink()


def test_a_control_character_in_a_name_reaches_nobodys_terminal(folder: Path) -> None:
    (folder / "x\x1b[2J").symlink_to("\x1b[31m")
    with pytest.raises(SpecError) as caught:
        look(folder / "x\x1b[2J")
    assert "is a symbolic link to" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.ordinary_user
def test_whoever_swaps_a_directory_for_a_link_is_never_followed(folder: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE: there is no moment at which neither is there."""
    (folder / "link").symlink_to("/etc")
    real = os.stat(folder / "real").st_ino
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            exchange(folder / "real", folder / "link")

    swapper = threading.Thread(target=swap)
    swapper.start()
    refused = opened = 0
    try:
        while refused < 200 or opened < 200:
            try:
                found = look(folder / "real")
            except SpecError:
                refused += 1
            else:
                opened += 1
                assert found.inode == real
    finally:
        done.set()
        swapper.join()


def exchange(one: Path, other: Path) -> None:
    libc, at_fdcwd, rename_exchange = kernel_calls._libc, -100, 2
    answer = libc.renameat2(at_fdcwd, bytes(one), at_fdcwd, bytes(other), rename_exchange)
    assert answer == 0


def test_the_file_system_of_a_descriptor_is_that_of_its_mount() -> None:
    for path, kind in (("/proc", "proc"), ("/sys", "sysfs"), ("/dev/shm", "tmpfs")):
        fd = os.open(path, os.O_PATH)
        assert mounts_around(fd, path)[0].filesystem == kind
        os.close(fd)


@pytest.mark.parametrize(
    ("kind", "options", "private"),
    [
        ("fuse.sshfs", "rw,user_id=0", True),
        ("fuse", "rw,allow_other", False),
        ("ext4", "rw", False),
    ],
)
def test_a_fuse_mount_is_its_mounters_alone_unless_it_allows_others(kind, options, private):
    (mount,) = _listed(f"31 27 0:1 / /mnt/x rw - {kind} /from\\040where {options}\n".encode())
    assert (mount.filesystem, mount.private) == (kind, private)
