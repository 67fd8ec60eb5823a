"""What kernels install, kept when they have ended, and what an earlier one may have left there."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import roots
from boxes import Boxes, request_for
from layered import opened, own

from sandbox_provisioner import launch
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.errors import HostError, SandboxError, SpecError
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.facts import STORAGE, image_of
from sandbox_provisioner.facilities.storage.images import mounting
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.images import store as stores
from sandbox_provisioner.images.store import Store
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.layers import disks, kept
from sandbox_provisioner.layers.kept import layers_of, told_of
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import Layer, Limits

pytestmark = pytest.mark.requires("userns")

BASE = "/home/jovyan/.local"
MIB = 1 << 20
PATIENCE_SECONDS = 60.0
IMAGE_ALONE = pytest.mark.requires("root", "loop")


@pytest.fixture
def layers(new_folder: Callable[[], Path]) -> Path:
    return new_folder()


@pytest.fixture
def boxes(runtime_dir: Path, layers: Path, workdir: Path) -> Boxes:
    return Boxes(LocalLauncher(runtime_dir=str(runtime_dir), layer_dir=str(layers)), workdir)


@pytest.fixture
def own_root() -> Iterator[str]:
    """A root of which everything belongs to the kernel's user."""
    root = roots.folder() / f"layer-{uuid.uuid4().hex[:8]}"
    subprocess.run(["cp", "-a", roots.directory(), root], check=True)
    owner = 1000 if os.geteuid() == 0 else os.geteuid()
    for folder, folders, files in os.walk(root):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), owner, owner, follow_symlinks=False)
    yield str(root)
    shutil.rmtree(root)


@pytest.mark.requires("root", "loop", "mksquashfs")
def test_an_image_that_is_made_again_has_its_layer_and_what_has_changed_tells_of_that(
    boxes, layers, new_folder, monkeypatch
):
    monkeypatch.setattr(stores, "ROOTS_STORE", new_folder() / "images")
    store, told = Store(stores.ROOTS_STORE, os.geteuid()), []
    store.prepare()
    boxes.launcher.tell_once = told.append
    options = {"rootfs": "course", "layer": Layer.USER}

    def make(more: bytes = b"") -> None:
        with store.workplace() as folder:
            made = shutil.copy(roots.image("squashfs"), folder / "new")
            with open(made, "ab") as file:
                file.write(more)
            store.add(made, name="course", origin="")

    make()
    with boxes(**options) as box:
        box.call(write, MODULE)
    [(first, _)] = layers_of(layers, os.geteuid())
    store.remove("course")
    make()
    with boxes(**options) as box:
        assert box.call(there, MODULE) == [True]
    assert not told
    make(b"another content")
    with boxes(**options) as box:
        assert box.call(there, MODULE) == [False]
    (said,) = told
    assert f"what was installed over that stays in {first.path.name}, until" in said
    assert {told_of(*one)["root"] for one in layers_of(layers, os.geteuid())} == {"course"}
    make()
    with boxes(**options) as box:
        assert box.call(there, MODULE) == [True]
    assert told == [said]


def kept_of(layers: Path, name: str) -> bool:
    """Whether there is anything for the restarts of the kernel *name*."""
    return os.path.exists(layers / "kernel" / name) or os.access(STORAGE / name, os.F_OK)


def write(*paths):
    import os

    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(path)


def there(*paths):
    import os

    return [os.path.exists(path) for path in paths]


def look():
    import os
    import sys

    status = os.stat("/home/jovyan/.local")
    return [sys.flags.no_user_site, status.st_uid == os.getuid(), os.statvfs("/").f_flag & 1]


MODULE = f"{BASE}/lib/x/module.py"


# -- over the host's root


def test_what_is_installed_is_there_for_the_next_kernel_of_the_user(boxes, layers):
    with boxes(layer=Layer.USER) as box:
        box.call(write, MODULE)
    with boxes(layer=Layer.USER) as box:
        assert box.call(there, MODULE, f"{BASE}/bin") == [True, True]
        assert box.call(look) == [0, True, 1]
    with boxes() as box:
        assert box.call(there, MODULE) == [False]
    [(folder, holder)] = layers_of(layers, os.geteuid())
    assert (folder.path.name, folder.is_held, holder.root) == ("host", False, "host")


