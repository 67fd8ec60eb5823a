"""What failed is told by its place, and a mistake of ours as one: by all who can come upon it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandbox_provisioner import app
from sandbox_provisioner.errors import HostError, InternalError, LaunchError, told_as_internal_error
from sandbox_provisioner.facilities.workdir.inside import covers
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.printable import with_place
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.launcher import enter, init
from sandbox_provisioner.story import ExitFile, ExitStory, with_reason
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.warm import ahead

# -- what failed


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: kernel_calls.unshare(3), "unshare(flags=0x3) "),
        (lambda: kernel_calls.setns(0, kernel_calls.CLONE_NEWUSER), "kind=CLONE_NEWUSER) "),
        (
            lambda: kernel_calls.mount_setattr(-1, add=3, propagation=kernel_calls.MS_PRIVATE),
            "add=MOUNT_RDONLY|MOUNT_NOSUID, propagation=MS_PRIVATE) ",
        ),
        (
            lambda: kernel_calls.openat2(-1, "x", os.O_PATH | os.O_NOFOLLOW, 8),
            "path='x', flags=O_PATH|O_NOFOLLOW, resolve=RESOLVE_BENEATH) ",
        ),
        (
            lambda: kernel_calls.landlock_allow(-1, "/x", -1, 0b1001),
            "path='/x', access=EXECUTE|READ_DIR) ",
        ),
        (lambda: kernel_calls.move_mount(-1, -1), "source=descriptor -1, target=descriptor -1) "),
        (
            lambda: kernel_calls.move_mount(-1, -1, source="/a", target="/b"),
            "source='/a', target='/b') ",
        ),
        (lambda: kernel_calls.open_tree("", dir_fd=-2), "path=descriptor -2) "),
    ],
)
def test_a_call_that_failed_names_its_flags_and_its_places(call, told):
    with pytest.raises(kernel_calls.CallFailed) as caught:
        call()
    assert told in str(caught.value)


def test_a_descriptor_is_named_by_what_it_is_open_on(tmp_path):
    fd = os.open(tmp_path, os.O_PATH)
    with pytest.raises(kernel_calls.CallFailed, match=f"target='{tmp_path}'"):
        kernel_calls.move_mount(-1, fd)
    os.close(fd)


def test_of_many_covers_the_one_that_failed_is_named(tmp_path):
    def act(kind, path):
        if path == "b":
            os.mkdir(tmp_path)

    found = covers.Covers(-1, str(tmp_path), 0, 0, lambda kind, path: None)
    os.close(found.events)
    with pytest.raises(OSError, match="act directory b: File exists") as caught:
        found.each([(act, "directory", path) for path in "abc"])
    assert caught.value.errno == errno.EEXIST


def test_the_places_of_a_step_are_told_to_a_program_and_to_a_person():
    error = LaunchError(attempt="a", answer="b", remedy="c.", step="attach", places="/data")
    assert str(error) == "Could not a: [attach /data] b. c."
    assert error.for_people().splitlines()[1] == "attach /data: b."


# -- a mistake of ours


def fail():
    raise KeyError("no such thing")


def test_an_unexpected_error_tells_where_it_came_from_and_whom_to_tell():
    with pytest.raises(InternalError) as caught, told_as_internal_error("try it"):
        fail()
    told = str(caught.value)
    assert told.startswith("Could not try it: KeyError: 'no such thing' (at ")
    assert f"test_failures.py:{fail.__code__.co_firstlineno + 1})" in told
    assert "project's page" in told
    assert "jupyter sandbox doctor --json" in told


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(5, "x"), OSError),
        (asyncio.CancelledError(), asyncio.CancelledError),
        (InternalError(attempt="a", answer="b"), InternalError),
        (MemoryError(), HostError),
        (RuntimeError("can't start new thread"), HostError),
        (RuntimeError("anything else"), InternalError),
        (ValueError(), ValueError),
    ],
)
def test_what_is_no_mistake_of_ours_is_not_told_as_one(raised, expected):
    with pytest.raises(expected) as caught, told_as_internal_error("a", but=(ValueError,)):
        raise raised
    assert type(caught.value) is expected


def test_the_places_of_an_error_are_the_last_ones():
    def deeper(levels):
        return deeper(levels - 1) if levels else fail()

    with pytest.raises(KeyError) as caught:
        deeper(20)
    assert with_place(caught.value).count(" > ") < 10


def exit_file_of(tmp_path: Path, error: BaseException) -> ExitFile:
    """What PID 1 leaves that comes upon *error* when it sets itself up."""
    path = tmp_path / "exit"
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            box = Box(-1, -1)
            box.namespaces = False
            box.named["exit-file"] = [os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)]

            def raise_it(*_):
                raise error

            init._Init = raise_it
            init.run(box, os.getpid())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 125
    return ExitFile.of(path.read_bytes())


def test_who_has_nobody_to_report_to_leaves_it_in_the_exit_file(tmp_path):
    """PID 1 of a spare, which nobody has claimed."""
    box = Box(-1, -1)
    box.named["exit-file"] = [os.open(tmp_path / "exit", os.O_WRONLY | os.O_CREAT, 0o600)]
    enter._tell_failure(box, "3", "stay-unclaimed", KeyError("x"))
    os.close(box.exit_fd)
    told = ExitFile.of((tmp_path / "exit").read_bytes())
    assert (told.kind, told.text) == (EndKind.INTERNAL_ERROR, "KeyError: 'x'")


def test_a_mistake_in_pid_1_is_told_under_the_cell(tmp_path):
    told = exit_file_of(tmp_path, KeyError("x"))
    assert told.kind is EndKind.INTERNAL_ERROR
    assert told.text.startswith("KeyError: 'x' (at launcher/init.py:")
    story = ExitStory(kind=told.kind, code=told.code, mistake=told.text)
    reason = with_reason(story, "0123abcd").reason
    assert "a mistake in sandbox-provisioner: KeyError: 'x' (at launcher/init.py:" in reason


def test_what_the_machine_refuses_pid_1_is_no_mistake_of_ours(tmp_path):
    told = exit_file_of(tmp_path, OSError(errno.ENOSPC, "no room"))
    assert told.kind is EndKind.EXIT
    assert b"no room" in told.tail


def test_a_mistake_while_the_next_start_is_prepared_is_warned_of(monkeypatch):
    warned = []
    launcher = LocalLauncher(warn=warned.append)
    named = SimpleNamespace(argv=("python",), name="Python", owner="")
    wishes = iter([(launcher, named, named, named), None])

    async def prepare(*_):
        fail()

    for name, fake in (("_next", lambda: next(wishes)), ("bury", lambda: None),
                       ("_prepare", prepare), ("_failed", {})):  # fmt: skip
        monkeypatch.setattr(ahead, name, fake)
    ahead._work()
    (told,) = warned
    assert "Could not prepare a start: KeyError: 'no such thing' (at " in told
    assert "a mistake in sandbox-provisioner" in told


def test_a_command_that_comes_upon_a_mistake_of_ours_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jupyter-sandbox", "list"])
    monkeypatch.setattr(app.SandboxApp, "launch_instance", fail)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "Could not do what `jupyter sandbox list` asks for" in told
    assert "project's page" in told
