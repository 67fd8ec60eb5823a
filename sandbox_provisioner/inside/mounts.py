"""inside/mounts.py - runs in the launcher and in PID 1: the steps about mounts that several
facilities have, and the new root as far as it stands.

May import: errno, os, stat, kernel_calls, lookup.  May raise: OSError (with every operand in its
text).  Targets are found below the new root, by descriptor, never by a path of the host's.
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import STRAIGHT, look, rebind

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sandbox_provisioner.inside.box import Box

ATTRIBUTES = {
    "readonly": kernel.MOUNT_RDONLY,
    "nosuid": kernel.MOUNT_NOSUID,
    "nodev": kernel.MOUNT_NODEV,
    "noexec": kernel.MOUNT_NOEXEC,
}
_NO_LINKS = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class Mounts:
    """*root_fd* is the new root. *places* came with the plan, by their targets, as did *mounted*,
    mounts of file systems that are attached nowhere; *taken* are those that `attach` puts to
    theirs. *user_namespaces* map ids, by the plan's names."""

    def __init__(self) -> None:
        self.root_fd = -1
        self.places: dict[str, int] = {}
        self.mounted: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.user_namespaces: dict[str, int] = {}
        # Whoever looks after what stands in the root, also when it is closed.
        self.when_attached: Callable[[str, os.stat_result], None] | None = None

    def walk(self, path: str) -> int:
        """A descriptor of the directory *path* in the new root; what is missing of it is made."""
        inside = path.strip("/")
        if not inside:
            return os.dup(self.root_fd)
        fd = look(self.root_fd, inside)
        if fd < 0:
            folder, _, name = inside.rpartition("/")
            above = self.walk(folder)
            os.mkdir(name, 0o755, dir_fd=above)
            fd = look(above, name)
            os.close(above)
        return fd

    def put(self, mount_fd: int, target: str) -> None:
        """Attach *mount_fd* at *target*, which is made where it does not exist."""
        folder, _, name = target.rpartition("/")
        fd = self.walk(folder)
        self.put_in(fd, name, mount_fd, target)
        os.close(fd)

    def put_in(self, folder: int, name: str, mount_fd: int, target: str) -> None:
        """The same for *name* in *folder*, which is *target*."""
        status = os.fstat(mount_fd)
        try:
            if stat.S_ISDIR(status.st_mode):
                os.mkdir(name, 0o755, dir_fd=folder)
            else:
                os.mknod(name, stat.S_IFREG | 0o644, dir_fd=folder)
        except OSError:  # NFS may say of what is there that it cannot be made
            fd = look(folder, name)
            if fd < 0:
                raise
            kernel.move_mount(mount_fd, fd, target=target)
            os.close(fd)
        else:
            kernel.move_mount(mount_fd, folder, name, target=target)
        if self.when_attached:
            self.when_attached(target, status)


def receive(box: Box, *names: str) -> None:
    """Name the descriptors that came last: places of the host, mounts by their targets, and
    whatever a step asks for by its name (`Box.named`)."""
    if len(names) != len(box.received):  # who should have sent them may have ended before
        text = f"{len(box.received)} descriptors have come for {len(names)} names"
        raise OSError(errno.EPROTO, text)
    for name, fd in zip(names, box.received, strict=True):
        if name.startswith("place:"):
            box.mounts.places[name.removeprefix("place:")] = fd
        elif name.startswith("mount:"):
            box.mounts.mounted[name.removeprefix("mount:")] = fd
        elif name.startswith("/"):
            box.mounts.taken[name] = fd
        else:
            box.named.setdefault(name, []).append(fd)


def find_again(box: Box, target: str, path: str) -> None:
    """Let the place for *target* be what stands at *path*, which has to be the same file.

    open_tree(2) clones only mounts of our own mount namespace; a descriptor from before unshare(2)
    belongs to those of the old one.
    """
    before = box.mounts.places.pop(target)
    box.mounts.places[target] = kernel.openat2(kernel.AT_FDCWD, path, os.O_PATH, _NO_LINKS)
    same = os.path.samestat(os.fstat(before), os.fstat(box.mounts.places[target]))
    os.close(before)
    if not same:
        raise OSError(errno.ESTALE, f"{path!r} has been replaced during the start")


def take_place(box: Box, target: str, *attributes: str) -> None:
    """The same as `take`, for the place that came with the plan."""
    fd = box.mounts.places.pop(target)
    _keep_clone(box, target, kernel.open_tree("", dir_fd=fd), attributes)
    os.close(fd)


def take_mount(box: Box, target: str, *attributes: str) -> None:
    """The same for a mount of a file system that came with the plan, and is attached nowhere."""
    _keep_clone(box, target, box.mounts.mounted.pop(target), attributes)


