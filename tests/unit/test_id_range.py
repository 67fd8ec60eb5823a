"""facilities/ids/facts.py: which ids a user may map, and the maps that come of them."""

from __future__ import annotations

import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids import facts as id_range
from sandbox_provisioner.facilities.ids.facts import IDS, find_id_range, first_of, id_map

UID = 4321


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine with both helpers, a user "me", and the files that the dictionary holds."""
    files = {"/etc/subuid": "me:100000:65536\n", "/etc/subgid": f"{UID}:200000:65536\n"}
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o4755)
    monkeypatch.setattr(id_range, "_HELPER_FOLDERS", ("/nonexistent", str(tmp_path)))
    monkeypatch.setattr(id_range, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(id_range, "_name_of", lambda uid: "me" if uid == UID else "")
    files["folder"] = str(tmp_path)
    return files


def test_a_range_is_found_by_name_or_by_number(machine: dict[str, str]) -> None:
    found = find_id_range(UID)
    assert (found.first_uid, found.first_gid) == (100000, 200000)
    assert found.newuidmap == f"{machine['folder']}/newuidmap"


def test_a_user_without_enough_ids_reads_the_command_that_gives_them(
    machine: dict[str, str],
) -> None:
    machine["/etc/subuid"] = "you:100000:65536\nme:300000:1000\n"
    with pytest.raises(HostError, match="/etc/subuid gives me no 65536 ids") as caught:
        find_id_range(UID)
    assert "usermod --add-subuids 301000-366535 --add-subgids 301000-366535 me" in str(caught.value)


def test_a_user_without_a_name_cannot_have_one(machine: dict[str, str]) -> None:
    with pytest.raises(HostError, match=r"uid 7 has no name.*useradd --uid 7"):
        find_id_range(7)


def test_a_missing_helper_is_named_with_its_package(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(id_range, "_HELPER_FOLDERS", ("/nonexistent",))
    with pytest.raises(HostError, match=r"no newuidmap.*sudo apt install uidmap"):
        find_id_range(UID)


def test_a_helper_that_gains_no_rights_is_named(machine: dict[str, str]) -> None:
    helper = Path(machine["folder"], "newgidmap")
    helper.chmod(helper.stat().st_mode & ~stat.S_ISUID)
    with pytest.raises(HostError, match=r"newgidmap is not set-uid.*sudo chmod u\+s"):
        find_id_range(UID)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("me:100000:65536", 100000),
        ("4321:7:70000\n", 7),
        ("me:5:65535\nme:100000:65536\n", 100000),
        ("you:100000:65536\n", None),
        ("# me:100000:65536\nme:x:65536\nme:1\n\n", None),
    ],
)
def test_lines_of_subuid_are_read_as_the_helpers_read_them(text: str, answer: int | None) -> None:
    assert first_of(text, {"me", "4321"}) == answer


def test_an_id_of_ones_own_may_lie_above_the_range_or_at_its_ends() -> None:
    assert id_map(70000, 70000, 100000) == "0 100000 65536\n70000 70000 1"
    assert id_map(0, 5, 100) == "0 5 1\n1 101 65535"
    assert id_map(IDS - 1, 5, 100) == "0 100 65535\n65535 5 1"
    assert id_map(1000, 2000, 1000) == "0 1000 65536"


@given(st.integers(0, 1 << 17), st.integers(1 << 20, 1 << 21), st.integers(1 << 24, 1 << 28))
def test_every_id_is_mapped_once_and_nothing_outside_twice(
    inside: int, outside: int, first: int
) -> None:
    lines = [tuple(map(int, line.split())) for line in id_map(inside, outside, first).splitlines()]
    mapped = {start: to for start, to, _ in lines}
    assert mapped[inside] == outside
    assert sum(count for _, _, count in lines) == (IDS if inside < IDS else IDS + 1)
    spans = sorted((to, to + count) for _, to, count in lines)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_the_file_is_read_again_where_it_has_changed_and_not_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads, real = tmp_path / "subuid", [0], id_range._text

    def text(asked: str) -> str:
        reads[0] += 1
        return real(asked)

    monkeypatch.setattr(id_range, "_SUBUID", str(path))
    monkeypatch.setattr(id_range, "_text", text)
    assert not id_range.is_given_away(100001)
    for count, first in enumerate((100000, 10000), 2):
        path.write_text(f"me:{first}:65536\nyou:400000:65536\n")
        for _ in range(3):
            assert id_range.first_of_range(first + 1) == first
            assert id_range.first_of_range(400009) == 400000
            assert id_range.first_of_range(9) == 9
        assert reads == [count]
    path.unlink()
    assert not id_range.is_given_away(100001)