def test_a_second_kernel_is_told_who_has_the_layer(boxes):
    with boxes(layer=Layer.USER, sandbox_id="0123456789ab"):
        with pytest.raises(HostError, match=r"kernel 01234567 .* has had the layer since 20") as no:
            with boxes(layer=Layer.USER):
                pass
        assert "Shut that one down" in str(no.value)
    with boxes(layer=Layer.USER) as box:
        assert box.call(there, BASE) == [True]


def test_what_is_kept_for_a_restart_goes_with_the_kernel(boxes, layers):
    name = "0123456789ab"
    with boxes(layer=Layer.KERNEL, sandbox_id=name) as box:
        box.call(write, MODULE)
    boxes.launcher.sweep()
    with boxes(layer=Layer.KERNEL, sandbox_id=name) as box:
        assert box.call(there, MODULE) == [True]
    with boxes(layer=Layer.KERNEL) as box:
        assert box.call(there, MODULE) == [False]
        other = box.handle.record.sandbox_id
    for one in (name, other):
        boxes.launcher.forget(one)
        assert not kept_of(layers, one)


def test_what_a_killed_server_kept_for_restarts_is_collected(boxes, layers):
    name = "0123456789ab"
    with boxes(layer=Layer.KERNEL, sandbox_id=name) as box:
        owned = (kept._owned, layers / "kernel" / name), (disks._owned, name)
        (owner,) = filter(None, (of.pop(key, None) for of, key in owned))
        owner.forget()  # as the end of a process does
        boxes.launcher.sweep()
        assert kept_of(layers, name)  # it lives on
        box.call(write, MODULE)
    boxes.launcher.sweep()
    assert not kept_of(layers, name)


def leave_in_the_way(base):
    import os
    import shutil

    shutil.rmtree(f"{base}/lib", ignore_errors=True)
    shutil.rmtree(f"{base}/bin", ignore_errors=True)
    os.symlink("/proc/self/root/etc", f"{base}/lib")
    open(f"{base}/bin", "w").close()


def test_what_an_earlier_kernel_left_in_the_way_stops_no_start(boxes):
    with boxes(layer=Layer.USER) as box:
        box.call(leave_in_the_way, BASE)
    with boxes(layer=Layer.USER) as box:
        assert box.call(there, f"{BASE}/bin") == [True]


# -- over another root


def write_all_over(*paths):
    import os

    done = []
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
        done.append(os.path.exists(path))
    return done


@pytest.mark.parametrize("layer", [Layer.KERNEL, Layer.USER])
def test_what_is_written_into_another_root_is_kept(boxes, layers, own_root, layer):
    paths, name = ["/usr/lib/new", "/usr/share/x/y", MODULE], "0123456789ab"
    options = {"rootfs": own_root, "layer": layer, "sandbox_id": name}
    with boxes(**options) as box:
        assert all(box.call(write_all_over, *paths))
        box.call(remove, "/usr/bin/touch")
    with boxes(**options) as box:
        assert box.call(there, *paths, "/usr/bin/touch") == [True, True, True, False]
    boxes.launcher.forget(name)
    assert os.path.exists(f"{own_root}/usr/bin/touch")
    assert not os.path.exists(f"{own_root}/usr/lib/new")
    with boxes(rootfs=own_root) as box:
        assert box.call(there, paths[0]) == [False]


def remove(path):
    import os

    os.unlink(path)


def test_each_root_has_a_layer_of_its_own(boxes, layers, own_root):
    with boxes(rootfs=own_root, layer=Layer.USER):
        pass
    with boxes(layer=Layer.USER):
        pass
    names = [folder.path.name for folder, _ in layers_of(layers, os.geteuid())]
    assert len(names) == 2
    assert "host" in names


# What a kernel leaves in its layer for the next start: what is gone, and what stands there then.
LEFT = {
    "links": (["etc", "tmp", "run", "home", "opt"], "link", "/srv"),
    "links-up": (["etc", "tmp", "run", "home", "opt"], "link", "../../.."),
    "files": (["etc", "tmp", "run", "home", "opt"], "file", ""),
    "nothing": (["etc", "tmp", "run", "home", "opt"], "", ""),
    "own-files": (["etc/passwd", "etc/group", "etc/hosts", "etc/hostname"], "link", "/srv/x"),
    "own-folders": (["etc/passwd", "etc/group", "etc/hosts"], "folder", ""),
    "ours": ([".scratch", ".layer", ".image", ".review"], "link", "/srv"),
}


