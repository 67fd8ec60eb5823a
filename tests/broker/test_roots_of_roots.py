"""Other root file systems through the broker: whose directories and files it takes, and how."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import roots
import users
from brokers import OTHER, Broker, Refused, User

pytestmark = pytest.mark.requires(
    "userns", "root", "cgroup-memory", "setpriv", "public-python", "mksquashfs"
)
RELEASE = "print(open('/etc/os-release').readline())"
START = "kernel = Kernel(rootfs=root); answer = kernel(code)"
OWNERS = """
import json, os
told = {}
for name in ("own", "shared", "theirs", "roots"):
    try:
        told[name] = open(f"/srv/{name}").read()
    except OSError as error:
        told[name] = error.strerror
with open("/usr/lib/written", "w") as file:
    file.write("in the layer")
told["uid"] = [os.stat("/srv/own").st_uid, os.stat("/srv/roots").st_uid]
told["set-id"] = os.statvfs("/").f_flag & os.ST_NOSUID
print(json.dumps(told))
"""


@pytest.fixture
def named(broker: Broker) -> Iterator[Callable[[str], None]]:
    """Writes a policy that lets people have the roots of a line of TOML."""
    path = broker.home / "policy.toml"
    yield lambda line: path.write_text(f"[everyone.ceilings]\nrootfs = {line}\n") and None
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def own_root(kept_broker: Broker) -> Path:
    """A root that the user has unpacked, with files of others in it."""
    path = kept_broker.home / "own-root"
    shutil.copytree(roots.directory(), path, symlinks=True)
    subprocess.run(["chown", "-hR", f"{users.USER}:{users.USER}", path], check=True)
    (path / "srv").mkdir()
    for name, owner, mode in (
        ("own", users.USER, 0o600), ("shared", OTHER, 0o644), ("theirs", 1000, 0o600),
        ("roots", 0, 0o600),
    ):  # fmt: skip
        (path / "srv" / name).write_text(name)
        (path / "srv" / name).chmod(mode)
        os.chown(path / "srv" / name, owner, owner)
    return path


def test_a_kernel_has_a_directory_of_its_users_and_no_more_of_it_than_that_user(
    broker: Broker, user: User, own_root: Path
) -> None:
    """The kernel is uid 1000 of its box, and another person is uid 1000 of the machine."""
    told = json.loads(user(START, code=OWNERS, root=str(own_root)))
    assert told["own"] == "own"
    assert told["shared"] == "shared"
    assert told["theirs"] == told["roots"] == "Permission denied"
    assert told["uid"] == [1000, 65534]
    assert told["set-id"]
    assert not (own_root / "usr/lib/written").exists()
    assert user("answer = kernel.end()") == "exit"


def test_a_kernel_that_is_root_there_is_so_of_its_users_files_alone(
    broker: Broker, user: User, own_root: Path
) -> None:
    """Its capabilities count for files whose owner the box has."""
    start = "kernel = Kernel(rootfs=root, kernel_user='root'); answer = kernel(code)"
    told = json.loads(user(start, code=OWNERS, root=str(own_root)))
    assert told["own"] == "own"
    assert told["theirs"] == told["roots"] == "Permission denied"
    assert told["uid"] == [0, 65534]
    assert user("answer = kernel.end()") == "exit"


def test_what_somebody_else_owns_is_a_root_as_strangers_see_it(broker: Broker, user: User) -> None:
    assert user(START, code=RELEASE, root=str(roots.directory())) == "ID=tiny"
    who = "import os; print(os.stat('/usr').st_uid)"
    assert user("answer = kernel(code)", code=who) == "65534"
    assert user("answer = kernel.end()") == "exit"


def test_a_root_is_what_was_opened_wherever_it_is_moved(broker: Broker, user: User) -> None:
    """Its path is told by Linux, and what stands at the path that was said is not looked at."""
    root = broker.home / "work-of-others"
    root.mkdir()
    os.chown(root, users.USER, users.USER)
    ask = """
