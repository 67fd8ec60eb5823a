"""The file that ends are added to is the one that was meant, and no kernel can choose another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sandbox_provisioner.ends_file import EndsFile
from sandbox_provisioner.errors import SpecError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    (tmp_path / "work/deep").mkdir(parents=True)
    return Path(os.path.realpath(tmp_path))


def test_lines_are_added_and_nobody_else_may_read_them(place: Path) -> None:
    path = place / "log/ends.jsonl"
    for kind in ("exit", "signal"):
        file = EndsFile(str(path), [str(place / "work")])
        file.add({"kind": kind, "sentence": "a\nb"})
        file.close()
        file.close()
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["exit", "signal"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["work/ends", "work/deep/ends", "alias/ends", "alias/deep/ends"])
def test_a_directory_that_the_kernel_may_write_to_is_refused_by_any_name(
    place: Path, name: str
) -> None:
    (place / "alias").symlink_to(place / "work")
    with pytest.raises(SpecError, match="the kernel may write to its directory"):
        EndsFile(str(place / name), [str(place / "work")])
    assert list((place / "work").iterdir()) == [place / "work/deep"]


@pytest.mark.parametrize("name", ["log/link", "linked/ends"])
def test_no_link_on_the_way_is_followed(place: Path, name: str) -> None:
    (place / "log/link").symlink_to(place / "log/other")
    (place / "linked").symlink_to(place / "log")
    with pytest.raises(SpecError, match="levels of symbolic links"):
        EndsFile(str(place / name), [str(place / "work")])
    assert not (place / "log/other").exists()


def test_what_is_no_file_is_refused(place: Path) -> None:
    os.mkfifo(place / "log/fifo")
    reader = os.open(place / "log/fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(SpecError, match="it is no regular file"):
            EndsFile(str(place / "log/fifo"), [])
    finally:
        os.close(reader)
    with pytest.raises(SpecError, match="it is no absolute path"):
        EndsFile("ends.jsonl", [])
    with pytest.raises(SpecError, match="No such file or directory"):
        EndsFile(str(place / "nowhere/ends"), [])
