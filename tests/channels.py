"""channels.py - in the test process: channels of conda's packages, of a few files, made by hand."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUBDIR = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}[platform.machine()]
# What a package has in the place of where it will lie, in a text.
PLACEHOLDER = "/opt/a_placeholder_for_the_prefix"
Files = Mapping[str, str | bytes]


class Channel:
    """The one in the folder *path*."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {SUBDIR: {}, "noarch": {}}
        for subdir in self._records:
            (path / subdir).mkdir(parents=True)
        self._write()

    def add(
        self, name: str, files: Files, *, version: str = "1.0", depends: tuple[str, ...] = (),
        links: Mapping[str, str] | None = None, executable: tuple[str, ...] = (),
    ) -> Path:  # fmt: skip
        """A package for this kind of machine; the file that it is."""
        links = links or {}
        index = {"name": name, "version": version, "build": "0", "build_number": 0,
                 "depends": list(depends), "subdir": SUBDIR}  # fmt: skip
        contents = {path: _bytes(content) for path, content in files.items()}
        paths = [_told(path, content) for path, content in contents.items()]
        paths += [{"_path": path, "path_type": "softlink"} for path in links]
        contents["info/index.json"] = _bytes(json.dumps(index))
        contents["info/paths.json"] = _bytes(json.dumps({"paths_version": 1, "paths": paths}))
        file = self.path / SUBDIR / f"{name}-{version}-0.tar.bz2"
        file.write_bytes(data := _packed(contents, links, executable))
        digest = hashlib.sha256(data).hexdigest()
        self._records[SUBDIR][file.name] = index | {"size": len(data), "sha256": digest}
        self._write()
        return file

    def _write(self) -> None:
        for subdir, packages in self._records.items():
            told = {"info": {"subdir": subdir}, "packages": packages, "packages.conda": {}}
            (self.path / subdir / "repodata.json").write_text(json.dumps(told))


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _told(path: str, content: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {"_path": path, "path_type": "hardlink", "size_in_bytes": len(content)}
    told["sha256"] = hashlib.sha256(content).hexdigest()
    if PLACEHOLDER.encode() in content:
        told |= {"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
    return told


def _packed(
    contents: Mapping[str, bytes], links: Mapping[str, str], executable: tuple[str, ...]
) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:bz2", compresslevel=1) as archive:
        for path, content in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o755 if path in executable else 0o644
            archive.addfile(member, io.BytesIO(content))
        for path, target in links.items():
            member = tarfile.TarInfo(path)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return made.getvalue()
