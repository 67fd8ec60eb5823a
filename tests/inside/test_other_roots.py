"""What a program sees whose root file system is not the host's, and what a root cannot do to us."""

from __future__ import annotations

import itertools
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import roots
from boxes import request_for, run
from facilities import MUST_WORK, missing
from users import as_user

from sandbox_provisioner.errors import HostError, LaunchError, SpecError
from sandbox_provisioner.facilities.root.facts import loop
from sandbox_provisioner.spec import Layer, Volume

pytestmark = pytest.mark.requires("userns")
_RANGE = pytest.mark.requires("newuidmap")
KINDS = ("directory", "squashfs", "erofs", "ext4")
_NEEDS = {"squashfs": "mksquashfs", "erofs": "mkfs.erofs", "ext4": "mkfs.ext4"}


@pytest.fixture(params=KINDS)
def root(request):
    """The small root in each of its forms; those that are files for root alone."""
    return _root(request.param)


def _root(kind):
    if kind == "directory":
        return str(roots.directory())
    for need in ("root", _NEEDS[kind]):
        if reason := missing(need):
            told = f"requires {need}: {reason}"
            pytest.fail(told) if os.environ.get(MUST_WORK) == "1" else pytest.skip(told)
    return str(roots.image(kind))


def look():
    import os
    import sys

    entries = {path: sorted(os.listdir(path)) for path in ("/", "/dev", "/etc", "/usr/bin")}
    at_root = [line.split() for line in open("/proc/mounts") if line.split()[1] == "/"]
    return {
        "entries": entries,
        "python": [sys.executable, sys.prefix, *sys.path],
        "release": open("/etc/os-release").read(),
        "users": open("/etc/passwd").read(),
        "variables": dict(os.environ),
        "root": at_root[-1],
        "owners": [os.stat(path).st_uid for path in ("/", "/etc", "/usr/bin/python3")],
        "ids": [os.getuid(), os.geteuid()],
    }


def attempts(*paths):
    """What comes of writing to each: "" if that works."""
    found = {}
    for path in paths:
        try:
            open(path, "w").write("x")
            found[path] = ""
        except OSError as error:
            found[path] = error.strerror
    return found


