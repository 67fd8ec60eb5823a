"""Devices: what was asked for is there and works, and nothing else can be opened.

The device is /dev/full by another name (1:7), as a specification in a folder of root's has it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import roots
from boxes import Boxes
from probes import answer_of
from users import USER, as_user

from sandbox_provisioner.errors import LaunchError, SpecError
from sandbox_provisioner.facilities.devices.facts import cdi, nodes
from sandbox_provisioner.facilities.devices.plan.program import Allowed, program
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.spec import Layer

pytestmark = pytest.mark.requires("userns", "root")

NAME = "example.org/gpu=0"
FULL = 1, 7
USUAL = {"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
         "urandom", "zero"}  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """One in which root alone writes, as no folder below /tmp is."""
    made = Path(tempfile.mkdtemp(prefix="sandbox-devices-", dir="/run"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def specify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``specify(edits)`` lets `NAME` need what *edits* say, and a node of its own."""
    os.mknod(folder / "real", stat.S_IFCHR | 0o600, os.makedev(*FULL))
    monkeypatch.setattr(cdi, "FOLDERS", (str(folder),))

    def write(**edits: Any) -> None:
        node = {"path": "/dev/gpu0", "hostPath": f"{folder}/real", "major": 1, "minor": 7}
        device = {"name": "0", "containerEdits": {"deviceNodes": [node], **edits}}
        found = {"cdiVersion": "0.6.0", "kind": "example.org/gpu", "devices": [device]}
        (folder / "gpu.json").write_text(json.dumps(found))

    return write


def use(path):
    """What reading, writing, changing its mode and replacing it answer; and what /dev has."""
    import os

    def read():
        with open(path, "rb", buffering=0) as file:
            return file.read(3) == bytes(3)

    def write():
        with open(path, "wb", buffering=0) as file:
            file.write(b"x")

    found = os.stat(path)
    numbers = [os.major(found.st_rdev), os.minor(found.st_rdev)]
    calls = (read, write, lambda: os.chmod(path, 0o777), lambda: os.unlink(path))
    return numbers, [*map(answer_of, calls)], os.listdir("/dev")


def test_a_device_of_a_specification_works_and_is_the_only_one_more(run_inside, specify):
    specify()
    numbers, answers, names = run_inside(use, "/dev/gpu0", using=(answer_of,), devices=(NAME,))
    assert numbers == [*FULL]
    assert answers[:2] == ["True", "ENOSPC"]  # as /dev/full has it
    assert set(answers[2:]) <= {"EROFS", "EPERM", "EBUSY"}
    assert set(names) == {*USUAL, "gpu0"}


def test_a_box_that_asked_for_none_has_none(run_inside):
    _, _, names = run_inside(use, "/dev/zero", using=(answer_of,))
    assert set(names) == USUAL


def test_files_and_variables_of_a_specification_come_with_it(run_inside, specify, folder):
    (folder / "lib").mkdir()
    (folder / "lib/driver").write_text("text")
    mounts = [
        {"hostPath": f"{folder}/lib", "containerPath": "/opt/gpu", "options": ["ro", "bind"]},
        {"hostPath": "/usr/bin", "containerPath": "/usr/bin", "options": ["rw"]},  # is there
    ]
    specify(mounts=mounts, env=["GPU_OF_BOX=0", "HOME=/elsewhere"])

    def look():
        import os

        text = open("/opt/gpu/driver").read()
        writes = [answer_of(lambda at=at: open(f"{at}/x", "w")) for at in ("/opt/gpu", "/usr/bin")]
        return text, writes, os.environ["GPU_OF_BOX"], os.environ["HOME"]

    text, writes, variable, home = run_inside(look, using=(answer_of,), devices=(NAME,))
    assert (text, writes, variable) == ("text", ["EROFS", "EROFS"], "0")
    assert home != "/elsewhere"


