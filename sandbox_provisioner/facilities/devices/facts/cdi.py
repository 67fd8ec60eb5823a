"""cdi.py - whoever launches; reads only: the machine's specifications of devices.

The Container Device Interface (github.com/cncf-tags/container-device-interface, SPEC.md): a vendor
or an administrator writes what a container needs for a device, as JSON or YAML, into one of two
folders, of which the second one counts more. Here each is read by its descriptor, up to a size, and
only where root alone can have written it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_provisioner.errors import did_you_mean
from sandbox_provisioner.trust import is_roots, is_roots_alone

FOLDERS = ("/etc/cdi", "/var/run/cdi")
_MOST_BYTES = 1 << 20
_MOST_FILES = 256
_VERSIONS = {"0", "1"}  # major ones
_OF_FILE = {"cdiVersion", "kind", "annotations", "containerEdits", "devices"}
_OF_EDITS = {"env", "deviceNodes", "mounts", "hooks"}
_OF_NODE = {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"}
_OF_MOUNT = {"hostPath", "containerPath", "options", "type"}
# No program of a specification runs. What NVIDIA's are for (cmd/nvidia-cdi-hook of its toolkit) is
# known, and either had here without them, or nothing that a box has:
_HOOK_PROGRAMS = {"nvidia-cdi-hook": [], "nvidia-ctk": ["hook"]}  # before the word for what they do
_LINKS = "create-symlinks"
_LIST = "update-ldcache"  # `libraries.py`
_NEEDLESS = {
    "create-soname-symlinks",  # the same
    "enable-cuda-compat",  # a driver of the image's in place of the machine's; docs/devices.md
    "disable-device-node-modification",  # nobody in a box makes or changes nodes
    "chmod",  # of folders in /dev, which are open to all
    "update-application-profile",  # hides GPUs of which a box has no node
}
_HOOKS = "it wants a program run outside of the box (a hook), with the rights of who starts it: {}"


class BadSpecification(Exception):
    """A file says what we cannot do, or nothing that can be meant; the text is an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWish:
    """A node that a specification names: *source* on the host, *path* inside."""

    path: str
    source: str
    access: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MountWish:
    """A file or directory that a specification names."""

    source: str
    target: str
    readonly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A symbolic link at *path* inside, which says *text*."""

    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What a device needs; programs are to find libraries in *folders*."""

    nodes: tuple[NodeWish, ...] = ()
    mounts: tuple[MountWish, ...] = ()
    links: tuple[Link, ...] = ()
    folders: tuple[str, ...] = ()
    variables: Mapping[str, str]

    def __add__(self, other: Edits) -> Edits:
        return Edits(
            nodes=tuple(dict.fromkeys((*self.nodes, *other.nodes))),
            mounts=tuple(dict.fromkeys((*self.mounts, *other.mounts))),
            links=tuple(dict.fromkeys((*self.links, *other.links))),
            folders=tuple(dict.fromkeys((*self.folders, *other.folders))),
            variables={**self.variables, **other.variables},
        )


