"""oci.py - in who makes images: what other engines keep images in, as layers of ours.

::

    a layout      a directory with oci-layout, index.json and blobs/
    an archive    the same in a tar, as skopeo's oci-archive is,
                  or what `docker save` has written: manifest.json beside layers

(OCI's image-spec: image-layout.md, layer.md.) All of it is somebody else's text. It is read where
it lies, and nothing is unpacked: `tree.py` tells what the layers come to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from sandbox_provisioner.errors import SpecError, joined
from sandbox_provisioner.images.layers import SmallReads, TarLayer, forget_entries
from sandbox_provisioner.images.tree import Bounds, Kind, Refused, Tree, is_plain
from sandbox_provisioner.inside import kernel_calls as kernel

_MAGIC_AT = 257  # tar(5)
_LONGEST_TEXT = 8 << 20
_MOST_LAYERS = 256
_MOST_FILES = 10_000
# As Go names them, and so OCI.
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_WHITEOUT, _OPAQUE, _OF_AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."
# No name in a layout leads out of it.
_IN_LAYOUT = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image where it lies. *digest* is that of what tells all the others."""

    layers: Sequence[TarLayer]
    digest: str
    environment: Mapping[str, str]


def is_oci(path: str) -> bool:
    """Whether *path* may be one: a layout, or a tar."""
    if os.path.isdir(path):
        return os.path.isfile(f"{path}/oci-layout")
    try:
        # A pipe of somebody's would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    with open(fd, "rb"):
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, 5, _MAGIC_AT) == b"ustar"


@contextlib.contextmanager
def opened(path: str, bounds: Bounds) -> Iterator[Source]:
    """What lies at *path*; SpecError where it is no image for this machine, or a bad one."""
    with told_as_bad_image(path), _place(path) as place:
        yield _source(place, bounds)


@contextlib.contextmanager
def told_as_bad_image(path: str) -> Iterator[None]:
    """Let what is wrong with the image at *path* be told as an error."""
    try:
        yield
    except (ValueError, TypeError) as error:  # Refused is one
        raise SpecError(
            attempt=f"read the image {path}",
            answer=str(error),
            remedy="Nothing of it was kept. Get it anew from whom you trust.",
        ) from None
    except OSError as error:
        raise SpecError(
            attempt=f"read the image {path}",
            answer=error.strerror or str(error),
            remedy="Name an OCI image layout, or an archive of one.",
        ) from None


def tree_of(source: Source, bounds: Bounds) -> tuple[Tree, int]:
    """What its layers come to, and how many entries no box could use; Refused."""
    tree, left_out = Tree(bounds), 0
    for number, layer in enumerate(source.layers):
        for at, (entry, _) in enumerate(layer.members()):
            if entry is None:
                tree.count()
                left_out += 1
                continue
            folder, _, last = entry.name.rstrip("/").rpartition("/")
            if last.startswith(_WHITEOUT):
                tree.count()
            if last == _OPAQUE:
                tree.clear(folder, number)
            elif last.startswith(_OF_AUFS):
                left_out += 1
            elif last.startswith(_WHITEOUT):
                tree.remove(f"{folder}/{last.removeprefix(_WHITEOUT)}", number)
            else:
                tree.add(entry, number, at)
    if not tree.root.children:
        raise Refused("there is nothing in it")
    return tree, left_out


# -- where it lies


