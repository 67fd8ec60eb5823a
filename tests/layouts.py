"""layouts.py - in the test process: OCI image layouts, written by hand, honest or not."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
Layer = bytes


def member(
    name: str, content: bytes | None = None, *, kind: bytes = tarfile.REGTYPE, **more: Any
) -> tuple[tarfile.TarInfo, bytes | None]:
    found = tarfile.TarInfo(name)
    found.type = kind
    found.size = len(content or b"")
    for attribute, value in more.items():
        setattr(found, attribute, value)
    return found, content


def folder(name: str, **more: Any) -> tuple[tarfile.TarInfo, None]:
    return member(name, kind=tarfile.DIRTYPE, **more)[0], None


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, None]:
    return member(name, kind=kind, linkname=target)[0], None


def layer(*members: tuple[tarfile.TarInfo, bytes | None]) -> Layer:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for found, content in members:
            tar.addfile(found, None if content is None else io.BytesIO(content))
    return raw.getvalue()


class Layout:
    """An OCI image layout, written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def fill(
        self, *layers: Layer, machine: str = MACHINE, pack: Callable[[bytes], bytes] = gzip.compress
    ) -> str:
        config = {"architecture": machine, "os": "linux", "config": {"Env": ["PATH=/opt/x/bin"]}}
        manifest = {
            "config": self.blob(json.dumps(config).encode()),
            "layers": [self.blob(pack(one)) for one in layers],
        }
        told = self.blob(json.dumps(manifest).encode())
        self.index({"manifests": [told]})
        return str(self.path)

    def index(self, told: Any) -> None:
        (self.path / "index.json").write_text(json.dumps(told))

    @property
    def largest(self) -> Path:
        """Of the layers."""
        blobs = (self.path / "blobs/sha256").iterdir()
        layers = (path for path in blobs if path.read_bytes().startswith(b"\x1f\x8b"))
        return max(layers, key=lambda path: path.stat().st_size)
