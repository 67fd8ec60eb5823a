"""The sources of others' test suites, as their authors publish them: a wheel has no tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# Named after the user: in a shared /tmp nobody else's folder is taken for ours.
CACHE = Path(tempfile.gettempdir(), f"sandbox-provisioner-suites-{os.geteuid()}")
_PATIENCE_SECONDS = 300


def unpacked(name: str, version: str) -> Path:
    """The unpacked source distribution of *name*, from the package index the first time."""
    CACHE.mkdir(mode=0o700, exist_ok=True)
    assert CACHE.stat().st_uid == os.geteuid()
    folder = CACHE / f"{name}-{version}"
    if not folder.is_dir():
        archive = _download(name, version)
        with tempfile.TemporaryDirectory(dir=CACHE) as place, tarfile.open(archive) as tar:
            tar.extractall(place, filter="data")
            Path(place, folder.name).rename(folder)
    return folder


def _download(name: str, version: str) -> Path:
    command = ("pip", "download", "--quiet", "--no-deps", "--no-binary", name, "--dest", CACHE)
    subprocess.run(
        [sys.executable, "-m", *map(str, command), f"{name}=={version}"],
        check=True,
        timeout=_PATIENCE_SECONDS,
    )
    return CACHE / f"{name}-{version}.tar.gz"