message = wish()
message["start"]["spec"]["rootfs"] = "/srv/of-the-policy"
answer = send(message, [*streams(), directory(), opened])
"""
    user("opened = directory(path)", path=str(root))
    told = user(ask)
    assert f"use {root} as the root file system" in told["error"]["attempt"]
    assert "neither a directory usr nor bin" in told["error"]["answer"]
    root.rename(broker.home / "moved")
    assert str(broker.home / "moved") in user(ask)["error"]["attempt"]
    (broker.home / "moved").rmdir()
    assert "No such file" in user(ask)["error"]["answer"]


def test_no_directory_is_a_root_that_is_the_hosts_or_closed_to_its_user(
    broker: Broker, user: User
) -> None:
    closed = broker.home / "closed"
    (closed / "usr").mkdir(parents=True)
    user("opened = directory(path)", path=str(closed / "usr"))
    closed.chmod(0o700)
    ask = """
message = wish()
message["start"]["spec"]["rootfs"] = "/root"
answer = send(message, [*streams(), directory(), fd])["error"]["answer"]
"""
    assert user("fd = opened\n" + ask) == "Permission denied"
    for path, answer in (
        ("/", "the root of the host"),
        ("/proc/self/root", "the root of the host"),
        ("/proc", "shows the host"),
        ("/sys", "shows the host"),
    ):
        assert answer in user("fd = directory(path)\n" + ask, path=path)
    assert "neither a directory nor a file" in user("fd = os.pipe()[0]\n" + ask)
    closed.chmod(0o755)


def test_no_name_makes_another_root_of_what_the_policy_names(
    broker: Broker, user: User, own_root: Path, named: Callable[[str], None]
) -> None:
    """Neither that of the root, nor that of the work directory, is where it is looked for."""
    allowed = str(roots.directory())
    named(f'["host", "{allowed}"]')
    said = """
message = wish()
message["start"]["spec"]["rootfs"] = allowed
told = send(message, [*streams(), directory(), directory(own)])
answer = [message["start"]["sandbox_id"], told]
"""
    name, told = user(said, allowed=allowed, own=str(own_root))
    user("send(dict(ask='close', sandbox_id=name), [])", name=name)
    assert "rootfs is host in place of" in told["warnings"][0]
    assert user(START, code=RELEASE, root=allowed) == "ID=tiny"
    who = "import os; print(os.stat('/usr').st_uid)"
    assert user("answer = kernel(code)", code=who) == "0"  # it is root's, and root says so
    assert user("answer = kernel.end()") == "exit"


def test_what_is_forced_is_not_what_a_work_directory_is_said_to_be(
    broker: Broker, user: User, named: Callable[[str], None]
) -> None:
    allowed = str(roots.directory())
    named('["host"]')
    policy = broker.home / "policy.toml"
    policy.write_text(f'[everyone.forced]\nrootfs = "{allowed}"\n')
    said = """
message = wish(cwd=allowed, argv=["cat", "/etc/os-release"])
message["start"]["spec"]["workdir"] = allowed
given, (shown, output) = streams(), os.pipe()
told = send(message, [given[0], output, output, directory()])
os.close(output)
# The broker answers before there is a root: what runs in it tells.
answer = [message["start"]["sandbox_id"], os.read(shown, 1000).decode(), told]
"""
    name, shown, told = user(said, allowed=allowed)
    user("send(dict(ask='close', sandbox_id=name), [])", name=name)
    assert shown.startswith("ID=tiny"), (shown, told)


def test_an_image_of_the_users_own_store_is_a_directory_to_the_broker(
    broker: Broker, user: User
) -> None:
    """Root mounts none of these, and looks for none."""
    local = broker.home / ".local"
    local.mkdir()
    os.chown(local, users.USER, users.USER)
    add = """
import shutil
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.images.store import store_of
store = store_of(Caller.this_process())
store.prepare()
with store.workplace() as work:
    shutil.copy(image, work / "image")
    store.add(work / "image", name="mine", origin="a test", python="/usr/bin/python3")
