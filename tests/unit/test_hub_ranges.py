"""Whose range of ids is whose."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FIRST_PERSONS_ID, IDS, LAST_ID
from sandbox_provisioner.hub.ranges import range_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "var" / "sandbox-provisioner"


def test_each_person_has_a_range_and_always_the_same(folder: Path) -> None:
    assert range_of("ann", folder) == FIRST_PERSONS_ID
    assert range_of("bob", folder) == FIRST_PERSONS_ID + IDS
    assert range_of("ann", folder) == FIRST_PERSONS_ID
    # A line that somebody took out in the middle is nobody else's: only the last one counts.
    file = folder / "ranges"
    file.write_text(file.read_text().replace(f"ann {FIRST_PERSONS_ID}\n", ""))
    assert range_of("eve", folder) == FIRST_PERSONS_ID + 2 * IDS


def test_many_at_once_get_ranges_of_their_own(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: range_of(f"user{n % 20}", folder), range(60)))
    assert len(set(found)) == 20
    assert set(found) == {FIRST_PERSONS_ID + n * IDS for n in range(20)}


def test_ranges_end_where_systemds_table_says(folder: Path) -> None:
    folder.mkdir(parents=True)
    last = FIRST_PERSONS_ID + (LAST_ID - FIRST_PERSONS_ID + 1) // IDS * IDS - IDS
    (folder / "ranges").write_text(f"ann {last - IDS}\n")
    assert range_of("bob", folder) == last
    with pytest.raises(HostError, match="all 2 ranges have been given") as caught:
        range_of("eve", folder)
    file = folder / "ranges"
    assert "\neve " not in file.read_text()
    assert "write the new name in place of one" in caught.value.remedy
    file.write_text(file.read_text().replace("ann ", "eve "))
    assert range_of("eve", folder) == last - IDS


@pytest.mark.parametrize("line", ["ann", "ann x", "bob 5\nbob 6", "ann 5\nbob 5", "ann -5"])
def test_a_file_that_does_not_make_sense_is_an_error_and_stays(folder: Path, line: str) -> None:
    folder.mkdir(parents=True)
    (folder / "ranges").write_text(f"{line}\n")
    with pytest.raises(HostError, match=r"line [12] of .*ranges is"):
        range_of("eve", folder)
    assert (folder / "ranges").read_text() == f"{line}\n"


def test_what_others_may_write_is_not_believed(folder: Path) -> None:
    range_of("ann", folder)
    (folder / "ranges").chmod(0o666)
    with pytest.raises(HostError, match="others than root may write"):
        range_of("ann", folder)
    (folder / "ranges").chmod(0o644)
    folder.chmod(0o777)
    with pytest.raises(HostError, match="others than root may write"):
        range_of("ann", folder)


def test_a_link_in_its_place_is_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    (tmp_path / "other").write_text("eve 5\n")
    (folder / "ranges").symlink_to(tmp_path / "other")
    with pytest.raises(HostError, match="ranges"):
        range_of("eve", folder)
    assert os.readlink(folder / "ranges") == str(tmp_path / "other")


@pytest.mark.parametrize("name", ["", "two words", "line\n", "nul\0"])
def test_a_name_that_would_break_the_file_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(HostError, match="no name of a person"):
        range_of(name, folder)