def test_what_a_specification_only_reads_cannot_be_written_to(run_inside, specify, folder):
    node = {"path": "/dev/gpu0", "hostPath": f"{folder}/real", "permissions": "r"}
    specify(deviceNodes=[node])
    _, answers, _ = run_inside(use, "/dev/gpu0", using=(answer_of,), devices=(NAME,))
    assert answers[:2] == ["True", "EACCES"]


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ({"hooks": [{"path": "/bin/true"}]}, "a program run outside.*: /bin/true"),
        ({"additionalGids": [44]}, "'additionalGids'"),
        ({"deviceNodes": [{"path": "/dev/null"}]}, "hides nothing that is there"),
        ({"deviceNodes": [{"path": "/srv/gpu0", "hostPath": "/dev/full"}]}, "shows in /dev"),
        ({"deviceNodes": [{"path": "/dev/kmsg"}]}, "machine's memory, or its log"),
        ({"deviceNodes": [{"path": "/dev/loop0", "hostPath": "/dev/loop0"}]}, "it is a disk"),
        ({"deviceNodes": [{"path": "/dev/gone"}]}, "No such file"),
        ({"deviceNodes": [{"path": "/dev/x", "hostPath": "/etc/passwd"}]}, "no device"),
    ],
)
def test_what_a_specification_may_not_ask_for_starts_nothing(sandbox, specify, edits, told):
    specify(**edits)
    with pytest.raises(SpecError, match=told), sandbox(devices=(NAME,)):
        pass


@pytest.mark.parametrize(
    ("device", "told"),
    [((1, 1), "memory"), ((1, 11), "its log"), ((4, 1), "console"), ((5, 1), "console"),
     ((7, 1), "consoles"), ((10, 237), "loop-control"), ((10, 223), "uinput"), ((13, 64), "type"),
     ((21, 0), "disks"), ((202, 0), "processors")],
)  # fmt: skip
def test_no_box_is_given_what_is_more_than_a_device(sandbox, specify, folder, device, told):
    os.mknod(folder / "other", stat.S_IFCHR | 0o666, os.makedev(*device))
    specify(deviceNodes=[{"path": "/dev/gpu0", "hostPath": f"{folder}/other"}])
    with pytest.raises(SpecError, match=told), sandbox(devices=(NAME,)):
        pass


def test_a_path_needs_a_policy_where_root_starts_the_kernel(sandbox):
    with pytest.raises(SpecError, match=r"no policy says.*devices = \[\"/dev/full0\"\]"):
        with sandbox(devices=("/dev/full0",)):
            pass


def test_a_node_behind_a_folder_of_others_is_refused(sandbox, specify, folder, new_folder):
    place = new_folder()  # below /tmp
    (place / "link").symlink_to(folder / "real")
    specify(deviceNodes=[{"path": "/dev/gpu0", "hostPath": f"{place}/link"}])
    with pytest.raises(SpecError, match="others than root may change"), sandbox(devices=(NAME,)):
        pass


def test_a_node_that_is_exchanged_during_the_start_is_not_followed(
    run_inside, specify, folder, monkeypatch
):
    """Its numbers were judged, and are what is made."""
    specify()
    judged = nodes._status

    def become(device):
        (folder / "real").unlink()
        os.mknod(folder / "real", stat.S_IFCHR | 0o600, os.makedev(*device))

    def exchanged(path):
        become(FULL)  # again, where a nursery was looked at before
        status = judged(path)
        become((1, 5))
        return status

    monkeypatch.setattr(nodes, "_status", exchanged)
    numbers, _, _ = run_inside(use, "/dev/gpu0", using=(answer_of,), devices=(NAME,))
    assert numbers == [*FULL]


# -- a specification as NVIDIA's toolkit generates it

# As `nvidia-ctk cdi generate` of version 1.18 writes it, shortened to one of each kind.
GENERATED = """
---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
              hostPath: {root}/dev/nvidia0
            - path: /dev/dri/renderD128
              hostPath: {root}/dev/nvidia0
        hooks:
            - hookName: createContainer
              path: /usr/bin/nvidia-cdi-hook
              args: [nvidia-cdi-hook, chmod, --mode, "755", --path, /dev/dri]
containerEdits:
    env:
        - NVIDIA_CTK_LIBCUDA_DIR={libraries}
        - NVIDIA_VISIBLE_DEVICES=void
    deviceNodes:
        - path: /dev/nvidiactl
          hostPath: {root}/dev/nvidia0
    hooks:
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args:
            - nvidia-cdi-hook
            - create-symlinks
            - --link
            - libcuda.so.1::{libraries}/libcuda.so
            - --link
            - ../libdriver.so.575.57.08::/lib/gbm/nvidia-drm_gbm.so
          env:
            - NVIDIA_CTK_DEBUG=false
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, enable-cuda-compat, --host-driver-version=575.57.08]
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, update-ldcache, --folder, {libraries}, --folder, /opt/driver]
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, disable-device-node-modification]
    mounts:
        - hostPath: {root}/libdriver.so.575.57.08
          containerPath: {libraries}/libcuda.so.575.57.08
          options: [ro, nosuid, nodev, rbind, rprivate]
        - hostPath: {root}/libdriver.so.575.57.08
          containerPath: {other}/libdriver.so.575.57.08
          options: [ro, nosuid, nodev, rbind, rprivate]
        - hostPath: {root}/libdriver.so.575.57.08
          containerPath: /lib/firmware/nvidia/575.57.08/gsp_ga10x.bin
          options: [ro, nosuid, nodev, rbind, rprivate]
"""
SONAME = "libBrokenLocale.so.1"  # of a library that the small root has not: a part of the C library


