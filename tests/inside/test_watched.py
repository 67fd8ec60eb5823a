"""Attempted escapes: through what PID 1 cannot see, since too much happens, or since Linux gives it
no way to watch."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path

import pytest
from test_covers import mended, replace

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns")


@pytest.fixture
def home(workdir, monkeypatch):
    """A home directory, which is also the work directory, with something to be covered."""
    monkeypatch.setenv("HOME", str(workdir))
    (workdir / ".bashrc").write_text("old")
    (workdir / ".bashrc").chmod(0o644)
    return workdir


def make_files(count):
    """So many, one after the other, beside what is covered."""
    import os

    for number in range(count):
        with open(f"made{number}", "w"):
            pass
        os.unlink(f"made{number}")


def read_file(name):
    return open(name).read()


def write_to(name):
    open(name, "a").close()


# Making and removing a file is at least three events: made, opened, removed.
MORE_THAN_LINUX_KEEPS = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 3 + 100
MORE_THAN_WE_KEEP = 3000


def test_a_kernel_of_which_we_have_missed_something_ends_if_a_file_is_bare(home, sandbox):
    with sandbox() as box:
        os.kill(box.handle.pid, signal.SIGSTOP)
        box.call(make_files, MORE_THAN_LINUX_KEEPS)
        replace(home / ".bashrc", "mine")
        assert box.call(read_file, ".bashrc") == "mine"
        os.kill(box.handle.pid, signal.SIGCONT)
        story = box.wait()
        assert story.kind is EndKind.COVER_LOST
        assert story.lost_path == ".bashrc"


def test_a_kernel_that_has_made_more_files_than_can_be_told_is_still_watched(home, sandbox):
    def keep_for_later():
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])

    def wait_until_all_go_on():
        import signal

        signal.sigwait([signal.SIGCONT])

    with sandbox() as box:
        os.kill(box.handle.pid, signal.SIGSTOP)
        box.call(make_files, MORE_THAN_LINUX_KEEPS)
        box.call(keep_for_later)
        os.kill(box.handle.pid, signal.SIGCONT)
        box.call(wait_until_all_go_on)
        replace(home / ".bashrc", "mine")
        mended(box, home / ".bashrc")
        assert box.handle.poll() is None


def test_a_kernel_cannot_make_us_forget_what_it_has_done_to_a_file(home, sandbox):
    new = home / ".bashrc.new"
    with sandbox() as box:
        new.write_text("mine")
        new.chmod(0o666)
        box.call(write_to, ".bashrc.new")
        box.call(make_files, MORE_THAN_WE_KEEP)
        new.replace(home / ".bashrc")
        story = box.wait()
        assert story.kind is EndKind.COVER_LOST
        assert story.lost_path == ".bashrc"


def test_a_file_that_replaces_one_of_two_was_not_forgotten_when_the_other_was_covered(
    home, sandbox
):
    """As a program does that writes all new files first, and renames them then."""
    (home / ".profile").write_text("old")
    new = home / ".bashrc.new"
    with sandbox() as box:
        new.write_text("mine")
        box.call(write_to, ".bashrc.new")
        replace(home / ".profile", "mine")
        mended(box, home / ".profile")
        new.replace(home / ".bashrc")
        story = box.wait()
        assert story.kind is EndKind.COVER_LOST
        assert story.lost_path == ".bashrc"


def test_the_same_file_may_be_replaced_as_often_as_a_program_outside_likes(home, sandbox):
    with sandbox() as box:
        for text in ("one", "two", "three"):
            replace(home / ".bashrc", text)
            mended(box, home / ".bashrc")
        assert box.handle.poll() is None


@pytest.mark.ordinary_user
def test_a_start_for_which_linux_has_no_watch_left_says_which_setting_to_raise(home, sandbox):
    """A root server's kernels are each counted for a user of their own."""
    libc, taken = ctypes.CDLL(None, use_errno=True), []
    try:
        while (fd := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
            taken.append(fd)
        assert ctypes.get_errno() == errno.EMFILE
        with pytest.raises(LaunchError, match=r"fs\.inotify\.max_user_instances"), sandbox():
            pass
    finally:
        for fd in taken:
            os.close(fd)
    assert sorted(os.listdir(home)) == [".bashrc"]