def plant(names, kind, text):
    """As far as it can be: what is mounted stays, and an ordinary user's kernel can do more."""
    import contextlib
    import os
    import shutil

    for name in names:
        path = f"/{name}"
        with contextlib.suppress(OSError):
            os.rename(path, f"/was-{name.replace('/', '-')}")
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            if kind == "link":
                os.symlink(text, path)
            elif kind == "file":
                open(path, "w").close()
            elif kind == "folder":
                os.makedirs(f"{path}/deep/er")


def works_still():
    import os

    found = {line.split()[4] for line in open("/proc/self/mountinfo")}
    own = {"/proc", "/tmp", "/run", "/home/jovyan", "/home/jovyan/.local", "/dev/shm"} - found
    with open("/tmp/x", "w") as file:
        file.write("x")
    passwd = os.lstat("/etc/passwd")
    return [sorted(own), passwd.st_nlink, "jovyan" in open("/etc/passwd").read(), os.getcwd()]


def plant_in_upper(upper: Path, kind: str) -> None:
    """What no kernel can make that is held: whoever got out of the box makes it."""
    for name in ("etc", "proc", "tmp", "run", "home", "dev", ".scratch"):
        path = upper / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        if kind == "links":
            path.symlink_to("/srv")
        elif kind == "fifos":
            os.mkfifo(path)
        else:
            path.write_text("")
        own(path, 1000)


@pytest.mark.parametrize("kind", LEFT)
def test_nothing_that_a_kernel_leaves_in_its_layer_moves_the_boxs_own(
    boxes, own_root, workdir, kind
):
    with boxes(rootfs=own_root, layer=Layer.USER) as box:
        box.call(plant, *LEFT[kind])
    with boxes(rootfs=own_root, layer=Layer.USER) as box:
        assert box.call(works_still) == [[], 1, True, str(workdir)]


@pytest.mark.parametrize("kind", ["links", "fifos", "files"])
def test_nothing_that_stands_in_the_upper_directory_moves_the_boxs_own(
    boxes, layers, own_root, workdir, kind
):
    with boxes(rootfs=own_root, layer=Layer.USER):
        pass
    [(folder, _)] = layers_of(layers, os.geteuid())
    with opened(folder) as there:
        plant_in_upper(there / "upper", kind)
    with boxes(rootfs=own_root, layer=Layer.USER) as box:
        assert box.call(works_still) == [[], 1, True, str(workdir)]


# -- in an image of root's


def fill(path):
    import os

    fd, written = os.open(path, os.O_WRONLY | os.O_CREAT), 0
    try:
        while True:
            written += os.write(fd, bytes(1 << 16))
    except OSError:
        return written
    finally:
        os.close(fd)


def room():
    import os

    found = os.statvfs("/tmp")
    return found.f_blocks * found.f_frsize, os.listdir("/tmp")


def limited(mib, **more):
    return {"layer": Layer.USER, "limits": Limits(disk_bytes=mib * MIB), **more}


@IMAGE_ALONE
def test_one_limit_holds_for_a_layer_the_home_and_tmp_and_only_the_layer_is_kept(boxes, own_root):
    options = limited(32, rootfs=own_root)
    with boxes(**options) as box:
        assert box.call(fill, "/usr/lib/new") > 16 * MIB
        for path in ("/tmp/x", f"{BASE}/x", "/home/jovyan/x"):
            assert box.call(fill, path) < MIB
        box.call(remove, "/usr/lib/new")
        assert box.call(fill, "/tmp/x") > 16 * MIB
        box.call(write_all_over, "/usr/lib/other")
    with boxes(**options) as box:
        assert box.call(there, "/usr/lib/other", "/tmp/x", "/home/jovyan/x") == [True, False, False]
        assert box.call(fill, "/tmp/x") > 16 * MIB


@IMAGE_ALONE
def test_a_larger_limit_makes_a_layer_larger_and_a_smaller_one_is_refused(boxes, layers):
    with boxes(**limited(32)) as box:
        box.call(write, MODULE)
        size, _ = box.call(room)
    with boxes(**limited(300)) as box:
        assert box.call(there, MODULE) == [True]
        assert box.call(room)[0] > size + 200 * MIB
    with pytest.raises(HostError, match="has 300 MiB") as told, boxes(**limited(64)):
        pass
    assert "jupyter sandbox layer reset host" in told.value.for_people()
    with boxes(layer=Layer.USER) as box:  # without a limit it is as it was
        assert box.call(there, MODULE) == [True]


