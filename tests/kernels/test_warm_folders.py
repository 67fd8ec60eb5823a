"""What kernels from a nursery write, and spares, in folders with a project quota.

A nursery takes minutes where its machine is emulated, so this runs in no lane, but by hand:
``python -m tests.vm --only quotas tests/kernels/test_warm_folders.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disks
import pytest
from limited import sweep_folders
from warmth import came_from, made, spares

from sandbox_provisioner.facilities.storage import projects
from sandbox_provisioner.facilities.storage.facts import STORAGE

pytestmark = [
    pytest.mark.requires("userns", "root", "project-quotas"),
    pytest.mark.timeout(900),
]

FOLDERS = STORAGE / projects.FOLDERS
LIMIT = {"disk_limit": "8M", "disk_backend": "project"}
# How much can be written, of a limit that is all the file system's that it sees.
FILL = """
import os
with open("/tmp/file", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(1 << 16))
    except OSError:
        pass
found = os.statvfs("/tmp")
size = os.stat("/tmp/file").st_size >> 20
print(found.f_blocks * found.f_frsize >> 20, size)
os.unlink("/tmp/file")
"""


@pytest.fixture(autouse=True)
def storage() -> Iterator[None]:
    """Root's storage on a file system with project quotas, on which nothing is left."""
    STORAGE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with disks.disk_with_quotas("ext4") as disk:
        disk.chmod(0o700)
        subprocess.run(["mount", "--bind", str(disk), str(STORAGE)], check=True)
        try:
            yield
            sweep_folders()
            assert os.listdir(FOLDERS) == []
        finally:
            subprocess.run(["umount", str(STORAGE)], check=True)


def filled(k: Any) -> str:
    """What `FILL` prints; a sentence may stand before and after it."""
    found = re.search(r"^\d+ \d+$", k.run(FILL), re.M)
    return found[0] if found else ""


def test_a_kernel_from_a_nursery_and_a_spare_have_folders_of_their_own(
    warm: Any, runtime_dir: Path
) -> None:
    with warm(spares=1, **LIMIT) as k:
        assert filled(k) == "8 7"
        nursery = made(runtime_dir)
    (spare,) = spares(runtime_dir)
    assert (FOLDERS / spare.sandbox_id).exists()
    with warm(spares=1, **LIMIT) as k, warm(**LIMIT) as other:
        assert k.provisioner.handle.record.group == spare.sandbox_id
        assert came_from(other) == nursery.sandbox_id
        assert [filled(k), filled(other)] == ["8 7"] * 2
    assert not (FOLDERS / spare.sandbox_id).exists()
