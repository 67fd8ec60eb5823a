"""Who could change what a path leads to; on real files of root's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_provisioner.trust import Writer, changeable, is_roots

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
