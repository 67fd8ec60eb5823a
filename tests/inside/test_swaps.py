"""A directory that is swapped before or during a start: the box has the very one, or there is none.

What an earlier kernel can do in its work directory W, a thread or the test does from outside.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_provisioner import ledger
from sandbox_provisioner.errors import LaunchError, SandboxError, SpecError
from sandbox_provisioner.host import HostFacts, VolumeFacts
from sandbox_provisioner.spec import Volume

pytestmark = pytest.mark.requires("userns")

STARTS, MOST_STARTS = 40, 100
# renameat2(2) with RENAME_EXCHANGE: there is no moment at which neither is there.
SWAP = """
import ctypes, os, select, sys
renameat2 = ctypes.CDLL(None).renameat2
one, other = map(os.fsencode, sys.argv[1:])
stop = select.poll()
stop.register(0, select.POLLIN | select.POLLHUP)
print("swapping", flush=True)
while not stop.poll(0):
    for _ in range(1000):
        assert renameat2(-100, one, -100, other, 2) == 0
"""


def identity(path):
    import os

    status = os.stat(path)
    return [status.st_dev, status.st_ino]


@contextlib.contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Another process exchanges *one* and *other*, as fast as it can."""
    swapper = subprocess.Popen(
        [sys.executable, "-c", SWAP, one, other],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with swapper:
        assert swapper.stdout and swapper.stdout.readline() == b"swapping\n"
        yield
        assert swapper.poll() is None


@pytest.fixture
def victim(new_folder: Callable[[], Path]) -> Path:
    """Another person's home."""
    return new_folder()


def link_to(workdir: Path, target: Path | str) -> tuple[Path, Path]:
    """W/sub, and beside it a link that could take its place."""
    sub, link = workdir / "sub", workdir / "link"
    sub.mkdir()
    link.symlink_to(target)
    return sub, link


def exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@pytest.mark.parametrize(("target", "starts"), [("victim", STARTS), ("/etc", 10), ("/", 10)])
def test_what_is_swapped_all_the_time_is_the_right_one_or_no_start(
    sandbox, workdir, victim, target, starts
):
    sub, link = link_to(workdir, victim if target == "victim" else target)
    right = identity(sub)
    started = 0
    with swapping(sub, link):
        for tried in range(MOST_STARTS):
            if started and tried >= starts:
                break
            with contextlib.suppress(SandboxError):
                with sandbox(workdir=sub) as box:
                    assert box.call(identity, ".") == right
                    assert box.call(identity, str(sub)) == right
                    started += 1
    assert started


def test_a_swapped_source_of_a_volume_is_the_right_one_or_no_start(sandbox, workdir, new_folder):
    folder, victim = new_folder(), new_folder()
    sub, link = link_to(folder, victim)
    right = identity(sub)
    started = 0
    with swapping(sub, link):
        for tried in range(MOST_STARTS):
            if started and tried >= STARTS // 2:
                break
            volume = Volume(source=str(sub), target="/data")
            with contextlib.suppress(SandboxError):
                with sandbox(volumes=(volume,)) as box:
                    assert box.call(identity, "/data") == right
                    started += 1
    assert started


def test_of_500_looks_at_a_swapped_source_none_opens_what_the_link_leads_to(new_folder):
    """As each start looks; a plain open(2) follows the link, which is the control."""
    folder, victim = new_folder(), new_folder()
    sub, link = link_to(folder, victim)
    right, led = tuple(identity(sub)), tuple(identity(victim))
    volume, facts = Volume(source=str(sub), target="/data"), HostFacts.probe()
    plain, ours = set(), set()
    with swapping(sub, link):
        for _ in range(500):
            with contextlib.suppress(SpecError), contextlib.ExitStack() as opened:
                place = VolumeFacts.probe(volume, facts, opened).place
                ours.add((place.device, place.inode))
        while plain != {right, led}:
            with contextlib.suppress(OSError):
                plain.add(tuple(identity(sub)))
    assert ours == {right}


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_link_in_the_place_of_a_directory_is_refused_with_where_it_leads(
    sandbox, workdir, victim, below
):
    (victim / "below").mkdir()
    sub, link = link_to(workdir, victim)
    exchange(sub, link)
    with pytest.raises(SpecError, match=rf"sub' is a symbolic link to '{victim}'.*the real path"):
        with sandbox(workdir=f"{sub}{below}"):
            pass
    volume = Volume(source=f"{sub}{below}", target="/data")
    with pytest.raises(SpecError, match=rf"volume.*symbolic link to '{victim}'"):
        with sandbox(volumes=(volume,)):
            pass


@pytest.mark.parametrize("what", ["workdir", "volume"])
def test_what_is_swapped_after_it_was_judged_is_still_what_was_judged(
    sandbox, workdir, victim, monkeypatch, what
):
    """Where Linux lets one mount it by its descriptor; else it is found by name, and compared."""
    sub, link = link_to(workdir, victim)
    right, make_record = identity(sub), ledger.Ledger.make_record

    def swapped(start, site):
        exchange(sub, link)
        return make_record(start, site)

    monkeypatch.setattr(ledger.Ledger, "make_record", swapped)
    if what == "workdir":
        options, inside = {"workdir": sub}, str(sub)
    else:
        options, inside = {"volumes": (Volume(source=str(sub), target="/data"),)}, "/data"
    if HostFacts.probe().privileged:
        with sandbox(**options) as box:
            assert box.call(identity, inside) == right
    else:
        with pytest.raises(LaunchError, match=r"\[find-again .*Start again"):
            with sandbox(**options):
                pass


def test_another_directory_in_the_place_of_one_that_was_judged_is_not_given(
    sandbox, workdir, monkeypatch
):
    """No link: what an ordinary user's launcher finds again is compared, not only looked for."""
    sub, other = workdir / "sub", workdir / "other"
    sub.mkdir()
    other.mkdir()
    right, make_record = identity(sub), ledger.Ledger.make_record

    def swapped(start, site):
        exchange(sub, other)
        return make_record(start, site)

    monkeypatch.setattr(ledger.Ledger, "make_record", swapped)
    with contextlib.suppress(LaunchError), sandbox(workdir=sub) as box:
        assert box.call(identity, ".") == right


@pytest.mark.parametrize("what", ["workdir", "volume"])
def test_what_vanishes_during_a_start_is_told_or_an_empty_directory(
    sandbox, workdir, monkeypatch, what
):
    sub, make_record = workdir / "sub", ledger.Ledger.make_record
    sub.mkdir()

    def vanished(start, site):
        sub.rmdir()
        return make_record(start, site)

    monkeypatch.setattr(ledger.Ledger, "make_record", vanished)
    volumes = (Volume(source=str(sub), target="/data"),)
    options = {"workdir": sub} if what == "workdir" else {"volumes": volumes}
    with contextlib.suppress(SandboxError), sandbox(**options) as box:
        assert box.call(os.listdir, "." if what == "workdir" else "/data") == []


def test_a_home_behind_a_link_is_used_and_left_as_it_was(
    sandbox, workdir, new_folder, monkeypatch, runtime_dir
):
    """The link is in the host's /tmp, where no kernel can put one; it shows inside by its name."""

    def look():
        import os

        open("made", "w").close()
        return os.getcwd(), os.environ["HOME"], os.listdir(".ssh")

    home = new_folder()
    home.rmdir()
    home.symlink_to(workdir)
    monkeypatch.setenv("HOME", str(home))
    try:
        with sandbox(workdir=home) as box:
            assert box.call(look) == [str(home), str(home), []]
        assert os.listdir(workdir) == ["made"]
    finally:
        home.unlink()


def test_the_end_of_a_box_leaves_alone_what_stands_at_its_path_then(sandbox, workdir, victim):
    for repository in (workdir / "sub/.git", victim / ".git"):
        repository.mkdir(parents=True)
    with sandbox(workdir=workdir / "sub") as box:
        made = [path for _, path in box.handle.record.made]
        assert made
        for path in made:
            kind = os.mkdir if os.path.isdir(path) else lambda name: open(name, "w").close()
            kind(path.replace(f"{workdir}/sub", str(victim)))
        (workdir / "sub").rename(workdir / "moved")
        (workdir / "sub").symlink_to(victim)
    left = [path.replace(f"{workdir}/sub", str(victim)) for path in made]
    assert all(os.path.lexists(path) for path in left)
    (workdir / "sub").unlink()