@pytest.fixture
def generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``generate(other)`` writes such a specification, with libraries beside the C library, and in
    the folder *other*."""
    monkeypatch.setattr(cdi, "FOLDERS", (str(folder),))
    (folder / "dev").mkdir()
    os.mknod(folder / "dev/nvidia0", stat.S_IFCHR | 0o600, os.makedev(*FULL))
    where = Path(c_library()).parent
    shutil.copy(where / SONAME, folder / "libdriver.so.575.57.08")

    def write(other: str) -> None:
        text = GENERATED.format(root=folder, libraries=where, other=other)
        (folder / "nvidia.yaml").write_text(text)

    return write


def c_library() -> str:
    """Where this machine has it, and so the small root."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if line.endswith("/libc.so.6"))


def load(name, folder):
    """What loading a library by its SONAME, and links in *folder* and elsewhere, come to."""
    import ctypes
    import os

    links = (f"{folder}/libcuda.so", "/usr/lib/gbm/nvidia-drm_gbm.so")
    ctypes.CDLL(name)
    found = [os.readlink(path) for path in (*links, "/lib")]
    return found, os.environ.get("LD_LIBRARY_PATH", ""), os.listdir("/dev/dri")


@pytest.mark.parametrize("layer", [Layer.NONE, Layer.AUTO])
def test_the_libraries_of_a_generated_specification_are_found_in_another_root(
    run_inside, generate, layer
):
    libraries = str(Path(c_library()).parent)
    generate(f"{libraries}/vdpau".replace("/usr/lib", "/lib"))  # which is a link there
    links, searched, nodes_in_dri = run_inside(
        load, SONAME, libraries, devices=("nvidia.com/gpu=0",), rootfs=str(roots.directory()),
        layer=layer,
    )  # fmt: skip
    assert links == ["libcuda.so.1", "../libdriver.so.575.57.08", "usr/lib"]
    assert searched == ""
    assert nodes_in_dri == ["renderD128"]


def test_a_library_in_a_folder_of_its_own_is_found_by_a_variable(run_inside, generate, folder):
    generate("/opt/driver")
    where = Path(c_library()).parent
    text = (folder / "nvidia.yaml").read_text()
    # Nowhere else than there.
    (folder / "nvidia.yaml").write_text(
        text.replace(f"{where}/libcuda.so.575.57.08", "/opt/driver/libcuda.so.575.57.08")
    )

    def look(name):
        import ctypes
        import os

        ctypes.CDLL(name)
        return os.environ["LD_LIBRARY_PATH"], sorted(os.listdir("/opt/driver"))

    variable, names = run_inside(
        look, SONAME, devices=("nvidia.com/gpu=0",), rootfs=str(roots.directory())
    )
    assert variable == "/opt/driver"
    assert names == [SONAME, "libcuda.so.575.57.08", "libdriver.so.575.57.08"]


def test_with_the_hosts_root_a_generated_specification_adds_its_nodes(run_inside, generate):
    generate("/opt/driver")
    numbers, answers, names = run_inside(
        use, "/dev/nvidia0", using=(answer_of,), devices=("nvidia.com/gpu=0",)
    )
    assert (numbers, answers[0]) == ([*FULL], "True")
    assert {*names} == {*USUAL, "nvidia0", "nvidiactl", "dri"}


def test_drivers_show_to_who_has_a_gpu_of_nvidias_and_cannot_be_written_to(run_inside, generate):
    generate("/opt/driver")

    def look():
        import os

        told = answer_of(lambda: os.chmod("/proc/devices", 0o666))
        return "Character devices" in open("/proc/devices").read(), told

    shown, told = run_inside(look, using=(answer_of,), devices=("nvidia.com/gpu=0",))
    assert shown
    assert told in {"EROFS", "EPERM"}


