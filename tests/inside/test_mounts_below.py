"""Mounts below what a kernel is given: they come with it, and files there have an owner."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from probes import answer_of

from sandbox_provisioner import host
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.spec import Volume

pytestmark = [pytest.mark.requires("userns"), pytest.mark.requires("root")]

OWNER = 4321


@pytest.fixture
def mounted() -> Iterator[Callable[..., Path]]:
    """``mounted(path, *words)`` mounts there what the words of mount(8) say."""
    made: list[Path] = []

    def mount(path: Path, *words: str) -> Path:
        path.mkdir(exist_ok=True)
        subprocess.run(["mount", *words, str(path)], check=True)
        made.append(path)
        return path

    yield mount
    for path in reversed(made):
        subprocess.run(["umount", str(path)], check=True)


def write(folders):
    """Make a file in each; what Linux answers, and whose it is as the kernel sees it."""
    import os

    def make(path):
        open(path, "x").close()
        return os.stat(path).st_uid == os.getuid()

    return {name: answer_of(lambda at=at: make(f"{at}/file")) for name, at in folders.items()}


def of_owner(path: Path, mode: int = 0o755) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, OWNER, OWNER)
    path.chmod(mode)
    return path


def tree(
    base: Path, new_folder: Callable[[], Path], mounted: Callable[..., Path]
) -> dict[str, str]:
    """In *base*, which is OWNER's: a bind, a tmpfs, and one in the other; of others, too."""
    of_owner(base)
    bound = mounted(base / "bound", "--bind", str(of_owner(new_folder())))
    memory = mounted(base / "a b", "-t", "tmpfs", "-o", f"uid={OWNER},gid={OWNER}", "none")
    deep = of_owner(mounted(memory / "dä\nep", "-t", "tmpfs", "none"))
    closed = mounted(base / "closed", "--bind", str(new_folder()))
    return {path.name: str(path) for path in (bound, memory, deep, closed)}


def test_a_bind_and_a_tmpfs_below_the_work_directory_are_written_to_as_its_owner(
    run_inside, workdir, new_folder, mounted, warnings
):
    folders = tree(workdir, new_folder, mounted)
    answers = run_inside(write, folders, using=(answer_of,))
    assert answers.pop("closed") == "EACCES"
    assert answers == {"bound": "True", "a b": "True", "dä\nep": "True"}
    owners = {name: os.stat(f"{folders[name]}/file").st_uid for name in answers}
    assert set(owners.values()) == {OWNER}
    assert not warnings


def test_the_same_holds_for_a_volume(run_inside, new_folder, mounted):
    folders = tree(source := new_folder(), new_folder, mounted)
    inside = {name: path.replace(str(source), "/data") for name, path in folders.items()}
    volume = Volume(source=str(source), target="/data", readonly=False)
    answers = run_inside(write, inside, volumes=(volume,), using=(answer_of,))
    assert answers == {"closed": "EACCES", "bound": "True", "a b": "True", "dä\nep": "True"}
    assert os.stat(f"{folders['bound']}/file").st_uid == OWNER


def test_a_volume_that_can_only_be_read_is_so_with_all_that_is_mounted_below_it(
    run_inside, new_folder, mounted
):
    """Also what is new there; and no program of it runs where that was asked for."""
    folders = tree(source := new_folder(), new_folder, mounted)
    program = Path(folders["bound"]) / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def look(folders):
        import subprocess

        def run():
            subprocess.run([f"{folders['bound']}/program"], check=True)
            return "ran"

        answers = write(folders) | {"run": answer_of(run)}
        with open("/proc/self/mountinfo") as table:
            found = [line.split() for line in table]
        options = {line[5] for line in found if line[4].startswith("/data")}
        return answers, [text.partition(",relatime")[0] for text in options]

    inside = {name: path.replace(str(source), "/data") for name, path in folders.items()}
    plain, closed = (Volume.parse(f"{source}:/data:{how}") for how in ("ro", "ro,noexec"))
    answers, options = run_inside(look, inside, volumes=(plain,), using=(answer_of, write))
    assert answers == {**dict.fromkeys(folders, "EROFS"), "closed": "EACCES", "run": "ran"}
    assert options == ["ro,nosuid,nodev"] * len(options)
    answers, options = run_inside(look, inside, volumes=(closed,), using=(answer_of, write))
    assert answers["run"] == "EACCES"
    assert options == ["ro,nosuid,nodev,noexec"] * len(options)


def test_where_the_ids_of_one_cannot_be_mapped_those_below_can_be_read(
    run_inside, workdir, mounted, warnings
):
    """ramfs cannot; open to everybody, it would take files that belong to nobody."""
    of_owner(workdir)
    plain = mounted(workdir / "plain", "-t", "ramfs", "-o", "mode=0777", "none")
    (plain / "there").write_text("text")
    folders = {"plain": str(plain), "itself": str(workdir)}
    assert run_inside(write, folders, using=(answer_of,)) == {"plain": "EROFS", "itself": "True"}
    assert [text for text in warnings if f"{plain} can only be read" in text]
    assert os.stat(workdir / "file").st_uid == OWNER
    assert os.listdir(plain) == ["there"]


def test_what_is_mounted_while_the_work_directory_is_looked_at_counts_too(
    run_inside, workdir, mounted, monkeypatch
):
    """autofs mounts what is listed; here somebody does it just then."""
    of_owner(workdir)
    late = workdir / "late"
    find_covered = host.find_covered

    def find(*words, **options):
        found = find_covered(*words, **options)
        mounted(late, "-t", "ramfs", "-o", "mode=0777", "none")
        return found

    monkeypatch.setattr(host, "find_covered", find)
    folders = {"late": str(late), "itself": str(workdir)}
    answers = run_inside(write, folders, using=(answer_of,))
    assert answers == {"late": "EROFS", "itself": "True"}


@pytest.mark.parametrize("name", ["a b", "dönées", "tab\there", "back\\slash"])
def test_a_work_directory_may_be_a_mount_of_any_name(run_inside, new_folder, mounted, name):
    place = of_owner(mounted(new_folder() / name, "-t", "tmpfs", "none"))
    (place.parent).chmod(0o755)
    assert run_inside(write, {name: str(place)}, workdir=place, using=(answer_of,))[name] == "True"
    assert os.stat(place / "file").st_uid == OWNER


def test_a_file_system_whose_ids_cannot_be_mapped_is_an_ordinary_users_or_refused(
    run_inside, new_folder, mounted
):
    """overlay, as in a container; the same goes for FUSE and NFS."""
    base = mounted(new_folder() / "base", "-t", "tmpfs", "none")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    place = mounted(new_folder() / "a ö", "-t", "overlay", "-o", layers, "none")
    with pytest.raises(HostError, match="cannot map the ids of a mount of overlay"):
        run_inside(os.getpid, workdir=place)
    of_owner(place)
    assert run_inside(write, {"itself": str(place)}, workdir=place, using=(answer_of,)) == {
        "itself": "True"
    }
    assert os.stat(place / "file").st_uid == OWNER


@pytest.mark.parametrize("how", ["work directory", "volume"])
def test_what_shows_the_host_as_files_is_given_to_nobody(
    run_inside, workdir, new_folder, mounted, how
):
    """The /proc of a chroot below it is the host's."""
    folder = workdir if how == "work directory" else new_folder()
    place = mounted(folder / "proc", "-t", "proc", "proc")
    volumes = () if folder == workdir else (Volume(source=str(folder), target="/data"),)
    with pytest.raises(SpecError, match=f"{place} is a mount of proc, which shows the host"):
        run_inside(os.getpid, volumes=volumes)