def test_a_program_sees_the_other_root_and_nothing_of_the_hosts(root, run_inside, workdir):
    answer = run_inside(look, rootfs=root)
    assert "ID=tiny" in answer["release"]
    assert answer["python"][:2] == [roots.PYTHON, "/usr"]
    programs = set(os.listdir(roots.directory() / "usr/bin"))
    assert set(answer["entries"]["/usr/bin"]) == programs
    expected = set(os.listdir(roots.directory())) | {"home", "var", workdir.parts[1]}
    assert set(answer["entries"]["/"]) - {"lost+found"} == expected
    assert set(answer["entries"]["/dev"]) == {
        "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    }  # fmt: skip
    hosts = (sys.prefix, sys.base_prefix, str(Path(root).parent))
    told = repr((answer["python"], answer["variables"], answer["root"]))
    assert not [path for path in hosts if path != "/usr" and path in told]
    assert answer["variables"]["PATH"].split(":")[-2:] == ["/usr/bin", "/bin"]


def test_its_topmost_mount_lets_nobody_use_devices_or_gain_rights(root, run_inside):
    _, _, filesystem, options, *_ = run_inside(look, rootfs=root)["root"]
    assert filesystem == "overlay"
    assert {"nosuid", "nodev"} <= set(options.split(","))


def test_without_a_layer_nothing_but_what_is_in_memory_can_be_written(root, run_inside):
    found = run_inside(attempts, "/usr/x", "/etc/x", "/tmp/x", rootfs=root, layer=Layer.NONE)
    # Whoever owns the root's files may be the kernel itself.
    assert {found["/usr/x"], found["/etc/x"]} <= {"Read-only file system", "Permission denied"}
    assert found["/tmp/x"] == ""
    assert "ro" in run_inside(look, rootfs=root, layer=Layer.NONE)["root"][3].split(",")


def changed():
    """Change a file and a folder of the root; what is there then."""
    import os
    import shutil

    with open("/srv/open/file", "a") as file:
        file.write(" and more")
    os.mkdir("/srv/open/made")
    shutil.rmtree("/srv/open/folder")
    os.mkdir("/srv/open/folder")
    return open("/srv/open/file").read(), sorted(os.listdir("/srv/open"))


def read():
    import os

    return open("/srv/open/file").read(), sorted(os.listdir("/srv/open/folder"))


def _open_root(name):
    """A root in which everybody may write somewhere."""
    root = roots.copy(name)
    (root / "srv/open/folder/inner").mkdir(parents=True)
    (root / "srv/open/file").write_text("first")
    for path in ("", "file", "folder", "folder/inner"):
        (root / "srv/open" / path).chmod(0o777)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_goes_into_a_layer_that_ends_with_its_box(kind, sandbox, request):
    root = _open_root(f"layer-{kind}-{os.getpid()}")
    path = root
    if kind != "directory":
        _root(kind)
        path = roots.make_image(root, roots.folder() / f"layer.{kind}", kind)
    request.addfinalizer(lambda: shutil.rmtree(root))
    with sandbox(rootfs=str(path)) as box, sandbox(rootfs=str(path)) as other:
        assert box.call(changed) == ["first and more", ["file", "folder", "made"]]
        assert other.call(read) == ["first", ["inner"]]
    with sandbox(rootfs=str(path)) as box:
        assert box.call(read) == ["first", ["inner"]]
    assert (root / "srv/open/file").read_text() == "first"


def test_it_has_the_users_of_the_root_and_its_own(root, run_inside):
    lines = run_inside(look, rootfs=root)["users"].splitlines()
    assert [line.split(":")[0] for line in lines] == ["root", "jovyan", "nobody", "mail"]


@pytest.mark.requires("root")
def test_its_files_belong_to_the_root_of_the_box(root, run_inside):
    answer = run_inside(look, rootfs=root)
    assert answer["owners"] == [0, 0, 0]
    assert answer["ids"] == [1000, 1000]


def test_a_program_of_the_host_is_none_of_the_root(root, launcher, workdir):
    request = request_for(workdir, ["/usr/bin/env", "true"], rootfs=root)
    with pytest.raises(LaunchError, match="no such program in it") as failed:
        run(launcher.start(request))
    assert "/usr/bin/env" in str(failed.value)


# -- image files


@pytest.mark.requires("root", "mksquashfs")
def test_boxes_of_one_image_share_its_device_which_ends_with_the_last(sandbox):
    path = roots.image("squashfs")
    with sandbox(rootfs=str(path)) as box:
        with sandbox(rootfs=str(path)) as other:
            assert len(roots.devices_of(path)) == 1
            assert "ID=tiny" in other.call(look)["release"]
        assert len(roots.devices_of(path)) == 1
        assert "ID=tiny" in box.call(look)["release"]
    assert roots.is_let_go_of(path)


@pytest.mark.requires("root", "mksquashfs")
def test_nothing_is_mounted_on_the_host(sandbox):
    before = Path("/proc/self/mounts").read_text()
    with sandbox(rootfs=str(roots.image("squashfs"))):
        assert Path("/proc/self/mounts").read_text() == before


_SERVER = """
import os, sys
from pathlib import Path
import boxes
from sandbox_provisioner.launch import LocalLauncher
runtime, workdir, root = sys.argv[1:]
launcher = LocalLauncher(runtime_dir=runtime, keep_seconds=3600.0)
box = boxes.start(launcher, boxes.request_for(workdir, rootfs=root))
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.requires("root", "mksquashfs")
def test_no_device_is_left_by_a_server_that_is_killed(runtime_dir, workdir):
    # A file of its own: others of this process have devices of theirs.
    path = shutil.copy(roots.image("squashfs"), roots.folder() / "killed.squashfs")
    here = Path(__file__).parents[1]
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(runtime_dir), str(workdir), str(path)],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin
    assert server.stdout
    try:
        assert server.stdout.readline() == b"there\n"
        assert len(roots.devices_of(path)) == 1
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()
    assert roots.is_let_go_of(path)


# -- what cannot be a root


def _truncated(kind):
    path = roots.folder() / f"truncated.{kind}"
    path.write_bytes(roots.image(kind).read_bytes()[: 1 << 20])
    return path


def _damaged(kind):
    path = roots.folder() / f"damaged.{kind}"
    content = bytearray(roots.image(kind).read_bytes())
    start = {"squashfs": 8, "erofs": 1024 + 8, "ext4": 1024 + 40}[kind]
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    return path


@pytest.mark.requires("root", "mksquashfs", "mkfs.erofs", "mkfs.ext4")
@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_image_that_was_cut_off_or_damaged_is_refused(kind, launcher, workdir):
    for path, answer in ((_truncated(kind), "are there"), (_damaged(kind), "cannot read it|there")):
        with pytest.raises((SpecError, HostError), match=answer):
            run(launcher.start(request_for(workdir, rootfs=str(path))))
        assert roots.is_let_go_of(path)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", "no file system that can be a root"),
        (b"\x1f\x8b\x08" + b"x" * 64, "gzip"),
        (b"x" * 257 + b"ustar\x0000", "no archive that could be read"),
        (b"QFI\xfb" + b"x" * 600, "virtual machine"),
        (b"x" * 510 + b"\x55\xaa", "table of partitions"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(content, answer, launcher, workdir):
    path = roots.folder() / "other"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=re.escape(answer)):
        run(launcher.start(request_for(workdir, rootfs=str(path))))


@pytest.mark.requires("root", "mksquashfs")
@pytest.mark.parametrize(("owner", "mode"), [(4321, 0o644), (0, 0o666), (0, 0o664)])
def test_root_mounts_no_file_that_others_may_write_to(owner, mode, launcher, workdir):
    path = roots.folder() / "others.squashfs"
    shutil.copy(roots.image("squashfs"), path)
    os.chown(path, owner, 0)
    path.chmod(mode)
    with pytest.raises(SpecError, match="others than root may write to it"):
        run(launcher.start(request_for(workdir, rootfs=str(path))))
    assert not roots.devices_of(path)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/", "it is the root of the host"),
        ("/proc", "shows the host"),
        ("/does-not-exist", "No such file"),
        ("/dev/null", "neither a directory nor a file"),
        ("/etc", "neither a directory usr nor bin"),
    ],
)
def test_what_is_no_other_root_is_refused(path, answer, launcher, workdir):
    with pytest.raises((SpecError, HostError), match=answer):
        run(launcher.start(request_for(workdir, rootfs=path)))


def test_a_root_in_which_the_kernel_works_is_refused(launcher, workdir):
    for name in ("usr", "bin", "inner"):
        (workdir / name).mkdir()
    for place, root in ((workdir, workdir), (workdir, workdir / "usr"), (workdir / "usr", workdir)):
        with pytest.raises(SpecError, match=r"may write to, lies in it or around it|nor bin"):
            run(launcher.start(request_for(place, rootfs=str(root))))


@pytest.mark.requires("root")
def test_loop_devices_used_up_are_told(launcher, workdir, monkeypatch):
    def none_free():
        raise OSError(28, "No space left on device", "/dev/loop-control")

    monkeypatch.setattr(loop, "_free_number", none_free)
    path = shutil.copy(_root("squashfs"), roots.folder() / "none-free.squashfs")
    with pytest.raises(HostError, match="no free loop device"):
        run(launcher.start(request_for(workdir, rootfs=str(path))))


def test_a_root_without_ipykernel_tells_how_to_add_it(launcher, workdir, request):
    root = roots.copy(f"bare-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    shutil.rmtree(root / "usr/lib" / roots.LIBRARY / "site-packages/ipykernel")
    argv = ["python3", "-m", "ipykernel_launcher"]
    with pytest.raises(LaunchError, match="no ipykernel") as failed:
        run(launcher.start(request_for(workdir, argv, rootfs=str(root))))
    assert "pip install ipykernel" in failed.value.remedy


def test_a_root_of_another_machine_is_told(launcher, workdir, request):
    root = roots.copy(f"foreign-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    program = root / "usr/bin" / roots.LIBRARY
    content = bytearray(program.read_bytes())
    content[18:20] = (243).to_bytes(2, "little")
    program.unlink()
    program.write_bytes(content)
    program.chmod(0o755)
    with pytest.raises(LaunchError, match="program for riscv64"):
        run(launcher.start(request_for(workdir, rootfs=str(root))))


# -- roots that somebody has made to break out


PLACES = ("dev", "proc", "sys", "etc", "tmp", "run", "home", "var", "home/jovyan", "var/tmp")
OWN_FILES = ("passwd", "group", "hosts", "hostname", "resolv.conf", "nsswitch.conf")


def _hostile(name, change):
    root = roots.copy(name)
    change(root)
    return root


def _remove(path):
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _links_to(target):
    def change(root):
        for place in PLACES:
            path = root / place
            if path.parent.is_symlink() or not path.parent.exists():
                continue
            _remove(path)
            path.symlink_to(target)

    return change


def _files_for_folders(root):
    for place in PLACES[:8]:
        _remove(root / place)
        (root / place).write_text("a file")


def _nothing_there(root):
    for place in PLACES[:8]:
        _remove(root / place)


def _own_files_are_links(root):
    for name in OWN_FILES:
        _remove(root / "etc" / name)
        (root / "etc" / name).symlink_to("/srv/victim")


def _dev_is_full(root):
    for name in ("null", "fd", "pts", "shm", "tty", "ptmx"):
        (root / "dev" / name).symlink_to("/etc")


def _scratch_is_there(root):
    (root / ".scratch").mkdir()
    (root / ".scratch/kept").touch()


# The same without a Python, which takes its time to start.
_WORKS = """
set -e
[ -c /dev/null ] && [ -d /dev/fd ] && [ -d /dev/pts ] && [ -d /proc/self ]
while read line; do case "$line" in jovyan:*) known=yes;; esac; done < /etc/passwd
[ "$known" ] && [ ! -L /etc/passwd ] && [ ! -L /tmp ] && [ ! -L /run ]
echo x > /tmp/x && echo x > "$HOME/x" && echo x > /var/tmp/x
echo works
"""


def works():
    import os
    import stat

    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert open("/proc/self/comm").read()
    assert "jovyan" in open("/etc/passwd").read()
    open("/tmp/x", "w").write("x")
    open(os.path.expanduser("~/x"), "w").write("x")
    return [os.path.realpath(path) for path in ("/tmp/x", "/etc/passwd")]


@pytest.mark.parametrize(
    "change",
    [_links_to("/srv"), _links_to("../../../../.."), _links_to("/proc/1/root"),
     _files_for_folders, _nothing_there, _own_files_are_links, _dev_is_full, _scratch_is_there],
    ids=["links", "links-up", "links-to-proc", "files", "nothing", "own-files", "dev", "scratch"],
)  # fmt: skip
def test_whatever_is_in_the_place_of_a_mount_is_hidden(change, sandbox, request):
    root = _hostile(f"hostile-{request.node.callspec.id}-{os.getpid()}", change)
    request.addfinalizer(lambda: shutil.rmtree(root))
    for layer in (Layer.NONE, Layer.AUTO):
        with sandbox(["/bin/sh", "-c", _WORKS], rootfs=str(root), layer=layer) as box:
            assert box.readline() == b"works\n"
            assert box.finish().code == 0


def test_a_link_where_a_volume_shows_leads_nowhere(sandbox, new_folder, request):
    root = roots.copy(f"volume-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    (root / "data").symlink_to("/etc")
    volume = new_folder()
    (volume / "mine").touch()
    with sandbox(
        rootfs=str(root), volumes=(Volume(source=str(volume), target="/data/deep"),)
    ) as box:
        assert box.call(listed, "/data/deep") == ["mine"]
        assert "deep" not in box.call(listed, "/etc")


def listed(path):
    import os

    return sorted(os.listdir(path))


def opened(path):
    import os

    os.close(os.open(path, os.O_RDONLY))


@pytest.mark.requires("root")
def test_device_nodes_and_set_id_programs_of_a_root_give_nothing(sandbox, request):
    root = roots.copy(f"nodes-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    os.mknod(root / "srv-disk", 0o020666, os.makedev(1, 9))  # random numbers, for whoever may
    os.chmod(root / "srv-disk", 0o666)
    shutil.copy(root / "usr/bin/id", root / "usr/bin/set-id")
    (root / "usr/bin/set-id").chmod(0o6755)
    with sandbox(rootfs=str(root)) as box:
        with pytest.raises(PermissionError):
            box.call(opened, "/srv-disk")
        assert box.call(output_of, "/usr/bin/set-id", "-u") == "1000\n"
    os.close(os.open(root / "srv-disk", os.O_RDONLY))  # it is one


def output_of(*command):
    import subprocess

    return subprocess.check_output(command, text=True)


# -- an ordinary user


_LOOK = """
import sys
from pathlib import Path
import boxes, test_other_roots
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Layer
workdir, runtime, *wishes = sys.argv[1:]
sandbox = boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))
for root, layer in zip(wishes[::2], wishes[1::2]):
    try:
        with sandbox(rootfs=root, layer=Layer(layer)) as box:
            print(box.call(test_other_roots.works), box.call(test_other_roots.attempts, "/usr/x"))
    except Exception as error:
        print(type(error).__name__, error)
