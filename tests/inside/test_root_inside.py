"""A kernel that is root in its box: what it can install, and what it is root of."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import debian
import pytest
import roots
from boxes import Boxes, request_for
from users import as_user

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import KernelUser, Layer, Volume, WorkdirMode

pytestmark = pytest.mark.requires("userns")
_APT = pytest.mark.requires("root", "dpkg", "apt-get")
INSTALL = "apt-get -qq update && apt-get -qq install greeter"
# Of the package: a program, one that has a set-id bit in the archive, and what its script has made.
INSTALLED = """
greet
greeters-id -u
stat -c '%a %U' /usr/bin/greeters-id /var/lib/greeter /var/lib/greeter/state
cat /var/lib/greeter/state
"""
THERE = "hello\n0\n755 root\n750 greeter\n644 root\nconfigured\n"


@pytest.fixture
def archive(new_folder: Callable[[], Path]) -> Path:
    """An archive of the package "greeter", that everybody may read."""
    folder = new_folder()
    folder.chmod(0o755)
    return debian.archive(folder)


@pytest.fixture
def boxes(runtime_dir: Path, new_folder: Callable[[], Path], workdir: Path) -> Boxes:
    return Boxes(LocalLauncher(runtime_dir=str(runtime_dir), layer_dir=str(new_folder())), workdir)


def options(archive: Path | None = None, **more: Any) -> dict[str, Any]:
    volumes = (Volume(source=str(archive), target=debian.ARCHIVE),) if archive else ()
    root = debian.directory() if archive else roots.directory()
    return {"rootfs": str(root), "kernel_user": KernelUser.ROOT, "volumes": volumes, **more}


def shell(script):
    """What it prints; it must end well."""
    import subprocess

    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@_APT
def test_a_package_with_a_user_a_script_and_a_set_id_program_is_installed(boxes, archive):
    with boxes(**options(archive)) as box:
        assert "Setting up greeter" in box.call(shell, INSTALL)
        assert box.call(shell, INSTALLED) == THERE
        assert box.call(shell, "dpkg --verify greeter; dpkg -s greeter | grep Status") == (
            "Status: install ok installed\n"
        )
    with boxes(**options(archive)) as box:
        assert box.call(shell, "test ! -e /usr/bin/greet && echo gone") == "gone\n"


@_APT
@pytest.mark.parametrize("layer", [Layer.KERNEL, Layer.USER])
def test_what_it_installs_is_kept_with_the_users_that_were_added(boxes, archive, layer):
    kept = options(archive, layer=layer, sandbox_id="0123456789ab")
    with boxes(**kept) as box:
        box.call(shell, INSTALL)
    with boxes(**kept) as box:
        assert box.call(shell, INSTALLED) == THERE
        assert box.call(shell, "dpkg --remove greeter && rm /etc/passwd && ln -sf /x /etc/group")
    # What an earlier one has put in the place of the box's own files gives way.
    with boxes(**kept) as box:
        assert box.call(shell, "test ! -e /usr/bin/greet && cat /etc/passwd").startswith("root:x:0")
        assert box.call(shell, "test ! -L /etc/group && id -gn") == "root\n"
    boxes.launcher.forget("0123456789ab")


def rights():
    import os

    def number(pid, name):
        lines = open(f"/proc/{pid}/status").read().splitlines()
        return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))

    names = ("CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    return {
        "ids": [*os.getresuid(), *os.getresgid()],
        "map": open("/proc/self/uid_map").read().split(),
        "own": [number("self", name) for name in names],
        "init": os.stat("/proc/1").st_uid,
        "in the same namespace": os.path.exists("/proc/1/ns/user"),
    }


@pytest.mark.requires("root")
def test_it_has_few_capabilities_and_none_over_init_which_has_no_id_of_its(run_inside):
    found = run_inside(rights, **options())
    assert found["ids"] == [0] * 6
    assert found["map"] == ["0", "0", "1", "1", "1", "65534"]
    # CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID.
    assert found["own"] == [*["00000000000000eb"] * 3, "1", "2"]
    assert (found["init"], found["in the same namespace"]) == (65534, False)


def modes(place):
    """What comes of giving set-id bits to files in *place*, by each call that can."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    file = os.open(f"{place}/file", os.O_CREAT | os.O_RDWR, 0o644)
    folder = os.open(place, os.O_RDONLY)
    os.symlink("file", f"{place}/link")
    ways = {
        "by path": lambda: os.chmod(f"{place}/file", 0o4751),
        "by a link": lambda: os.chmod(f"{place}/link", 0o6752),
        "by descriptor": lambda: os.fchmod(file, 0o2753),
        "in a folder": lambda: os.chmod("file", 0o4754, dir_fd=folder),
        "by /proc": lambda: os.chmod(f"/proc/self/fd/{file}", 0o4755),
        "a folder": lambda: os.fchmod(folder, 0o3755),
        "what is not there": lambda: os.chmod(f"{place}/none", 0o4755),
        "what is no descriptor": lambda: os.fchmod(987, 0o4755),
        "what has too many digits": lambda: os.chmod("/proc/self/fd/" + "1" * 4400, 0o4755),
        "what is too long": lambda: os.chmod("/" * 4096, 0o4755),
        "what is no path": lambda: (
            libc.chmod(ctypes.c_void_p(8), 0o4755) and os.strerror(ctypes.get_errno())
        ),
    }
    found = {}
    for way, act in ways.items():
        try:
            found[way] = act() or oct(os.fstat(folder if way == "a folder" else file).st_mode)
        except OSError as error:
            found[way] = error.strerror
    return found