@IMAGE_ALONE
def test_no_kernel_starts_with_more_inodes_than_asked_for_in_a_layer_that_is_there(boxes, layers):
    with boxes(**limited(32)) as box:
        box.call(write, MODULE)
    fewer = {"layer": Layer.USER, "limits": Limits(disk_bytes=300 * MIB, inodes=512)}
    # 4096 in a group, three of which it would have.
    with pytest.raises(HostError, match="has 12288 inodes") as told, boxes(**fewer):
        pass
    assert "inode_limit to 12288" in told.value.for_people()
    as_many = {"layer": Layer.USER, "limits": Limits(disk_bytes=32 * MIB, inodes=4096)}
    with boxes(**as_many) as box:
        assert box.call(there, MODULE) == [True]


@IMAGE_ALONE
def test_what_cannot_be_mounted_is_told_and_stays_as_it_was(boxes, layers):
    with boxes(**limited(32)) as box:
        box.call(write, MODULE)
    [(folder, _)] = layers_of(layers, 0)
    image = Path(folder.disk)
    images.take_image(fd := images.open_image(folder.disk))
    os.close(fd)
    whole = image.read_bytes()
    image.write_bytes(whole[:1024] + bytes(1024) + whole[2048:])
    with pytest.raises(HostError, match="cannot be mounted") as told, boxes(**limited(32)):
        pass
    assert f"e2fsck -f {image}" in told.value.for_people()
    image.write_bytes(whole)
    with boxes(**limited(32)) as box:
        assert box.call(there, MODULE) == [True]


@IMAGE_ALONE
def test_a_file_system_that_linux_found_errors_in_is_not_written_on(boxes, layers):
    with boxes(**limited(32)):
        pass
    [(folder, _)] = layers_of(layers, 0)
    fd = images.open_image(folder.disk)
    images.take_image(fd)
    os.pwrite(fd, bytes([os.pread(fd, 1, 1024 + 0x3A)[0] | 2]), 1024 + 0x3A)  # s_state
    os.close(fd)
    with pytest.raises(HostError, match="found errors"), boxes(**limited(32)):
        pass


@IMAGE_ALONE
def test_a_kernel_that_never_started_keeps_nothing(boxes, layers, monkeypatch):
    monkeypatch.setenv("SANDBOX_FAIL_AT", "pivot")
    name = "0123456789ab"
    with pytest.raises(SandboxError), boxes(layer=Layer.KERNEL, sandbox_id=name):
        pass
    assert not kept_of(layers, name)


@IMAGE_ALONE
@pytest.mark.parametrize(
    "options",
    [{"layer": Layer.KERNEL}, {"limits": Limits(disk_bytes=64 * MIB)}],
    ids=["kernel", "limit"],
)
def test_an_image_that_was_ready_becomes_the_next_kernels_and_goes_with_it(boxes, options):
    name = "0123456789ab"
    request = request_for(boxes.workdir, **options)
    boxes.launcher.prepare_disk(request, PATIENCE_SECONDS)
    boxes.launcher.prepare_disk(request, PATIENCE_SECONDS)  # there is one
    [(ready, _, timer)] = disks._ready._there.values()
    number = (STORAGE / ready).stat().st_ino
    with boxes(sandbox_id=name, **options) as box:
        assert (STORAGE / name).stat().st_ino == number
        assert not (STORAGE / ready).exists()
        assert timer.finished.is_set()
        box.call(write, MODULE)
    if "layer" in options:
        boxes.launcher.prepare_disk(request, PATIENCE_SECONDS)
        with boxes(sandbox_id=name, **options) as box:  # a restart has what it had
            assert box.call(there, MODULE) == [True]
        assert len(disks._ready._there) == 1
    boxes.launcher.forget(name)
    disks.drop_ready()
    assert not kept_of(boxes.workdir, name)


@IMAGE_ALONE
def test_an_image_that_nobody_comes_for_goes_after_its_time(boxes):
    boxes.launcher.prepare_disk(request_for(boxes.workdir, layer=Layer.KERNEL), 0.0)
    for timer in [
        thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)
    ]:
        timer.join(PATIENCE_SECONDS)
    assert not disks._ready._there


