"""Which directories with images of users everybody knows, and looks into."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_provisioner import mounts
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.mounts import Mount


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / "storage"
    found.mkdir(mode=0o700)
    return found


def test_a_directory_whose_disk_is_not_mounted_now_is_not_forgotten(
    directory: Path, tmp_path: Path
) -> None:
    gone, link = tmp_path / "gone", tmp_path / "link"
    link.symlink_to("there")
    for layers in (gone, link, tmp_path / "there", link):
        images.note(layers, directory)
    assert images._noted(directory) == [gone, tmp_path / "there"]


@pytest.mark.parametrize(
    ("filesystem", "device", "is_asked"),
    [("nfs4", "server:/", False), ("ext4", "/dev/sdb", True), ("nfs4", "/dev/sda", True)],
)
def test_a_start_asks_no_file_server_of_other_images(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    filesystem: str, device: str, is_asked: bool,
) -> None:  # fmt: skip
    layers = tmp_path / "server/layers"
    image = layers / "user/1/root/disk"
    image.parent.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(1 << 30)
    images.note(layers, directory)
    listed = (
        Mount(1, 0, "/", "ext4", device="/dev/sda"),
        Mount(2, 1, str(tmp_path / "server"), filesystem, device=device),
        Mount(3, 1, "/server", "nfs4", device="else:/"),
    )
    monkeypatch.setattr(mounts, "_mounts", lambda: listed)
    promised = images.room_bytes(directory)[1]
    assert (promised == 1 << 30) is is_asked