class _Layout:
    """A directory."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def has(self, name: str) -> bool:
        with contextlib.suppress(Refused):
            self.open(name).close()
            return True
        return False

    def open(self, name: str) -> IO[bytes]:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = kernel.openat2(self._fd, name, flags, _IN_LAYOUT)
        except OSError as error:
            raise Refused(f"{name}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Refused(f"{name} is no file")
        return open(fd, "rb")


class _Archive:
    """A tar of files, each of which is read where it lies in it."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._found: dict[str, tuple[int, int]] = {}
        try:
            self._look()
        except BaseException:
            self._file.close()
            raise

    def _look(self) -> None:
        links, file = {}, SmallReads(self._file)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (found := tar.next()) is not None:
                    forget_entries(tar)
                    file.heads.end()
                    name = found.name.removeprefix("./")
                    if found.isreg() and not found.issparse():
                        self._found[name] = (found.offset_data, found.size)
                    elif found.issym():
                        links[name] = found.linkname
                    if len(self._found) + len(links) > _MOST_FILES:
                        raise Refused(f"it has more than {_MOST_FILES} files")
        except (tarfile.TarError, ValueError, RecursionError, EOFError, OverflowError) as error:
            raise Refused(f"it is no archive that could be read: {error}") from None
        # `docker save` of some versions has each layer once, and links to it.
        for name, target in links.items():
            if there := self._found.get(os.path.normpath(f"{os.path.dirname(name)}/{target}")):
                self._found.setdefault(name, there)

    def close(self) -> None:
        self._file.close()

    def has(self, name: str) -> bool:
        return name in self._found

    def open(self, name: str) -> IO[bytes]:
        if name not in self._found:
            raise Refused(f"{name}: No such file or directory")
        return io.BufferedReader(_Part(self._file.fileno(), *self._found[name]), 1 << 16)