"""


def _said(home, *wishes, ids="single"):
    """What comes of the roots and layers *wishes*, one after the other, as they have it."""
    words = ("-c", _LOOK, f"{home}/work", f"{home}/run", *map(str, wishes))
    return as_user(home, *words, SANDBOX_TEST_USER_IDS=ids).strip().splitlines()


@pytest.mark.requires("root", "setpriv", "public-python")
@pytest.mark.parametrize("ids", ["single", pytest.param("range", marks=_RANGE)])
def test_an_ordinary_user_has_a_directory_as_root(user_home, ids):
    own = user_home / "root"
    subprocess.run(["cp", "-a", roots.directory(), own], check=True)
    subprocess.run(["chown", "-hR", "4321:4321", own], check=True)
    roots_and_layers = ((roots.directory(), own), ("none", "auto"))
    wishes = [word for pair in itertools.product(*roots_and_layers) for word in pair]
    said = _said(user_home, *wishes, ids=ids)
    assert [line.partition("] ")[0] for line in said] == ["['/tmp/x', '/etc/passwd'"] * 4
    # Who owns the files of the root may change them, in the layer alone.
    assert [line.endswith("{'/usr/x': ''}") for line in said] == [False, False, False, True]
    assert not (own / "usr/x").exists()


@pytest.fixture
def fuse(user_home):
    """The device as udev makes it: for everybody. It needs not be so on the machine of a test."""
    node = user_home / "fuse"
    os.mknod(node, 0o020666, os.makedev(10, 229))
    node.chmod(0o666)
    return user_home


_IMAGE = ("root", "setpriv", "public-python", "mksquashfs", "squashfuse")


@pytest.mark.requires(*_IMAGE)
@pytest.mark.parametrize("ids", ["single", pytest.param("range", marks=_RANGE)])
def test_an_ordinary_user_has_an_image_file_as_root(fuse, ids):
    said = _said(fuse, roots.image("squashfs"), "auto", ids=ids)
    # All files are the user's own there: in the layer they can be changed.
    assert said == ["['/tmp/x', '/etc/passwd'] {'/usr/x': ''}"]
    assert _nobody_serves(roots.image("squashfs"))


def _nobody_serves(path):
    """squashfuse ends with the mount, which ends with the box."""
    for _ in range(3000):
        if not _serving(path):
            return True
        select.poll().poll(10)
    return False


def _serving(path):
    """The processes that have *path* open."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
            if int(pid) != os.getpid() and str(path) in {
                os.readlink(f"/proc/{pid}/fd/{fd}") for fd in fds
            }:
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.requires(*_IMAGE, "mkfs.erofs")
def test_an_ordinary_user_is_told_why_an_image_file_cannot_be_had(fuse):
    damaged = fuse / "damaged"
    content = bytearray(roots.image("squashfs").read_bytes())
    content[48:96] = b"\xff" * 48
    damaged.write_bytes(content)
    damaged.chmod(0o644)
    erofs, broken = _said(fuse, roots.image("erofs"), "auto", damaged, "auto")
    assert "it is a file of erofs" in erofs
    assert "squashfuse cannot read it" in broken
    assert _nobody_serves(damaged)
    (fuse / "fuse").chmod(0o600)
    (closed,) = _said(fuse, roots.image("squashfs"), "auto")
    assert "chmod 0666 /dev/fuse" in closed