class Specifications:
    """Those of *folders*."""

    def __init__(self, folders: tuple[str, ...] = FOLDERS) -> None:
        self._folders = folders
        self._problems: list[str] = []
        self._others: dict[str, str] = {}  # files of the same folder that name the same device
        self._devices: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {}
        for folder in folders:
            for path, found in self._files(folder):
                try:
                    self._add(path, found)
                except BadSpecification as error:
                    self._problems.append(f"{path}: {error}")

    def edits(self, name: str) -> Edits:
        """What the device *name* needs; BadSpecification."""
        if name not in self._devices:
            raise BadSpecification(self._unknown(name))
        path, shared, own = self._devices[name]
        if other := self._others[name]:
            raise BadSpecification(f"{other} and {path} both name it, and neither counts more")
        try:
            return _edits(own) + _edits(shared)
        except BadSpecification as error:
            raise BadSpecification(f"{path}: {error}") from None

    def _unknown(self, name: str) -> str:
        known = [*self._devices]
        where = " and ".join(self._folders)
        told = did_you_mean(name, known, f"There are: {', '.join(known[:20]) or 'none'}.")
        problems = "; ".join(self._problems)
        return f"no file in {where} names it. {told}" + (
            f" Left out: {problems}" if problems else ""
        )

    def _files(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        try:
            names = sorted(os.listdir(folder))[:_MOST_FILES]
        except OSError:
            return
        if not is_roots(folder):
            self._problems.append(f"{folder}: others than root may write there")
            return
        for name in names:
            path = f"{folder}/{name}"
            if name.endswith((".json", ".yaml")):
                try:
                    yield path, _parsed(_read(path), is_json=name.endswith(".json"))
                except BadSpecification as error:
                    self._problems.append(f"{path}: {error}")

    def _add(self, path: str, found: Mapping[str, Any]) -> None:
        _known(found, _OF_FILE)
        version, kind = str(found.get("cdiVersion", "")), found.get("kind")
        if version.partition(".")[0] not in _VERSIONS:
            raise BadSpecification(f"its cdiVersion {version!r} is not known here")
        if not isinstance(kind, str):
            raise BadSpecification("it names no kind")
        shared = _mapping(found.get("containerEdits") or {})
        for device in _list(found.get("devices") or []):
            own = _mapping(_mapping(device).get("containerEdits") or {})
            name = f"{kind}={device.get('name')}"
            other = self._devices[name][0] if name in self._devices else ""
            is_conflict = os.path.dirname(other) == os.path.dirname(path)
            self._others[name] = other if is_conflict else ""
            self._devices[name] = path, shared, own


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadSpecification(error.strerror or str(error)) from None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not is_roots_alone(status):
            raise BadSpecification("it is no file that root alone can write")
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise BadSpecification(f"it has more than {_MOST_BYTES >> 10} KiB")
    return text


def _parsed(text: bytes, *, is_json: bool) -> Mapping[str, Any]:
    if is_json:
        try:
            return _mapping(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise BadSpecification(f"it is no JSON: {error}") from None
    try:
        import yaml  # type: ignore[import-untyped]  # noqa: PLC0415  # few need it
    except ImportError:
        raise BadSpecification(
            "it is YAML, which needs the package PyYAML; or write JSON"
        ) from None
    try:
        return _mapping(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise BadSpecification(f"it is no YAML: {told}") from None


def _edits(found: Mapping[str, Any]) -> Edits:
    _known({name: value for name, value in found.items() if value}, _OF_EDITS)
    hooks = [_hook(hook) for hook in _list(found.get("hooks") or [])]
    return Edits(
        nodes=tuple(map(_node, _list(found.get("deviceNodes") or []))),
        mounts=tuple(map(_mount, _list(found.get("mounts") or []))),
        links=tuple(map(_link, _given(hooks, _LINKS, "--link"))),
        folders=tuple(_given(hooks, _LIST, "--folder")),
        variables=dict(map(_variable, _list(found.get("env") or []))),
    )


def _node(found: Any) -> NodeWish:
    _known(_mapping(found), _OF_NODE)
    path = _path(found.get("path"))
    if _text(found, "type", "c") not in {"c", "u", ""}:
        raise BadSpecification(f"{path} is no character device")
    permissions = _text(found, "permissions", "rwm")
    access = "".join(letter for letter in "rw" if letter in permissions)
    source = _path(found.get("hostPath") or path)
    return NodeWish(path=path, source=source, access=access or "r")


def _mount(found: Any) -> MountWish:
    _known(_mapping(found), _OF_MOUNT)
    source, target = _path(found.get("hostPath")), _path(found.get("containerPath"))
    if _text(found, "type", "bind") not in {"", "bind", "none"}:
        raise BadSpecification(f"{target} is no bind mount")
    readonly = "rw" not in _list(found.get("options") or [])
    return MountWish(source=source, target=target, readonly=readonly)


def _hook(found: Any) -> tuple[str, list[str]]:
    """What the hook *found* is for, where it is one of those whose work is known, and the words
    behind that."""
    words = [str(word) for word in _list(_mapping(found).get("args") or [])]
    named = words[:1] or [_text(found, "path", "")]
    before = _HOOK_PROGRAMS.get(os.path.basename(named[0]))
    count = 1 + len(before or ())
    is_known = before is not None and words[1:count] == before
    command = words[count : count + 1] if is_known else []
    if not {*command} & {_LINKS, _LIST, *_NEEDLESS}:
        raise BadSpecification(_HOOKS.format(" ".join(words or named)[:200]))
    return command[0], words[count + 1 :]


def _given(hooks: list[tuple[str, list[str]]], command: str, option: str) -> Iterator[str]:
    """What those of *hooks* that are for *command* have for *option*."""
    for name, words in hooks:
        if name == command:
            yield from _values(words, option)


def _values(words: list[str], option: str) -> Iterator[str]:
    """What is given for *option*, as "OPTION VALUE" or "OPTION=VALUE"."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            yield following
        elif word.startswith(f"{option}="):
            yield word.partition("=")[2]


def _link(found: str) -> Link:
    """TEXT::PATH"""
    text, colons, path = found.partition("::")
    if not colons or not text or not text.isprintable():
        raise BadSpecification(f"{found!r} is no link")
    return Link(path=_path(path), text=text)


def _variable(found: Any) -> tuple[str, str]:
    name, equals, value = str(found).partition("=")
    if not name or not equals or "\0" in value:
        raise BadSpecification(f"{found!r} is no variable")
    return name, value


def _text(found: Mapping[str, Any], key: str, usual: str) -> str:
    """What stands below *key*, *usual* where nothing does."""
    text = usual if found.get(key) is None else found[key]
    if not isinstance(text, str):
        raise BadSpecification(f"{str(text)[:40]!r} is in the place of a text, as {key}")
    return text


def _path(found: Any) -> str:
    if not isinstance(found, str) or not found.startswith("/") or not found.isprintable():
        raise BadSpecification(f"{found!r} is no absolute path")
    if os.path.normpath(found) != found:
        raise BadSpecification(f"{found!r} is no plain path")
    return found


def _known(found: Mapping[str, Any], names: set[str]) -> None:
    if unknown := sorted(map(str, found.keys() - names)):
        raise BadSpecification(f"it says {unknown[0]!r}, which is not known here")


def _mapping(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise BadSpecification(f"{str(found)[:40]!r} is in the place of a mapping")
    return found


def _list(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise BadSpecification(f"{str(found)[:40]!r} is in the place of a list")
    return found