ON_ROOT = {
    "by path": "0o100751",
    "by a link": "0o100752",
    "by descriptor": "0o100753",
    "in a folder": "0o100754",
    "by /proc": "0o100755",
    "a folder": "0o41755",
    "what is not there": "No such file or directory",
    "what is no descriptor": "Bad file descriptor",
    "what has too many digits": "File name too long",
    "what is too long": "File name too long",
    "what is no path": "Bad address",
}
_REFUSED = {way: "Operation not permitted" for way in [*ON_ROOT][:6]}


@pytest.mark.requires("root")
def test_a_set_id_bit_is_left_out_in_the_root_and_refused_elsewhere(sandbox, workdir):
    with sandbox(**options()) as box:
        box.call(shell, "mkdir /place")
        assert box.call(modes, "/place") == ON_ROOT
        os.mkdir(workdir / "mine")
        owner = os.stat(workdir)
        os.chown(workdir / "mine", owner.st_uid, owner.st_gid)
        found = box.call(modes, str(workdir / "mine"))
        assert {way: found[way] for way in _REFUSED} == _REFUSED
        box.call(shell, "mkdir /tmp/mine")
        assert box.call(modes, "/tmp/mine")["by path"] == "Operation not permitted"
        assert not [path for path in workdir.rglob("*") if path.lstat().st_mode & 0o6000]


def as_other(path):
    """Give a file of root's a set-id bit, as somebody else."""
    import os

    os.close(os.open(path, os.O_CREAT, 0o600))
    pid = os.fork()
    if not pid:
        os.setresuid(33, 33, 33)
        try:
            os.chmod(path, 0o4777)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), oct(os.stat(path).st_mode)


@pytest.mark.requires("root")
def test_who_is_not_root_there_changes_no_mode_of_roots_by_init(run_inside):
    assert run_inside(as_other, "/usr/file", **options()) == [1, "0o100600"]


def meanwhile(seconds):
    """Give set-id bits to one of two files, whose paths change places meanwhile."""
    import ctypes
    import os
    import threading
    import time

    os.close(os.open("/usr/a", os.O_CREAT, 0o600))
    os.close(os.open("b", os.O_CREAT, 0o600))
    other, ended = os.path.abspath("b").encode(), time.monotonic() + seconds
    long = ctypes.create_string_buffer(other, 256)
    here = [b"/usr/a", other]

    def swap():
        turn = 0
        while time.monotonic() < ended:
            turn += 1
            long.value = here[turn % 2]

    thread = threading.Thread(target=swap)
    thread.start()
    libc = ctypes.CDLL(None)
    while time.monotonic() < ended:
        libc.chmod(long, 0o4755)
    thread.join()
    return [oct(os.stat(name).st_mode) for name in ("/usr/a", "b")]


@pytest.mark.requires("root")
def test_a_path_that_changes_meanwhile_leads_to_no_file_outside_of_the_root(run_inside, workdir):
    found = run_inside(meanwhile, 0.3, **options())
    assert found[1] == "0o100600"
    assert not os.stat(workdir / "b").st_mode & 0o6000


# -- who may ask for it


def test_it_needs_a_root_of_its_own():
    with pytest.raises(SpecError, match="nothing to install into"):
        request_for("/srv", kernel_user=KernelUser.ROOT)


def test_what_is_laid_aside_has_one_owner_alone():
    with pytest.raises(SpecError, match="would belong to root inside"):
        request_for("/srv", **options(), workdir_mode=WorkdirMode.REVIEW)


_INSTALL = """
import json, sys
import boxes
from pathlib import Path
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import KernelUser, Layer, OnMissing, UserIds, Volume
from test_root_inside import shell, rights
runtime, workdir, root, archive, *scripts = sys.argv[1:]
request = boxes.request_for(
    workdir, rootfs=root, kernel_user=KernelUser.ROOT, user_ids=UserIds.RANGE,
    volumes=(Volume(source=archive, target="/srv/archive"),),
    on_missing=dict.fromkeys(("memory", "cpu", "pids"), OnMissing.WARN),
    layer=Layer.KERNEL, sandbox_id="0123456789ab",
)
layers = Path(workdir).parent / "base"
launcher = LocalLauncher(runtime_dir=runtime, layer_dir=str(layers))
answers = []
for script in scripts:
    box = boxes.start(launcher, request)
    try:
        answers += [box.call(shell, script), box.call(rights)]
    finally:
        box.close()
launcher.forget("0123456789ab")
print(json.dumps([*answers, [str(path) for path in layers.glob("kernel/*")]]))
"""


@_APT
@pytest.mark.requires("newuidmap", "setpriv", "public-python")
def test_an_ordinary_user_with_a_range_installs_in_a_root_of_theirs(user_home, archive):
    own = user_home / "root"
    subprocess.run(["cp", "-a", debian.directory(), own], check=True)
    subprocess.run(["chown", "-hR", "4321:4321", own], check=True)
    words = ("-c", _INSTALL, f"{user_home}/run", f"{user_home}/work", str(own), str(archive))
    said = as_user(user_home, *words, INSTALL, INSTALLED, "touch made && stat -c %U made")
    _, found, there, _, made, _, left = json.loads(said.splitlines()[-1])
    assert (there, made, found["init"]) == (THERE, "root\n", 65534)
    # With what belongs to other ids of the range, which this user alone could not remove.
    assert left == []
    # Root inside is this user outside; others are of the range.
    assert os.stat(user_home / "work/made").st_uid == 4321
    assert not (own / "usr/bin/greet").exists()