@pytest.fixture
def lasting(new_folder: Callable[[], Path]) -> Callable[..., disks.Disk]:
    """The image of a user's layer, as each start has it."""
    folder = new_folder()

    def disk(mib: int = 32) -> disks.Disk:
        name, storage = str(folder / "disk"), image_of(mib * MIB)
        return disks.Disk(name, storage, folder, keeps=True, lasts=True)

    return disk


def capacity(mounts: disks.Mounts) -> int:
    found = os.fstatvfs(mounts.layer)
    mounts.forget()
    return found.f_blocks * found.f_frsize


class Killed(BaseException):
    """What becomes of a program with its process."""


@IMAGE_ALONE
@pytest.mark.parametrize("ends", [Killed, OSError])
def test_a_growth_that_did_not_end_is_resumed(lasting, monkeypatch, ends):
    capacity(lasting().mount())
    run = images._run

    def ended(command, *arguments, **options):
        if command[0].endswith("resize2fs"):
            raise ends()
        run(command, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(images, "_run", ended)
        with pytest.raises((Killed, HostError)):
            lasting(64).mount()
    if ends is OSError:  # which has written nothing
        assert os.path.getsize(lasting().name) == 32 * MIB
        assert capacity(lasting().mount()) < 32 * MIB
    assert 48 * MIB < capacity(lasting(64).mount()) < 64 * MIB
    assert os.path.getsize(lasting().name) == 64 * MIB


@pytest.mark.ordinary_user
def test_another_root_has_another_layer_also_of_one_kernel(boxes, layers, own_root):
    name, told = "0123456789ab", []
    boxes.launcher.tell_once = told.append
    over = {"layer": Layer.KERNEL, "sandbox_id": name}
    with boxes(rootfs=own_root, **over) as box:
        box.call(write_all_over, "/usr/lib/new")
    with boxes(**over) as box:
        assert box.call(there, "/usr/lib/new", MODULE) == [False, False]
        box.call(write, MODULE)
    assert sum("it begins with an empty layer" in text for text in told) == 1
    with boxes(**over) as box:
        assert box.call(there, MODULE) == [True]
    assert sum("it begins with an empty layer" in text for text in told) == 1
    boxes.launcher.forget(name)
    assert not kept_of(layers, name)


def marked(disk: disks.Disk, name: str) -> list[str]:
    """What it has in its layer at first; then also *name*."""
    mounts = disk.mount()
    try:
        folder = f"{mounts.layer}/upper" if disk.keeps else f"{mounts.scratch}"
        upper = Path("/proc/self/fd", folder)
        found = sorted(set(os.listdir(upper)) - {"lost+found"})
        (upper / name).mkdir()
        return found
    finally:
        mounts.forget()


@pytest.fixture
def restarting(new_folder: Callable[[], Path]) -> Iterator[Callable[..., disks.Disk]]:
    """The image of one kernel, as each of its starts has it."""
    name, folder = uuid.uuid4().hex[:12], new_folder()
    storage = image_of(32 * MIB)
    yield lambda over: disks.Disk(name, storage, folder, keeps=bool(over), owned_over=over)
    disks.end(name)
    if fd := images.open_image(name):
        images.take_image(fd)
        os.close(fd)
        images.sweep()


@IMAGE_ALONE
def test_a_restart_has_the_layer_over_its_root_and_no_other_one(restarting):
    found = [marked(restarting(root), mark) for root, mark in zip("aabb", "1234", strict=True)]
    assert found == [[], ["1"], [], ["3"]]


@IMAGE_ALONE
def test_what_is_no_layer_is_nothing_to_a_restart(restarting):
    assert marked(restarting(""), "1") == marked(restarting(""), "2") == []
    assert marked(restarting("a"), "3") == []
    assert marked(restarting(""), "4") == []


@IMAGE_ALONE
@pytest.mark.parametrize("layer", ["", "a"])
def test_a_broker_that_finds_a_kernel_keeps_no_more_than_a_layer(restarting, layers, layer):
    disk = restarting(layer)
    marked(disk, "1")
    if layer:
        disks._owned.pop(disk.name).forget()  # as the end of a process does
    record = Record(sandbox_id=disk.name, layer=layer)
    Kept(str(layers), 1.0).adopt(0, record)
    assert disks.is_owned_over(disk.name, layer) is bool(layer)
    assert marked(restarting(layer), "2") == (["1"] if layer else [])


@IMAGE_ALONE
def test_a_layer_of_another_servers_is_left_to_it_with_no_descriptor(restarting):
    disk = restarting("a")
    marked(disk, "1")
    theirs, before = disks._owned.pop(disk.name), os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match="another server"):
        disks.own(disk.name, "a")
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(HostError, match="another server"):
        disk.mount()
    theirs.forget()


