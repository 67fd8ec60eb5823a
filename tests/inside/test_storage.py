"""How much a kernel can write, by each back end, against each way to write more."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import uuid
from pathlib import Path

import pytest
import roots
from boxes import request_for
from writing import WAYS, in_attributes, map_more_than_there_is, try_a_way, write_all

from sandbox_provisioner.app.leftovers import remove_left_images
from sandbox_provisioner.app.running import look
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.facts import STORAGE
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns")

MIB = 1 << 20
SIZE = 16 * MIB
SLEEP = ["/bin/sleep", "1000"]
INODES = 512
TMPFS, IMAGE = "tmpfs", pytest.param("image", marks=pytest.mark.requires("root", "loop"))
every_backend = pytest.mark.parametrize("backend", [TMPFS, IMAGE])


def limits_of(backend, **more):
    return Limits(disk_bytes=SIZE, disk_backend=DiskBackend(backend), **more)


def loops():
    """The files that loop devices of this machine have."""
    found = Path("/sys/block").glob("loop*/loop/backing_file")
    return {file.read_text().strip() for file in found}


# -- ways to write more than the limit


@every_backend
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_way_leads_past_the_limits(sandbox, backend, way):
    inodes = None if way is in_attributes else INODES  # these would be met first
    with sandbox(limits=limits_of(backend, inodes=inodes)) as box:
        number, used, files = box.call(try_a_way, way.__name__, SIZE, "/tmp", using=(way,))
        assert number in {errno.ENOSPC, errno.EDQUOT}
        assert used <= SIZE
        assert inodes is None or files <= inodes
        if backend == "image":
            image = STORAGE / box.handle.record.sandbox_id
            assert image.stat().st_blocks * 512 <= SIZE


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_way_gets_more_where_there_is_more(run_inside, way):
    """The control: what stopped it was the limit."""
    roomy = Limits(disk_bytes=8 * SIZE, inodes=8 * INODES, disk_backend=DiskBackend.TMPFS)
    words = (way.__name__, 8 * SIZE, "/tmp")
    number, used, files = run_inside(try_a_way, *words, using=(way,), limits=roomy)
    assert number == errno.ENOSPC
    assert used > SIZE or files > INODES


# -- what an image is, and what is left of it


IMAGE_ALONE = pytest.mark.requires("root", "loop")


def of_tmp():
    import os

    found = os.statvfs("/tmp")
    (line,) = (line.split() for line in open("/proc/mounts") if line.split()[1] == "/tmp")
    same = [os.stat(path).st_dev for path in ("/tmp", "/run", "/var/tmp", os.path.expanduser("~"))]
    return line[2], line[3].split(","), found.f_files, len(set(same))


@IMAGE_ALONE
def test_a_root_servers_kernel_writes_to_an_image_that_is_gone_when_it_ends(sandbox):
    with sandbox(limits=Limits(disk_bytes=1 << 30, inodes=1000)) as box:
        kind, options, files, count = box.call(of_tmp)
        assert (kind, count) == ("ext4", 1)
        assert {"nosuid", "nodev"} <= {*options}
        assert files == 896  # 8 groups of 16 each: never more than was asked for
        path = STORAGE / box.handle.record.sandbox_id
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_uid == 0
        assert path.stat().st_size == 1 << 30
        assert path.stat().st_blocks * 512 < 4 * MIB
        assert str(path) in loops()
    assert not path.exists()
    assert str(path) not in loops()


@IMAGE_ALONE
def test_fifty_images_can_be_had_at_once_and_nothing_is_left(launcher, workdir):
    async def start_all():
        requests = (request_for(workdir, SLEEP, limits=limits_of("image")) for _ in range(50))
        handles = await asyncio.gather(*map(launcher.start, requests))
        paths = {str(STORAGE / handle.record.sandbox_id) for handle in handles}
        assert paths <= loops()
        for handle in handles:
            await handle.close()
        return paths

    assert not asyncio.run(start_all()) & loops()


@every_backend
def test_a_list_tells_how_much_is_written(sandbox, backend, runtime_dir):
    with sandbox(limits=limits_of(backend)) as box:
        (found,) = (one.disk for one in look(runtime_dir) if one.record.storage == backend)
        box.call(write_all, "/tmp/file")
        (full,) = (one.disk for one in look(runtime_dir) if one.record.storage == backend)
        assert full.used_bytes - found.used_bytes > 0.9 * SIZE
        assert full.inodes == found.inodes + 1
        assert full.size_bytes <= SIZE


@IMAGE_ALONE
def test_what_no_box_has_any_more_is_collected():
    STORAGE.mkdir(parents=True, exist_ok=True)
    left = STORAGE / uuid.uuid4().hex[:12]
    left.write_bytes(b"")
    remove_left_images()
    assert not left.exists()


@every_backend
def test_what_was_removed_is_room_again(sandbox, backend):
    with sandbox(limits=limits_of(backend)) as box:
        first = box.call(write_all, "/tmp/file")
        assert 0 < first <= SIZE
        assert box.call(write_all, "/tmp/other") < MIB
        box.call(remove_the_file)
        assert box.call(write_all, "/tmp/file") > first * 0.9


def remove_the_file():
    import os

    os.unlink("/tmp/file")


@every_backend
def test_a_mapping_that_finds_no_room_names_the_limit_of_the_disk(sandbox, backend):
    with sandbox(limits=limits_of(backend)) as box:
        box.send(map_more_than_there_is, "/tmp")
        story = box.wait()
        assert (story.kind, story.signal) == (EndKind.DISK_FULL, signal.SIGBUS)
        assert "disk_limit" in story.reason
        assert 0.9 * SIZE < story.full_bytes <= SIZE


def test_of_two_limits_in_memory_the_smaller_one_counts(run_inside):
    for disk, tmp in ((4 * MIB, 8 * MIB), (8 * MIB, 4 * MIB)):
        limits = Limits(disk_bytes=disk, tmp_bytes=tmp, disk_backend=DiskBackend.TMPFS)
        assert run_inside(write_all, "/tmp/file", limits=limits) <= 4 * MIB


@pytest.mark.requires("root")
def test_no_kernel_works_where_others_have_what_they_write(launcher):
    images.make_directory()
    with pytest.raises(SpecError, match="would be given that"):
        launcher.explain(request_for(STORAGE, SLEEP))


@IMAGE_ALONE
def test_more_than_the_disk_has_is_refused_with_the_figures(sandbox):
    with pytest.raises(HostError) as caught, sandbox(limits=Limits(disk_bytes=1 << 50)):
        pass
    told = caught.value.for_people()
    assert "1024 TiB" in told
    assert "free" in told
    assert "disk_limit" in told


@pytest.mark.ordinary_user
def test_an_ordinary_users_limit_is_of_memory_and_an_image_is_refused(sandbox):
    with sandbox(limits=Limits(disk_bytes=SIZE)) as box:
        assert box.call(of_tmp)[0] == "tmpfs"
        assert box.call(write_all, "/tmp/file") <= SIZE
    with pytest.raises(HostError, match="root") as caught, sandbox(limits=limits_of("image")):
        pass
    assert "auto" in caught.value.for_people()


@every_backend
def test_what_is_written_over_another_root_counts_with_the_rest(sandbox, backend, request):
    root = roots.copy(f"limited-{backend}-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    (root / "srv").mkdir(exist_ok=True)
    (root / "srv").chmod(0o777)
    with sandbox(rootfs=str(root), limits=limits_of(backend)) as box:
        first = box.call(write_all, "/srv/file")
        assert SIZE // 2 < first <= SIZE
        assert box.call(write_all, "/tmp/other") < MIB