def take(box: Box, target: str, path: str, *attributes: str) -> None:
    """Clone the mounts at *path*, detached, with *attributes*, for `attach` at *target* later.

    With "no-links" among them *path* is a real one: a symbolic link that somebody has put on the
    way meanwhile is an error.
    """
    if "no-links" not in attributes:
        _keep_clone(box, target, kernel.open_tree(path), attributes)
        return
    fd = kernel.openat2(kernel.AT_FDCWD, path, os.O_PATH, _NO_LINKS)
    plain = tuple(word for word in attributes if word != "no-links")
    _keep_clone(box, target, kernel.open_tree("", dir_fd=fd), plain)
    os.close(fd)


def take_all(box: Box, attributes: str, *paths: str) -> None:
    """The same for each of *paths*, with the same *attributes*, for a target of the same name."""
    added = _bits(attributes.split(","))
    for path in paths:
        box.mounts.taken[path] = kernel.open_tree_with(path, added)


def _keep_clone(box: Box, target: str, source: int, attributes: tuple[str, ...]) -> None:
    box.mounts.taken[target] = source
    for word in attributes:
        how, equals, name = word.partition("=")
        if equals:  # "idmap" is of the whole tree, "idmap-top" without the mounts below
            namespace, whole = box.mounts.user_namespaces[name], how == "idmap"
            kernel.mount_setattr(
                source, add=kernel.MOUNT_IDMAP, userns_fd=namespace, recursive=whole
            )
    added = _bits(word for word in attributes if "=" not in word)
    kernel.mount_setattr(source, add=added, propagation=kernel.MS_PRIVATE)


def _bits(attributes: Iterable[str]) -> int:
    return sum({ATTRIBUTES[word] for word in attributes})


def symlink(box: Box, path: str, text: str) -> None:
    """A symbolic link of the new root."""
    folder, _, name = path.rpartition("/")
    fd = box.mounts.walk(folder)
    os.symlink(text, name, dir_fd=fd)
    os.close(fd)


def file(box: Box, path: str, text: str) -> None:
    """A file of the new root, readable by all."""
    _write(_created(box, path), text)


def file_if_none(box: Box, path: str, text: str) -> None:
    """The same, unless a file is there that a kernel has left in a layer (`root.inside.layer`)."""
    try:
        fd = _created(box, path)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    else:
        _write(fd, text)


def _created(box: Box, path: str) -> int:
    """A descriptor of the new file *path*; directories on the way are made."""
    root, inside = box.mounts.root_fd, path.lstrip("/")
    fd = kernel.openat2_if_there(root, inside, _NEW, STRAIGHT, 0o644)
    if fd < 0:
        os.close(box.mounts.walk(os.path.dirname(path)))
        fd = kernel.openat2(root, inside, _NEW, STRAIGHT, 0o644)
    return fd


def _write(fd: int, text: str) -> None:
    os.write(fd, os.fsencode(text))
    os.close(fd)


def private_file(box: Box, path: str, uid: str, gid: str, text: str) -> None:
    """A file for the kernel's eyes only, in a directory of its own, which it may write to."""
    folder = os.path.dirname(path)
    file(box, path, text)
    os.chmod(path.lstrip("/"), 0o600)
    for name in (path, folder):
        os.chown(name.lstrip("/"), int(uid), int(gid))


def attach(box: Box, *targets: str) -> None:
    """Put what was taken for each of *targets* there; who does not exist is made."""
    last, folder_fd = "", -1
    for target in targets:
        folder, _, name = target.rpartition("/")
        # What is attached in a folder does not hide that one from its next entry.
        if folder_fd < 0 or folder != last:
            if folder_fd >= 0:
                os.close(folder_fd)
            last, folder_fd = folder, box.mounts.walk(folder)
        mount_fd = box.mounts.taken.pop(target)
        box.mounts.put_in(folder_fd, name, mount_fd, target)
        os.close(mount_fd)
    os.close(folder_fd)


def mount(box: Box, filesystem: str, target: str, options: str, *attributes: str) -> None:
    """A fresh file system at *target*; *options* are "key=value,flag"."""
    parsed: dict[str, str | None] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        parsed[key] = value if equals else None
    mount_fd = kernel.new_mount(filesystem, parsed, _bits(attributes))
    box.mounts.put(mount_fd, target)
    os.close(mount_fd)


def freeze_paths(box: Box, *paths: str) -> None:
    """Make what is at *paths* read-only by binding each onto itself."""
    for path in paths:
        fd = look(box.mounts.root_fd, path.lstrip("/"))
        if fd < 0:
            continue
        rebind(fd, kernel.MOUNT_RDONLY, path)
        os.close(fd)


VERBS = (
    receive,
    find_again,
    take_place,
    take_mount,
    take,
    take_all,
    symlink,
    file,
    file_if_none,
    private_file,
    attach,
    mount,
    freeze_paths,
)