@IMAGE_ALONE
def test_a_layer_without_any_room_left_can_be_had_again(lasting):
    mounts = lasting().mount()
    top = Path(f"/proc/self/fd/{mounts.layer}")
    (top / "tmp").mkdir()
    (top / "trash/1").mkdir()
    fill(str(top / "upper/large"))
    with pytest.raises(OSError, match="No space left"):
        while True:  # the last blocks, which are too few for a large file's
            (top / "upper" / uuid.uuid4().hex).mkdir()
    mounts.forget()
    mounts = lasting().mount()
    try:
        top = Path(f"/proc/self/fd/{mounts.layer}")
        assert sorted(os.listdir(top)) == ["base", "lost+found", "trash", "upper", "work"]
        assert os.listdir(top / "trash") == []
        assert (top / "upper/large").stat().st_size > 16 * MIB
    finally:
        mounts.forget()


@IMAGE_ALONE
def test_only_a_new_image_is_read_ahead(lasting, monkeypatch):
    read = []
    monkeypatch.setattr(mounting, "_keep_in_memory", lambda image, _: read.append(image))
    for _ in range(2):
        lasting().mount().forget()
    assert len(read) == 1


@IMAGE_ALONE
def test_a_restart_needs_no_room_that_it_has(boxes, monkeypatch):
    monkeypatch.setattr(launch, "usual_size", lambda *_, **__: 0)
    file, root = ("kernel.json", "{}"), roots.directory()
    request = request_for(boxes.workdir, rootfs=str(root), connection_file=file)
    assert boxes.launcher.settled(request).spec.layer is Layer.AUTO
    fd = images.make_image(request.sandbox_id, image_of(32 * MIB))
    try:
        assert boxes.launcher.settled(request).spec.layer is Layer.KERNEL
    finally:
        os.close(fd)
        images.sweep()


@IMAGE_ALONE
def test_what_users_keep_is_promised_as_well(boxes, layers):
    with boxes(**limited(64)):
        pass
    # Whoever asks, also for a layer_dir of another one's on the same disk.
    promised = [images.room_bytes(layers=folder)[1] for folder in (layers, layers / "none")]
    (image,) = layers.glob("user/*/*/disk")
    image.unlink()
    left = [before - images.room_bytes(layers=layers)[1] for before in promised]
    assert all(48 * MIB < one <= 64 * MIB for one in left)


@IMAGE_ALONE
def test_where_there_can_be_no_image_a_folder_is_kept_and_no_limit(boxes, layers, monkeypatch):
    monkeypatch.setattr(launch, "image_obstacle", lambda **_: "there is no loop device")
    with boxes(layer=Layer.USER) as box:
        box.call(write, MODULE)
    [(folder, _)] = layers_of(layers, 0)
    assert folder.is_folder
    for obstacle in ("there is no loop device", ""):
        monkeypatch.setattr(launch, "image_obstacle", lambda why=obstacle, **_: why)
        with boxes(layer=Layer.USER) as box:
            assert box.call(there, MODULE) == [True]
        with pytest.raises(HostError, match='layer = "user" with disk_limit'), boxes(**limited(32)):
            pass


def test_what_is_kept_is_not_in_memory(boxes):
    limits = Limits(disk_bytes=32 * MIB, disk_backend=DiskBackend.TMPFS)
    with pytest.raises(SpecError, match='layer = "user" with disk_backend = "tmpfs"'):
        boxes.explain(layer=Layer.USER, limits=limits)


@pytest.mark.ordinary_user
def test_a_user_whom_nothing_limits_is_promised_no_limit(boxes):
    with pytest.raises(HostError, match='layer = "user" with disk_limit'), boxes(**limited(32)):
        pass


@IMAGE_ALONE
def test_an_image_that_is_ready_is_nobodys_who_was_forked(boxes):
    boxes.launcher.prepare_disk(request_for(boxes.workdir, layer=Layer.KERNEL), PATIENCE_SECONDS)
    child = os.fork()
    if child == 0:
        os._exit(len(list(disks._ready.sizes())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(disks._ready.sizes())) == 1
    disks.drop_ready()
