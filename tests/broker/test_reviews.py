"""Work directories that are reviewed, through the broker: root keeps what a user decides about."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import users
from brokers import Broker, Refused, User

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python")

START = "kernel = Kernel(workdir_mode='review'); answer = kernel(code)"
COMMANDS = """
import contextlib, io
from sandbox_provisioner.app import review
def told(which, *words):
    app = getattr(review, which)(argv=[], config=None)
    app.initialize([*words, f"--SandboxProvisioner.broker_socket={place['socket']}"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            app.start()
        except SystemExit:
            pass
    return out.getvalue()
"""
WRITE = """
import os
open("new", "w").write("by the kernel")
open("changed", "a").write(", and more")
os.remove("gone")
os.mkdir("folder")
open("folder/deep", "w").write("deep")
os.symlink("/etc/passwd", "link")
"""


@pytest.fixture
def work(broker: Broker) -> Iterator[Path]:
    """A work directory with files of the user's, which is empty again afterwards."""
    folder = broker.home / "work"
    for name in ("changed", "gone"):
        (folder / name).write_text(name)
        os.chown(folder / name, users.USER, users.USER)
    yield folder
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(broker.layers / "people", ignore_errors=True)


@pytest.fixture
def decider(user: User) -> User:
    """The user, with the commands `diff`, `keep` and `discard` at hand."""
    user(COMMANDS)
    return user


def after(user: User, code: str = WRITE) -> str:
    """What the kernel of *user* has left that ran *code*: its id."""
    user(START, code=code)
    user("kept = kernel.manager.provisioner.sandbox_id; answer = kernel.end()")
    return str(user("answer = kept"))


def folder_of(broker: Broker, name: str) -> Path:
    return broker.layers / "people" / str(users.USER) / "review" / name


def test_what_a_kernel_writes_is_kept_with_its_users_rights(
    broker: Broker, decider: User, work: Path
) -> None:
    name = after(decider)
    assert sorted(os.listdir(work)) == ["changed", "gone"]
    folder = folder_of(broker, name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == 0
    listed = json.loads(decider("answer = told('DiffApp', '--json')"))
    assert [one["sandbox_id"] for one in listed] == [name]
    shown = json.loads(decider("answer = told('DiffApp', name, '--json')", name=name))
    assert {one["path"]: one["what"] for one in shown["changes"]} == {
        "changed": "changed", "folder": "added", "folder/deep": "added", "gone": "removed",
        "link": "added", "new": "added",
    }  # fmt: skip
    assert "Kept 1 change " in decider("answer = told('KeepApp', name, 'new')", name=name)
    assert (work / "new").read_text() == "by the kernel"
    assert (work / "gone").exists()
    assert "Kept 5 changes" in decider("answer = told('KeepApp', name)", name=name)
    assert sorted(os.listdir(work)) == ["changed", "folder", "link", "new"]
    assert (work / "changed").read_text() == "changed, and more"
    assert {path.lstat().st_uid for path in work.rglob("*")} == {users.USER}
    assert not folder.exists()
    assert "No kernel's changes" in decider("answer = told('DiffApp')")


def test_what_nobody_wants_is_discarded_and_what_has_not_changed_is_no_question(
    broker: Broker, decider: User, work: Path
) -> None:
    name = after(decider)
    assert folder_of(broker, name).exists()
    assert "Discarded" in decider("answer = told('DiscardApp', name)", name=name)
    assert not folder_of(broker, name).exists()
    assert sorted(os.listdir(work)) == ["changed", "gone"]
    same = "text = open('changed').read(); open('changed', 'w').write(text)"
    assert not folder_of(broker, after(decider, same)).exists()


def test_undecided_changes_outlive_restarts_of_kernel_and_broker(
    own_broker: Broker, own_user: User
) -> None:
    own_user(COMMANDS)
    own_user(START, code="open('first', 'w').close()")
    own_user("kernel.restart()")
    own_user("answer = kernel('import os; assert os.path.exists(\"first\")')")
    name = own_user("answer = kernel.manager.provisioner.sandbox_id")
    with pytest.raises(Refused, match="it runs, or another command"):
        own_user("answer = told('KeepApp', name)", name=name)
    assert "first" in own_user("answer = told('DiffApp', name)", name=name)  # while it runs
    own_broker.kill()
    own_broker.start()
    assert own_user("answer = kernel.end()") == "exit"
    own_broker.kill()
    own_broker.start()
    assert "Kept 1 change" in own_user("answer = told('KeepApp', name)", name=name)
    assert (own_broker.home / "work/first").exists()
    assert not folder_of(own_broker, name).exists()


def test_nobody_decides_about_another_users_kernel(
    broker: Broker, decider: User, other: User, work: Path
) -> None:
    """An id is known to everybody, by the names of control groups."""
    name = after(decider)
    other(COMMANDS)
    assert "No kernel's changes" in other("answer = told('DiffApp')")
    for ask in ("review-about", "review-upper", "review-take", "discard"):
        told = other("answer = send(dict(ask=ask, sandbox_id=name), [])", ask=ask, name=name)
        assert "no such kernel of this user" in told["error"]["answer"]
    assert folder_of(broker, name).exists()
    for ask in ("../review", "review-upper"):
        told = decider("answer = send(dict(ask=ask, sandbox_id='../../../x'), [])", ask=ask)
        assert "cannot be meant" in told["error"]["answer"]
    decider("answer = told('DiscardApp', name)", name=name)


def test_nothing_is_moved_into_what_root_removes_nor_out_of_it(
    broker: Broker, decider: User, work: Path
) -> None:
    """What somebody has open as the upper directory is a mount of its own."""
    name = after(decider)
    theirs = work / "mine"
    theirs.mkdir()
    (theirs / "of-root").mkdir()
    (theirs / "of-root/file").touch()
    os.chown(theirs, users.USER, users.USER)
    ask = """
import errno, os
from sandbox_provisioner.broker.kept_through import reviews_through
[(folder, about)] = reviews_through(place["socket"])
upper = folder.open_upper()
answer = []
for act in (
    lambda: os.rename(theirs, "taken", dst_dir_fd=upper),
    lambda: os.rename("folder", theirs + "/taken", src_dir_fd=upper),
    lambda: os.link(theirs + "/../changed", "linked", dst_dir_fd=upper),
    lambda: os.open("../about.json", os.O_RDONLY, dir_fd=upper),
    lambda: os.listdir(os.open("..", os.O_RDONLY, dir_fd=upper)),
):
    try:
        answer.append(act())
    except OSError as error:
        answer.append(errno.errorcode[error.errno])
answer.append(os.fstatvfs(upper).f_flag & (os.ST_NOSUID | os.ST_NODEV))
os.close(upper)
"""
    *outcomes, flags = decider(ask, theirs=str(theirs))
    assert outcomes[:4] == ["EXDEV", "EXDEV", "EXDEV", "ENOENT"]
    assert sorted(outcomes[4]) == ["changed", "folder", "gone", "link", "new"]
    assert flags == os.ST_NOSUID | os.ST_NODEV
    decider("answer = told('DiscardApp', name)", name=name)
    assert (theirs / "of-root/file").exists()


def test_a_lock_is_handed_out_to_be_held_and_not_to_be_written(
    broker: Broker, decider: User, work: Path
) -> None:
    name = after(decider)
    ask = """
import errno, os
from sandbox_provisioner.broker.kept_through import reviews_through
[(folder, about)] = reviews_through(place["socket"])
answer = [folder.take()]
for act in (lambda: os.write(folder._lock, b"x"), lambda: os.fchmod(folder._lock, 0o666)):
    try:
        answer.append(act())
    except OSError as error:
        answer.append(errno.errorcode[error.errno])
answer.append(reviews_through(place["socket"])[0][0].take())
"""
    assert decider(ask) == [True, "EBADF", "EPERM", False]
    told = decider("answer = send(dict(ask='discard', sandbox_id=name), [])", name=name)
    assert "another command decides" in told["error"]["answer"]
    decider("folder.forget()")
    assert "Discarded" in decider("answer = told('DiscardApp', name)", name=name)


def test_what_a_hostile_kernel_leaves_leads_keep_nowhere(
    broker: Broker, decider: User, work: Path
) -> None:
    """Links in place of folders, marks of an overlay's own, and what nobody may read."""
    (work / "folder").mkdir()
    (work / "folder/inner").write_text("the user's")
    os.chown(work / "folder", users.USER, users.USER)
    os.chown(work / "folder/inner", users.USER, users.USER)
    code = """
import os, shutil
shutil.rmtree("folder")
os.symlink("/etc", "folder")
os.mkdir("closed"); open("closed/in", "w").close(); os.chmod("closed", 0)
os.mkfifo("fifo")
open("set-id", "w").close()
for mode in (0o4755, 0o755):
    try:
        os.chmod("set-id", mode)
        break
    except OSError:
        pass
open("marked", "w").close()
for name in ("user.overlay.opaque", "user.overlay.redirect", "user.overlay.whiteout"):
    try:
        os.setxattr("marked", name, b"y")
    except OSError:
        pass
os.makedirs("repository/.git/hooks")
open("repository/.git/hooks/pre-commit", "w").write("#!/bin/sh")
"""
    name = after(decider, code)
    told = decider("answer = told('KeepApp', name)", name=name)
    assert (work / "folder").is_symlink()
    assert "fifo: a fifo is never kept" in told
    assert "git would run what it says" in told
    assert not (work / "fifo").exists()
    assert not (work / "repository/.git/hooks/pre-commit").exists()
    assert not (work / "set-id").stat().st_mode & stat.S_ISUID
    assert os.listxattr(work / "marked") == []
    decider("answer = told('DiscardApp', name)", name=name)
    assert not folder_of(broker, name).exists()


def test_a_user_decides_before_many_more_are_laid_aside(
    broker: Broker, decider: User, work: Path
) -> None:
    review = folder_of(broker, "")
    review.mkdir(parents=True, exist_ok=True)
    for number in range(64):
        (review / f"{number:012x}").mkdir()
        (review / f"{number:012x}/about.json").write_text("{}")
        (review / f"{number:012x}/lock").touch()
    with pytest.raises(Refused, match="64 kernels of this user wait for a decision"):
        decider(START, code="0")
    shutil.rmtree(review)
    assert not folder_of(broker, after(decider, "0")).exists()


def test_a_policy_may_have_everybody_decide(broker: Broker, decider: User, work: Path) -> None:
    policy = broker.home / "policy.toml"
    policy.write_text('[everyone.forced]\nworkdir_mode = "review"\n')
    try:
        decider("kernel = Kernel(); answer = kernel(code)", code=WRITE)
        decider("answer = kernel.end()")
    finally:
        policy.unlink()
    assert sorted(os.listdir(work)) == ["changed", "gone"]
    [one] = json.loads(decider("answer = told('DiffApp', '--json')"))
    assert "Discarded" in decider("answer = told('DiscardApp', name)", name=one["sandbox_id"])
