"""What a kept layer has of the links that a device brings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_provisioner.facilities.root.inside import clean_layer
from sandbox_provisioner.facilities.root.inside.layer import Layer

CUDA, TOOL = "/usr/lib/libcuda.so.1", "/opt/bin/tool"


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    for name in ("upper", "work", "trash"):
        (tmp_path / "layer" / name).mkdir(parents=True)
    return tmp_path / "layer/upper"


@pytest.fixture
def box(upper: Path) -> Iterator[Any]:
    """One that begins with the layer of *upper*."""
    layer = Layer()
    layer.holder_fd, layer.folder = os.open(upper.parent.parent, os.O_PATH), "layer"
    root_fd = os.open(upper, os.O_PATH)
    yield SimpleNamespace(mounts=SimpleNamespace(root_fd=root_fd), part=lambda _: layer)
    os.close(root_fd)
    os.close(layer.holder_fd)


def start(box: Any, upper: Path, *links: str) -> None:
    clean_layer(box, "directory:/tmp", *(f"link:{path}" for path in links))
    for path in links:
        link = upper / path[1:]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("of-the-driver")


def test_links_of_a_device_go_when_the_next_box_has_another_or_none(box: Any, upper: Path) -> None:
    start(box, upper, CUDA, TOOL)
    start(box, upper, CUDA)
    assert (upper / CUDA[1:]).is_symlink()
    assert not (upper / TOOL[1:]).is_symlink()
    start(box, upper)
    assert not (upper / CUDA[1:]).is_symlink()
    assert os.listdir(upper.parent / "work") == []
    start(box, upper, TOOL)
    assert (upper / TOOL[1:]).is_symlink()


def test_what_a_kernel_put_in_the_place_of_such_a_link_is_its_own(box: Any, upper: Path) -> None:
    start(box, upper, CUDA, TOOL, "/etc/a/b")
    (upper / CUDA[1:]).unlink()
    (upper / CUDA[1:]).write_text("installed")
    (upper / TOOL[1:]).unlink()
    (upper / TOOL[1:]).mkdir()
    (upper / "etc/a").rename(upper / "elsewhere")
    (upper / "etc/a").symlink_to("../elsewhere")
    start(box, upper)
    assert (upper / CUDA[1:]).read_text() == "installed"
    assert (upper / TOOL[1:]).is_dir()
    assert (upper / "elsewhere/b").is_symlink()
    assert (upper / "etc/a").is_symlink()
