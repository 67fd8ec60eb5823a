"""How long the file of a root stays mounted, and that a start gets what is there now."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import roots
from boxes import Boxes

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.facilities.root.facts import RootFacts
from sandbox_provisioner.facilities.root.facts.kept import drop_kept
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.launch import LocalLauncher

pytestmark = pytest.mark.requires("root", "mksquashfs")
_LONG_SECONDS = 3600.0


@pytest.fixture(autouse=True)
def _dropped():
    yield
    drop_kept()


@pytest.fixture
def image(new_image):
    """A file of a root that says "first"."""
    return new_image("first")


@pytest.fixture
def new_image():
    """Makes the file of a tiny root in which a *text* is."""
    folder = roots.folder() / "kept"
    (folder / "root/usr").mkdir(parents=True)

    def make(text, name="image.squashfs"):
        (folder / "root/text").write_text(text)
        (folder / name).unlink(missing_ok=True)  # mksquashfs(1) would add to it
        return roots.make_image(folder / "root", folder / name, "squashfs")

    yield make
    shutil.rmtree(folder)


def _are_left(count):
    return roots.is_let_go_of(roots.folder() / "kept", count)


def _devices():
    return roots.devices_of(roots.folder() / "kept")


def text_of(path, seconds=_LONG_SECONDS):
    """What a start over the image *path* finds in it; its kernel ends at once."""
    facts = HostFacts.probe((), Caller.this_process())
    with ExitStack() as opened:
        root = RootFacts.probe(str(path), facts, opened).mounted(opened, seconds)
        return root.files.text("text")


def test_the_image_of_fifty_starts_has_one_device_which_stays(image):
    assert text_of(image) == "first"
    before = _devices()
    assert len(before) == 1
    assert {text_of(image) for _ in range(50)} == {"first"}
    assert _devices() == before
    drop_kept()
    assert _are_left(0)


def imported():
    import email.message

    return email.message.__name__


def test_what_a_box_has_read_is_there_for_the_next_one(runtime_dir, workdir):
    path = roots.folder() / "kept/root.squashfs"
    path.parent.mkdir()
    shutil.copy(roots.image("squashfs"), path)
    launcher = LocalLauncher(runtime_dir=str(runtime_dir), keep_seconds=_LONG_SECONDS)
    sandbox = Boxes(launcher, workdir)
    try:
        read = []
        for _ in range(2):
            with sandbox(rootfs=str(path)) as box:
                assert box.call(imported) == "email.message"
            (device,) = _devices()
            # Documentation/block/stat.rst: the third is how many sectors were read.
            read.append(int(Path(f"/sys/block/{device}/stat").read_text().split()[2]))
        drop_kept()
        assert _are_left(0)
    finally:
        shutil.rmtree(path.parent)
    first = read[0]
    assert read[1] - first < 2048, "a MiB: of its Python alone there is more"


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_a_start_gets_what_is_there_now(image, new_image, how):
    assert text_of(image) == "first"
    other = new_image("other", "other.squashfs")
    if how == "replaced":
        other.rename(image)
    else:
        image.write_bytes(other.read_bytes())
    assert text_of(image) == "other"
    assert _are_left(1)


def test_what_was_removed_is_let_go_of_by_the_next_start(image, new_image):
    assert text_of(image) == "first"
    image.unlink()
    assert text_of(new_image("other", "other.squashfs")) == "other"
    assert _are_left(1)


def test_when_no_start_comes_it_is_let_go_of(image):
    assert text_of(image, 0.05) == "first"
    assert _are_left(0)


def test_who_starts_one_box_keeps_nothing(image):
    assert text_of(image, 0.0) == "first"
    assert _are_left(0)


def test_of_many_images_the_last_ones_stay(new_image):
    for number in range(6):
        image = new_image(str(number), f"{number}.squashfs")
        assert text_of(image) == str(number)
    assert _are_left(4)
    there = [bool(roots.devices_of(image.with_name(f"{n}.squashfs"))) for n in range(6)]
    assert there == [False, False, True, True, True, True]


def test_a_child_that_was_forked_has_none_of_it(image):
    assert text_of(image) == "first"
    ready, told = os.pipe()
    held, release = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(release)
            os.write(told, b"x")
            os.read(held, 1)
        finally:
            os._exit(0)
    try:
        os.read(ready, 1)
        drop_kept()
        assert _are_left(0)
    finally:
        for fd in (ready, told, held, release):
            os.close(fd)
        os.waitpid(child, 0)


def test_the_end_of_a_process_leaves_none(image):
    child = os.fork()
    if child == 0:
        text_of(image)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert _are_left(0)