# -- the list that Linux holds a box to


OPENS = """
import errno, os, sys
open(sys.argv[1], "w").write("0")
for path in sys.argv[2:]:
    try:
        os.close(os.open(path, os.O_RDWR))
        print("opened")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def answers_in(join: str, *paths: Path) -> list[str]:
    """What root of the machine gets for *paths* when it is in the group of *join*."""
    words = [sys.executable, "-c", OPENS, join, *map(str, paths)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture
def others(folder: Path) -> tuple[Path, Path]:
    """Nodes that a box could come by: one of its list, and one that no box is given."""
    found = []
    for name, device in (("zero", (1, 5)), ("autofs", (10, 235))):
        os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(*device))
        found.append(folder / name)
    return found[0], found[1]


@pytest.mark.requires("cgroup-v1")
@pytest.mark.parametrize("devices", [(), (NAME,)])
def test_no_other_device_can_be_opened_in_a_box_even_by_root(
    sandbox: Boxes, specify, others, devices
):
    specify()
    assert answers_in("/dev/null", *others) == ["opened", "opened"]
    with sandbox(devices=devices) as box:
        group = f"/sys/fs/cgroup/devices/sandbox-provisioner/{box.handle.record.sandbox_id}"
        assert answers_in(f"{group}/tasks", *others) == ["opened", "EPERM"]
        assert answers_in(f"{group}/tasks", Path("/dev/kmsg")) == ["EPERM"]


@pytest.fixture
def group() -> Iterator[Path]:
    """Of cgroup v2, which takes programs without any controller."""
    point = next(
        (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()
         if line.split()[2] == "cgroup2"), "",
    )  # fmt: skip
    if not point:
        pytest.skip("no cgroup2 is mounted")
    made = Path(tempfile.mkdtemp(prefix="sandbox-devices-", dir=point))
    yield made
    made.rmdir()


def test_a_program_lets_a_group_of_v2_open_what_it_lists_and_nothing_else(group, others):
    kernel_calls.limit_devices(str(group), program([Allowed(1, 3), Allowed(1, 5), Allowed(5, 0)]))
    join = f"{group}/cgroup.procs"
    assert answers_in(join, Path("/dev/null"), *others) == ["opened", "opened", "EPERM"]


def test_a_program_tells_reading_from_writing(group, folder):
    kernel_calls.limit_devices(str(group), program([Allowed(1, None, "r"), Allowed(10, 235, "w")]))
    os.mknod(folder / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    script = OPENS.replace("O_RDWR", "O_RDONLY")
    words = [sys.executable, "-c", script, f"{group}/cgroup.procs", str(folder / "zero")]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert found == ["opened"]
    assert answers_in(f"{group}/cgroup.procs", folder / "zero") == ["EPERM"]


# -- an ordinary user


AS_USER = """
import sys
from pathlib import Path
import boxes, probes, test_devices
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.devices.facts import cdi
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime, folder = sys.argv[1:]
cdi.FOLDERS = (folder,)
try:
    with boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))(
        devices=(test_devices.NAME,)
    ) as box:
        print(box.call(test_devices.use, "/dev/gpu0", using=(probes.answer_of,))[:2])
except SandboxError as error:
    print(error)
"""


@pytest.mark.requires("setpriv", "public-python")
def test_an_ordinary_user_is_shown_the_node_that_they_may_use(user_home, specify, folder):
    specify()
    words = ("-c", AS_USER, f"{user_home}/work", f"{user_home}/run", str(folder))
    assert "is not yours to use" in as_user(user_home, *words)
    os.chown(folder / "real", USER, USER)
    said = as_user(user_home, *words).strip().splitlines()[-1]
    assert said.startswith("[[1, 7], ['True', 'ENOSPC'") or said.startswith("([1, 7], ['True'")


@pytest.mark.parametrize("step", ["make-devices", "attach-devices", "limit-devices"])
def test_a_device_that_cannot_be_had_or_held_starts_nothing(sandbox, specify, monkeypatch, step):
    specify()
    monkeypatch.setenv("SANDBOX_FAIL_AT", step)
    with pytest.raises(LaunchError, match=step), sandbox(devices=(NAME,)):
        pass
