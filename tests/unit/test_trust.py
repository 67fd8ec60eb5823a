"""Who could change what a path leads to; on real files of root's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.trust import Writer, changeable, is_roots, not_roots_in

pytestmark = pytest.mark.requires("root")

ALICE = Writer(4321, frozenset({4321, 4400}))
ROOT = Writer(0, frozenset({0}))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below /opt, since anybody may make links in /tmp."""
    made = Path(tempfile.mkdtemp(prefix="sbx-", dir="/opt"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def spec(folder: Path) -> Path:
    path = folder / "kernels/python/kernel.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    return path


def test_what_is_roots_on_all_of_the_way_is_nobody_elses(spec: Path) -> None:
    for writer in (ALICE, ROOT):
        assert changeable(str(spec), writer) == ""
    assert is_roots(str(spec))


@pytest.mark.parametrize("above", [0, 1, 2, 3])
def test_who_may_write_to_the_file_or_to_any_folder_on_the_way_may_change_it(
    spec: Path, above: int
) -> None:
    place = (spec, *spec.parents)[above]
    for uid, gid, mode in ((4321, 0, 0o555), (0, 4400, 0o575), (0, 0, 0o757), (4999, 0, 0o757)):
        os.chown(place, uid, gid)
        place.chmod(mode)
        assert changeable(str(spec), ALICE) == str(place), (uid, gid, mode)
        assert not is_roots(str(spec))


def test_what_is_a_third_ones_is_not_hers_and_not_roots(spec: Path) -> None:
    os.chown(spec, 4999, 4999)
    assert changeable(str(spec), ALICE) == ""
    assert not is_roots(str(spec))
    assert changeable(str(spec), ROOT) == str(spec)


def test_another_group_may_write_without_her(spec: Path) -> None:
    os.chown(spec, 0, 4999)
    spec.chmod(0o664)
    assert changeable(str(spec), ALICE) == ""
    assert not is_roots(str(spec))


def test_a_link_is_as_good_as_the_folders_that_it_lies_in_and_leads_through(
    folder: Path, spec: Path
) -> None:
    hers = folder / "hers"
    hers.mkdir()
    os.chown(hers, 4321, 4321)
    (hers / "link").symlink_to(spec)
    (folder / "straight").symlink_to("kernels/python")
    (folder / "around").symlink_to(hers / "link")
    (folder / "back").symlink_to("hers/../kernels/python/kernel.json")
    assert changeable(f"{folder}/straight/kernel.json", ALICE) == ""
    for name in ("hers/link", "around", "back"):
        assert changeable(f"{folder}/{name}", ALICE) == str(hers), name
        assert not is_roots(f"{folder}/{name}")


def test_what_cannot_be_looked_at_counts_as_changeable(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    for name in ("missing", "loop", "dangling", "missing/../loop"):
        assert changeable(f"{folder}/{name}", ALICE), name
        assert not is_roots(f"{folder}/{name}")


def test_in_a_folder_the_first_thing_is_told_that_is_not_roots_alone(folder: Path) -> None:
    inside = folder / "lib/package/module.py"
    inside.parent.mkdir(parents=True)
    inside.write_text("")
    (folder / "lib/link").symlink_to("/home/anybody")
    assert not_roots_in([str(folder)], 100) == not_roots_in([str(inside)], 100) == ""
    assert not_roots_in([str(folder)], 1) == str(folder)
    for place in (inside, inside.parent, folder):
        os.chown(place, 4321, 0)
        assert not_roots_in([str(folder)], 100) == str(place)
        os.chown(place, 0, 0)
    inside.chmod(0o666)
    assert not_roots_in([str(folder)], 100) == str(inside)
    assert not_roots_in([str(folder / "missing")], 100) == str(folder / "missing")


def test_what_lies_behind_something_of_anothers_is_not_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may never answer there."""
    hers, looks, look = folder / "hers", [], os.lstat
    hers.mkdir()
    os.chown(hers, 4321, 4321)

    def noted(path: str) -> os.stat_result:
        looks.append(path)
        return look(path)

    monkeypatch.setattr(os, "lstat", noted)
    assert not_roots_in([f"{hers}/below/file"], 100) == f"{hers}/below/file"
    assert looks[-1] == str(hers)


def test_all_paths_together_have_as_many_files_as_are_looked_at(folder: Path) -> None:
    paths = [str(folder / name) for name in "abc"]
    for path in paths:
        os.mkdir(path)
        for number in range(3):
            Path(path, f"{number}").touch()
    assert not_roots_in(paths, 9) == ""
    assert not_roots_in(paths, 5) == paths[1]
    assert not_roots_in(paths, 3) == paths[1]


def test_what_nobody_but_root_can_enter_is_nothing_that_a_user_could_run(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir()
    (closed / "module.py").touch()
    looks = Eyes(4321, 4321, frozenset())
    closed.chmod(0o700)
    assert looks(not_roots_in, [str(folder)], 100) == ""
    closed.chmod(0o711)  # whoever knows a name in there can import it
    assert looks(not_roots_in, [str(folder)], 100) == str(closed)


def test_what_root_has_closed_to_all_others_is_roots_though_nobody_else_can_look(
    folder: Path,
) -> None:
    """A program in there may show in a box."""
    closed = folder / "closed"
    (closed / "bin").mkdir(parents=True)
    program = closed / "bin/python3"
    program.touch()
    looks = Eyes(4321, 4321, frozenset())
    for mode, told in {0o700: "", 0o750: str(program), 0o710: str(program)}.items():
        closed.chmod(mode)
        assert looks(not_roots_in, [str(program)], 100) == told
    closed.chmod(0o700)
    os.chown(closed, 4322, 4322)
    assert looks(not_roots_in, [str(program)], 100) == str(program)
    assert looks(not_roots_in, [f"{folder}/missing/program"], 100) == f"{folder}/missing/program"
