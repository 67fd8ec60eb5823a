"""What `jupyter sandbox list` draws, from sandboxes that are made up."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sandbox_provisioner.app import listing, running
from sandbox_provisioner.app.running import Disk, Pages, Sandbox, look_at_others
from sandbox_provisioner.facilities.caps.cgroup import Usage
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.records import BUSY, Record, RecordFolder, start_time

PAGE = Path(__file__).parents[2] / "docs/list.md"
EVIL = "\x1b]0;title\x07\x9b31m\u202e[bold red]n\n字"
MIB = 1 << 20
STATVFS = os.statvfs("/")


def sandbox(name: str = "Python 3", *, used: int | None = 64 * MIB, **more: Any) -> Sandbox:
    record = Record(
        sandbox_id=f"id-{name[:8]}",
        name=name,
        user="ada",
        started=time.time() - 61,
        workdir="/srv/work",
        shown_at="/srv/work",
        memory_limit_bytes=more.pop("limit", 128 * MIB),
        notebook=more.pop("notebook", ""),
        nursery=more.pop("nursery", ""),
    )
    usage = Usage(memory_bytes=used, processes=3)
    return Sandbox(record=record, state=more.pop("state", "idle"), usage=usage, **more)


def text_of(*found: Sandbox, columns: int = 200, colours: bool = False) -> str:
    system = "standard" if colours else None
    out = Console(file=io.StringIO(), width=columns, force_terminal=colours, color_system=system)
    out.print(listing.drawn(found, columns))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_row_tells_the_notebook_the_state_and_how_much_of_the_limit_is_used() -> None:
    head, row = text_of(
        sandbox(notebook="/srv/work/deep/analysis.ipynb", state="busy", cpu_percent=42.4)
    ).splitlines()
    assert re.split(r"  +", head.strip()) == [
        "id", "name", "notebook", "user", "age", "state", "memory", "cpu", "processes",
    ]  # fmt: skip
    assert "analysis.ipynb  /srv/work/deep  ada" in row
    assert "busy   ━━━━━───── 64 MiB of 128 MiB" in row
    assert row.endswith("42 %          3")


def test_without_a_notebook_the_work_directory_is_told_and_a_home_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/srv")
    assert "work  ~ " in text_of(sandbox(notebook="session-1"))


def test_what_is_not_known_is_a_question_and_without_a_limit_there_is_no_bar() -> None:
    assert "idle   ?" in text_of(sandbox(used=None))
    row = text_of(sandbox(limit=None)).splitlines()[1]
    assert "64 MiB" in row
    assert not set("━─") & set(row)


@pytest.mark.parametrize(
    ("share", "colour"), [(0.5, "32"), (0.75, "33"), (0.93, "31"), (1.5, "31")]
)
def test_the_bar_changes_its_colour_as_the_limit_comes_closer(share: float, colour: str) -> None:
    assert f"\x1b[{colour}m━" in text_of(sandbox(used=int(share * 128 * MIB)), colours=True)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_names_and_paths_reach_a_terminal_as_letters_of_one_line(columns: int) -> None:
    row = sandbox(EVIL, notebook=f"/srv/{EVIL}", state="running")
    told = text_of(row, columns=columns)
    assert len(told.splitlines()) == 2
    controls = {letter for letter in told if unicodedata.category(letter) in {"Cc", "Cf"}}
    assert controls == {"\n"}
    if columns == 200:
        assert one_line(EVIL) in told
        assert one_line(EVIL) + "  /srv" in told


@pytest.mark.parametrize("columns", [80, 100, 130, 200])
def test_a_row_fits_a_terminal_and_its_figures_are_whole(columns: int) -> None:
    long = sandbox("A kernel with a long name" * 4, notebook=f"/srv/{'n' * 90}.ipynb")
    lines = text_of(long, columns=columns).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= columns for line in lines)
    assert "━━━━━───── 64 MiB" in lines[1]
    assert lines[1].endswith(" 3")
    assert "…" in lines[1]


def test_what_is_written_of_a_limit_of_the_disk_is_told_where_there_is_one() -> None:
    disk = Disk(used_bytes=3 * MIB, size_bytes=16 * MIB, inodes=7)
    assert "3 MiB of 16 MiB" in text_of(sandbox(disk=disk))
    assert "disk" not in text_of(sandbox())
    assert sandbox(disk=disk).as_json()["disk_inodes"] == 7


def test_what_is_shared_is_told_where_kernels_share_with_a_nursery() -> None:
    pages = Pages(private_bytes=5 * MIB, shared_bytes=7 * MIB, pss_bytes=6 * MIB)
    row = sandbox(nursery="abc", pages=pages)
    assert "5 MiB   7 MiB" in text_of(row)
    assert "private" not in text_of(sandbox(pages=pages))


@pytest.mark.parametrize(
    ("order", "first"), [("age", "b"), ("memory", "c"), ("cpu", "a"), ("name", "a")]
)
def test_each_order_has_its_own_first(order: str, first: str) -> None:
    found = [
        sandbox("b", used=2, cpu_percent=5.0),
        sandbox("c", used=3, cpu_percent=None),
        sandbox("a", used=None, cpu_percent=90.0),
    ]
    assert sorted(found, key=running._ORDERS[order])[0].record.name == first


def test_a_pipe_gets_whole_lines_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    listing.console().print(listing.drawn([sandbox("x" * 300)], 1 << 14))
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "x" * 300 in told


def test_the_page_tells_of_every_field() -> None:
    row = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    told = re.findall(r"`([^`]+)`", "".join(row))
    assert sorted(told) == sorted(json.loads(json.dumps(sandbox().as_json())))


def test_without_a_group_a_family_of_processes_is_counted() -> None:
    code = "import os, sys; os.fork(); sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdin and parent.stdout
        assert parent.stdout.read(2) == b".."
        family = running.family_of(parent.pid)
        pages = Pages.of(family)
        usage = running.counted(family, pages)
        parent.stdin.close()
    assert (len(family), family[0], usage.processes) == (2, parent.pid, 2)
    assert pages and usage.memory_bytes == pages.pss_bytes > MIB
    assert usage.cpu_seconds is not None and usage.cpu_seconds < 60
    assert running.counted([], None) == Usage()


# -- records of others


@contextmanager
def recorded(runtime: Path, **record: Any) -> Iterator[RecordFolder]:
    runtime.mkdir(exist_ok=True)
    made, _ = RecordFolder.create(runtime, Record(sandbox_id="abc", **record), ids=False)
    try:
        yield made
    finally:
        made.remove()


def test_root_does_not_follow_others_records_to_what_is_no_group(tmp_path: Path) -> None:
    """Reading from a FIFO would wait for ever."""
    group = tmp_path / "sandbox-provisioner/abc"
    group.mkdir(parents=True)
    os.mkfifo(group / "memory.current")
    for base in (str(tmp_path), f"/sys/fs/cgroup/../../..{tmp_path}"):
        with recorded(tmp_path / "run", cgroup_version=2, cgroup_bases={"memory": base}):
            assert look_at_others(1001, tmp_path / "run") == []


@pytest.mark.parametrize(
    "record",
    [
        {"started": -1e308},
        {"cgroup_version": 2, "group": "../x"},
        {"init_pid": 10**30},
        {"memory_limit_bytes": 10**400},
        {"cpu_cores": float("inf")},
    ],
)
def test_a_record_of_others_that_cannot_be_meant_is_not_shown(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    with recorded(tmp_path / "run", **record):
        assert look_at_others(1001, tmp_path / "run") == []
    with recorded(tmp_path / "run", name="R"):
        (found,) = look_at_others(1001, tmp_path / "run")
    assert (found.record.name, found.owner) == ("R", 1001)


def test_root_asks_no_file_system_that_a_record_of_others_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may never answer, and then this process would not even end."""
    asked: list[str] = []
    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or STATVFS)
    record = {"init_pid": os.getpid(), "init_start": start_time(os.getpid()), "storage": "tmpfs"}
    with recorded(tmp_path / "run", **record):
        (own,) = running.look(tmp_path / "run")
        assert own.disk and len(asked) == 1
        (found,) = look_at_others(1001, tmp_path / "run")
    assert (found.state, found.disk, len(asked)) == (own.state, None, 1)


def test_only_two_words_are_an_activity(tmp_path: Path) -> None:
    with recorded(tmp_path / "run") as folder:
        assert folder.read_activity() == ""
        folder.note_activity(busy=True)
        assert folder.read_activity() == BUSY
        (folder.path / "activity").write_text("\x1b[31mbusy")
        assert folder.read_activity() == ""