"""
    try:
        user(add, image=str(roots.image("squashfs")))
        assert user(START, code=RELEASE, root="mine") == "ID=tiny"
        who = "import os; print(os.stat('/usr').st_uid)"
        assert user("answer = kernel(code)", code=who) == "1000"
        assert user("answer = kernel.end()") == "exit"
        with pytest.raises(Refused, match="find the image 'theirs'"):
            user(START, code=RELEASE, root="theirs")
    finally:
        shutil.rmtree(local)


def test_a_kernel_has_an_image_file_that_the_policy_names(
    broker: Broker, user: User, named: Callable[[str], None]
) -> None:
    image = str(roots.image("squashfs"))
    named(f'["host", "{image}"]')
    for _ in range(2):
        assert user(START, code=RELEASE, root=image) == "ID=tiny"
        assert user("answer = kernel.end()") == "exit"
        assert len(roots.devices_of(Path(image))) == 1, "it stays mounted for the next start"


def test_beside_a_root_a_volume_shows_what_it_was_asked_for(broker: Broker, user: User) -> None:
    course = broker.home / "course"
    course.mkdir(exist_ok=True)
    (course / "lesson").write_text("the first")
    code = "print(open('/course/lesson').read(), open('/etc/os-release').readline())"
    start = "kernel = Kernel(rootfs=root, volumes=[course]); answer = kernel(code)"
    told = user(start, code=code, root=str(roots.directory()), course=f"{course}:/course")
    assert told == "the first ID=tiny"
    assert user("answer = kernel.end()") == "exit"


def test_no_file_is_mounted_that_nobody_of_roots_has_named(
    broker: Broker, user: User, named: Callable[[str], None]
) -> None:
    """That root owns it says nothing: a daemon of root's may have copied it for its user."""
    own = broker.home / "work/own.squashfs"
    secret = broker.home / "secret.squashfs"
    for path in (own, secret):
        shutil.copy(roots.image("squashfs"), path)
    os.chown(own, users.USER, users.USER)
    secret.chmod(0o600)
    try:
        for path, answer in (
            (own, "no policy names it"),
            (roots.image("squashfs"), "unsquashfs -d DIRECTORY"),
            (roots.image("ext4"), "no policy names it"),
            (secret, "Permission denied"),
            ("/etc/passwd", "no file system that can be a root"),
        ):
            with pytest.raises(Refused, match=answer):
                user(START, code=RELEASE, root=str(path))
        named(f'["host", "{own}"]')
        with pytest.raises(Refused, match="others than root may write to it"):
            user(START, code=RELEASE, root=str(own))
    finally:
        own.unlink()
        secret.unlink()


IMAGES = """
import contextlib, io, json, os
from pathlib import Path
from sandbox_provisioner.app.image import ImageApp
from sandbox_provisioner.images.store import store_of
from sandbox_provisioner.caller import Caller
os.environ["HOME"] = home + "/with-images"
store = store_of(Caller.this_process())
store.prepare()
old = store.path / ("blobs/sha256-" + "0" * 64)  # of an image that was built again
old.mkdir(exist_ok=True)
def removed(name):
    (store.path / "names" / (name + ".json")).write_text("{}")
    app = ImageApp(argv=[], config=None)
    app.initialize(["remove", name, f"--SandboxProvisioner.broker_socket={place['socket']}"])
    with contextlib.redirect_stdout(io.StringIO()):
        app.start()
    return old.exists()
"""


def test_what_a_kernel_of_the_brokers_may_have_as_its_root_stays_with_it(
    broker: Broker, user: User
) -> None:
    """Its records are not where those of this user's own kernels are."""
    (broker.home / "with-images").mkdir()
    os.chown(broker.home / "with-images", users.USER, users.USER)
    user("kernel = Kernel(); answer = kernel('print(1)')")
    user(IMAGES, home=str(broker.home))
    assert user("answer = removed('one')")
    user("kernel.end()")
    assert broker.nothing_is_left()
    assert not user("answer = removed('two')")
