"""What the person at the notebook reads when the work directory holds what it may."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disks
import pytest

from sandbox_provisioner.facilities.storage.facts import STORAGE


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory on a file system with project quotas, whose name has a blank in it."""
    with disks.disk_with_quotas("xfs") as disk:
        folder = disk / f"my {uuid.uuid4().hex[:4]}"
        folder.mkdir()
        os.chown(folder, 4711, 4711)
        yield folder
        os.chdir("/")
        shutil.rmtree(folder)


@pytest.mark.requires("userns", "root", "project-quotas")
def test_who_has_filled_the_work_directory_is_told_why_and_goes_on(
    kernel: Any, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # It is looked whether there is room every 5 s at least.
    fill = (
        "import time\nfile = open('file', 'wb', buffering=0)\ntry:\n"
        "    while True: file.write(bytes(65536))\nexcept OSError:\n    time.sleep(10)\n    raise"
    )
    with kernel(workdir_limit="8M") as k:
        k.manager.log.propagate = True
        request = k.client.execute(fill)
        told = k.until(lambda m: "is full" in m["content"].get("text", ""), request)
        assert f"{workdir} is full; it holds 8 MiB" in told["content"]["text"]
        assert "raise workdir_limit" in told["content"]["text"]
        failed = k.until(lambda m: m["msg_type"] == "error", request)
        assert "No space left" in failed["content"]["evalue"]
        k.until(lambda m: m["content"].get("execution_state") == "idle", request)
        assert k.run("6 * 7") == "42"
        assert k.manager.is_alive()
        assert f"{workdir} of kernel" in caplog.text


@pytest.fixture
def storage() -> Iterator[None]:
    """Root's storage on a file system with project quotas."""
    STORAGE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with disks.disk_with_quotas("ext4") as disk:
        disk.chmod(0o700)
        subprocess.run(["mount", "--bind", str(disk), str(STORAGE)], check=True)
        yield
        subprocess.run(["umount", str(STORAGE)], check=True)


@pytest.mark.requires("userns", "root", "project-quotas")
def test_who_has_filled_a_folder_with_a_quota_is_told_why_and_goes_on(
    kernel: Any, storage: None
) -> None:
    fill = (
        "import time\nfile = open('/tmp/file', 'wb', buffering=0)\ntry:\n"
        "    while True: file.write(bytes(65536))\nexcept OSError:\n    time.sleep(10)\n    raise"
    )
    with kernel(disk_limit="8M", disk_backend="project") as k:
        request = k.client.execute(fill)
        told = k.until(lambda m: "is full" in m["content"].get("text", ""), request)
        assert "/tmp is full; it holds 8 MiB" in told["content"]["text"]
        assert "raise disk_limit" in told["content"]["text"]
        failed = k.until(lambda m: m["msg_type"] == "error", request)
        assert "quota exceeded" in failed["content"]["evalue"]
        k.until(lambda m: m["content"].get("execution_state") == "idle", request)
        # Before it IPython says that there is no room for its history.
        assert k.run("6 * 7").endswith("42")