class _Part(io.RawIOBase):
    """*size* bytes of the file *fd* from *start* on; somebody else closes it."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._at, self._end = fd, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self._fd, min(len(buffer), self._end - self._at), self._at)
        if not data and self._at < self._end and len(buffer):
            raise Refused("it is truncated")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


_Place = _Layout | _Archive


@contextlib.contextmanager
def _place(path: str) -> Iterator[_Place]:
    place: _Place = _Layout(path) if os.path.isdir(path) else _Archive(path)
    try:
        yield place
    finally:
        place.close()


# -- what it says


def _source(place: _Place, bounds: Bounds) -> Source:
    try:
        if place.has("index.json"):
            return _of_oci(place, bounds)
        if place.has("manifest.json"):
            return _of_docker(place, bounds)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"what it tells of itself cannot be meant: {error!r}") from None
    raise Refused("it has neither index.json, as OCI's have, nor manifest.json, as Docker's have")


def _of_oci(place: _Place, bounds: Bounds) -> Source:
    chosen = _for_this_machine(place, _json(place, "index.json")["manifests"], depth=4)
    manifest = _told(place, chosen)
    config = _told(place, manifest["config"])
    _check_machine(config)
    layers = [_layer(place, told, bounds) for told in _some(manifest["layers"])]
    return Source(layers=layers, digest=_digest(chosen), environment=_environment(config))


def _for_this_machine(place: _Place, manifests: Sequence[Any], depth: int) -> Mapping[str, Any]:
    """The one of *manifests* that is for us; an index may be in an index."""
    ours = [told for told in manifests if _suits(told.get("platform"))]
    if not ours:
        machines = sorted({str(told["platform"].get("architecture")) for told in manifests})
        raise Refused(f"it is for {joined(machines) or 'no machine'}, and this one is {_machine()}")
    if len(ours) > 1:
        raise Refused(f"it has {len(ours)} images in it: copy the one that you mean with skopeo")
    if "index" in str(ours[0].get("mediaType")) or "list" in str(ours[0].get("mediaType")):
        if not depth:
            raise Refused("its indexes stand in one another")
        return _for_this_machine(place, _told(place, ours[0])["manifests"], depth - 1)
    found: Mapping[str, Any] = ours[0]
    return found


def _suits(told: Mapping[str, Any] | None) -> bool:
    return not told or told.get("architecture") in (_machine(), None)


def _machine() -> str:
    return _MACHINES.get(platform.machine(), platform.machine())


def _check_machine(config: Mapping[str, Any]) -> None:
    machine = config.get("architecture") or _machine()
    if machine != _machine():
        raise Refused(f"it is for {machine}, and this machine is {_machine()}")


def _layer(place: _Place, told: Mapping[str, Any], bounds: Bounds) -> TarLayer:
    digest = _digest(told)
    name = f"blobs/sha256/{digest}"
    return TarLayer(lambda: place.open(name), digest, bounds.size_bytes * 2)


def _of_docker(place: _Place, bounds: Bounds) -> Source:
    told = _json(place, "manifest.json")
    if len(told) != 1:
        raise Refused(f"it has {len(told)} images in it: save the one that you mean")
    text = _text(place, _name(told[0]["Config"]))
    config = _parsed(text, "its configuration")
    _check_machine(config)
    names = [_name(name) for name in _some(told[0]["Layers"])]
    digests = config["rootfs"]["diff_ids"]
    if len(names) != len(digests):
        raise Refused("it has not the layers that it tells of")
    layers = [
        TarLayer(lambda name=name: place.open(name), _hex(digest), bounds.size_bytes * 2)  # type: ignore[misc]
        for name, digest in zip(names, digests, strict=True)
    ]
    digest = hashlib.sha256(text).hexdigest()
    return Source(layers=layers, digest=digest, environment=_environment(config))


def _environment(config: Mapping[str, Any]) -> dict[str, str]:
    told = (config.get("config") or {}).get("Env") or []
    pairs = (str(one).partition("=") for one in told)
    return {name: value for name, _, value in pairs}


def _name(told: Any) -> str:
    """Of a file in it."""
    if not isinstance(told, str) or not told.isprintable():  # no NUL, and no half of a character
        raise Refused(f"{told!r} is no name of a file")
    return told


def _some(told: Sequence[Any]) -> Sequence[Any]:
    if not 0 < len(told) <= _MOST_LAYERS:
        raise Refused(f"it has {len(told)} layers")
    return told


def _told(place: _Place, descriptor: Mapping[str, Any]) -> Any:
    """What a descriptor leads to, which has to be what it says."""
    digest = _digest(descriptor)
    text = _text(place, f"blobs/sha256/{digest}")
    if hashlib.sha256(text).hexdigest() != digest:
        raise Refused(f"blobs/sha256/{digest[:12]}… is not what its name says")
    return _parsed(text, digest)


def _json(place: _Place, name: str) -> Any:
    return _parsed(_text(place, name), name)


def _parsed(text: bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused(f"{name} is no JSON: {error}") from None


def _text(place: _Place, name: str) -> bytes:
    with place.open(name) as file:
        text = file.read(_LONGEST_TEXT + 1)
    if len(text) > _LONGEST_TEXT:
        raise Refused(f"{name} is too long")
    return text


def _digest(descriptor: Mapping[str, Any]) -> str:
    return _hex(descriptor["digest"])


def _hex(digest: str) -> str:
    algorithm, _, value = str(digest).partition(":")
    if algorithm != "sha256" or len(value) != 64 or not set(value) <= _HEX:
        raise Refused(f"{digest!r} is no digest by SHA-256")
    return value


# -- what is in it


def python_in(tree: Tree, environment: Mapping[str, str]) -> str:
    """The interpreter in *tree* that has ipykernel, the first one on its PATH; "" for none."""
    path = environment.get("PATH", "").split(":")
    for folder in dict.fromkeys((*path, "/opt/kernel/bin", "/usr/local/bin", "/usr/bin")):
        prefix = os.path.dirname(folder)
        for name in ("python3", "python"):
            found = tree.find(f"{folder}/{name}") if is_plain(folder) else None
            if found and found.kind is Kind.FILE and _has_ipykernel(tree, prefix):
                return f"{folder}/{name}"
    return ""


def _has_ipykernel(tree: Tree, prefix: str) -> bool:
    library = tree.find(f"{prefix}/lib")
    if library is None or library.kind is not Kind.FOLDER:
        return False
    return any(
        tree.find(f"{prefix}/lib/{version}/{packages}/ipykernel/__init__.py")
        for version in library.children
        if version.startswith("python3")
        for packages in ("site-packages", "dist-packages")
    )