_STOPPED = """
import signal, sys
import boxes
from sandbox_provisioner import launch, served_image
from sandbox_provisioner.errors import HostError
workdir, runtime, root, when = sys.argv[1:]
served_image._ANSWER_SECONDS = 0.3
answering, looks = served_image.answering, []
def stopped(root):
    looks.append(root)
    if len(looks) == int(when):
        signal.pidfd_send_signal(root.server_fd, signal.SIGSTOP)
    return answering(root)
served_image.answering = launch.answering = stopped
try:
    boxes.start(launch.LocalLauncher(runtime_dir=runtime), boxes.request_for(workdir, rootfs=root))
except HostError as error:
    print(error)
"""


@pytest.mark.requires(*_IMAGE)
@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_program_that_reads_an_image_and_does_not_answer_is_ended(fuse, when):
    path = roots.image("squashfs")
    said = as_user(fuse, "-c", _STOPPED, f"{fuse}/work", f"{fuse}/run", str(path), str(when))
    assert "squashfuse, which reads it for this user, has not answered for 0.3 seconds" in said
    assert _nobody_serves(path)


_ENDED = """
import os, select, signal, sys
import boxes, test_other_roots
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime, root = sys.argv[1:]
said, theirs = os.pipe()
request = boxes.request_for(workdir, rootfs=root)
box = boxes.start(LocalLauncher(runtime_dir=runtime), request, theirs)
os.close(theirs)
box.call(test_other_roots.one)
(server,) = test_other_roots._serving(root)
limits = open(f"/proc/{server}/limits").read()
print(next(line.split()[3] for line in limits.splitlines() if line.startswith("Max data")))
os.kill(int(server), signal.SIGKILL)
text = b""
while b"restart the kernel" not in text:
    assert select.select([said], [], [], 60)[0]
    part = os.read(said, 4096)
    assert part, box.wait()
    text += part
print(" ".join(text.decode().split()))
print(box.call(test_other_roots.one))
box.close()
"""


def one():
    return 1


@pytest.mark.requires(*_IMAGE)
def test_a_kernel_is_told_that_what_reads_its_image_has_ended(fuse):
    words = ("-c", _ENDED, f"{fuse}/work", f"{fuse}/run", str(roots.image("squashfs")))
    limit, said, answer = as_user(fuse, *words).splitlines()
    assert (limit, answer) == (str(1 << 30), "1")
    assert "What reads the root file system of this kernel, squashfuse, has ended" in said
