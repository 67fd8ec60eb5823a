"""inside/steps.py - runs in the launcher: verb -> function, one short function a step.

May import: os, resource, stat, _signal, covers, kernel_calls, lookup, memory, wire.  May raise:
OSError (with every operand in its text).
Must not log, lock, sleep or decide: what to do, in which order and why stands in the plan
(`plan.py`).

Three processes walk through one plan, each from where the one before forked it::

    launcher   joins the cgroups, takes the mounts, makes the namespaces     fork_init    ends
    PID 1      builds the root, pivots, pins, covers                         fork_kernel  init.py
    kernel     drops everything it could hold on to                          execute      execve
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import errno
import os
import resource
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.covers import Covers, Watch
from sandbox_provisioner.inside.lookup import STRAIGHT, look, rebind
from sandbox_provisioner.inside.memory import Level, Memory, open_files

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable

_NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "pid": kernel.CLONE_NEWPID,
    "network": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "cgroup": kernel.CLONE_NEWCGROUP,
}
_ATTRIBUTES = {
    "readonly": kernel.MOUNT_RDONLY,
    "nosuid": kernel.MOUNT_NOSUID,
    "nodev": kernel.MOUNT_NODEV,
    "noexec": kernel.MOUNT_NOEXEC,
}
# linux/landlock.h, LANDLOCK_ACCESS_FS_*: how many bits versions 1 to 5 of the ABI know.
_LANDLOCK_RIGHTS = (13, 14, 15, 15, 16)
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << n for n in range(6))
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_LANDLOCK_TCP = 0b11  # bind and connect
_LANDLOCK_SCOPES = 0b11  # abstract unix sockets, signals
_LANDLOCK_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_LANDLOCK_KINDS = {
    "read": _READ_FILE | _READ_DIR,
    "run": _READ_FILE | _READ_DIR | _EXECUTE,
    "change": (1 << 16) - 1 & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV),
    "use": _READ_FILE | _WRITE_FILE | _IOCTL_DEV,
    "bind": _READ_FILE | _WRITE_FILE | _READ_DIR | _MAKE_SOCK | _REMOVE_FILE,
}
_NO_LINKS = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_OPEN_FILES = 1 << 20
_UNLIMITED = resource.RLIM_INFINITY
_LOCKS = 10  # RLIMIT_LOCKS, which Python does not name


class Box:
    """What the steps hand on to one another: descriptors, and who the kernel will be."""

    def __init__(self, report_fd: int, control_fd: int) -> None:
        self.report_fd = report_fd
        self.control_fd = control_fd
        self.server_fd = -1
        self.exit_fd = -1
        self.user_namespaces: dict[str, int] = {}
        self.places: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.root_fd = -1
        self.masked_directory = ""
        self.kernel_uid = -1
        self.namespaces = True
        self.init_pid = 0
        self.kept: list[int] = []
        self.kept_of_kernel: list[str] = []
        self.rules_fd = -1
        self.rules = 0
        self.memory: Memory | None = None
        self.memory_files: list[int] = []
        self.received: list[int] = []
        self.group_files: list[int] = []
        self.nursery_fd = -1
        self.claims_fd = -1
        self.string_fd = -1
        self.unclaimed: tuple[float, int] | None = None
        self.binding = self.ready = (-1, -1)
        self.bound = b""
        self.kernel_argv: tuple[str, ...] = ()
        self.outlives_kernel = False
        self.files_as: tuple[int, int] | None = None
        self.seal_fd = -1
        self.seal_events = -1
        self.seal_path = ""
        self.seal_names: tuple[str, ...] = ()
        self.pumps: list[tuple[int, int]] = []
        self.logged: tuple[int, ...] = ()
        self.environment: dict[bytes, bytes] = {}
        self.survives_server = False
        self.covers: Covers | None = None
        self.begun = -1
        self.watch: Watch | None = None

    def report(self, *words: str) -> None:
        """Tell the server one record."""
        os.write(self.report_fd, wire.record(*words))


def exit_file(box: Box, path: str) -> None:
    """Open the file for init while its folder can still be reached."""
    box.exit_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def join_cgroup(box: Box, *files: str) -> None:
    """cgroups(7): writing 0 moves the writer, into the groups of *files* and of those that came
    with the plan (whoever opened them has the right to)."""
    for path in files:
        _write(path, "0")
    for number, fd in enumerate(box.group_files):
        try:
            os.write(fd, b"0")
        except OSError as error:
            raise kernel.CallFailed("write", error.errno or 0, group=number, text="0") from None
        os.close(fd)


def open_memory(box: Box, version: str, group: str) -> None:
    """Open what tells of *group*'s memory, for `watch_memory`, while it can be reached."""
    box.memory_files = open_files(int(version), group)


def watch_memory(
    box: Box, version: str, share: str, cap: str, uid: str, gid: str, sentence: str, killed: str
) -> None:
    """Init interrupts the kernel of *uid* and *gid* at *share* bytes of *cap*, unless that is 0,
    and shows it *sentence*; *killed* when Linux has ended another process of the group."""
    level = Level(int(share), int(cap)) if int(share) else None
    box.memory = Memory(int(version), box.memory_files, level, sentence, killed)
    box.files_as = int(uid), int(gid)


def hand_over(box: Box) -> None:
    """Send the server what was opened here, for a process that could not open it; and end."""
    exit_file = [box.exit_fd] if box.exit_fd >= 0 else []
    fds = [*exit_file, *box.memory_files, *box.taken.values()]
    kernel.send_descriptors(box.control_fd, wire.message(wire.OPENED), fds)
    os._exit(0)


def receive(box: Box, *names: str) -> None:
    """Name what came last: places of the host; files to join groups by, the socket through which a
    spare is claimed, the string that holds its groups; the exit file, files of the memory group,
    mounts by target."""
    for name, fd in zip(names, box.received, strict=True):
        if name == "exit-file":
            box.exit_fd = fd
        elif name == "memory":
            box.memory_files.append(fd)
        elif name == "group":
            box.group_files.append(fd)
        elif name == "claims":
            box.claims_fd = fd
        elif name == "string":
            box.string_fd = fd
        elif name.startswith("place:"):
            box.places[name.removeprefix("place:")] = fd
        else:
            box.taken[name] = fd


def await_opened(box: Box) -> None:
    """Go on when the server has sent what a launcher has opened for us; end if it has thought
    better of it."""
    word, box.received = kernel.receive_descriptors(box.control_fd)
    if not word:
        os._exit(0)


def stay_unclaimed(box: Box, idle_seconds: str, least_bytes: str) -> None:
    """Init waits for a server to claim this spare, so long, and while the machine has so much
    memory available; the kernel waits for its binding (`claim.py`)."""
    box.unclaimed = float(idle_seconds), int(least_bytes)
    box.binding, box.ready = os.pipe(), os.pipe()


def bind_kernel(box: Box, path: str, *words: str) -> None:
    """The spare is for this start: it works in *path*; with its variables (`environment`) and its
    arguments, *words*, that is all that a kernel from a fresh launcher would know besides."""
    pairs = [name + b"=" + value for name, value in box.environment.items()]
    argv = [os.fsencode(word) for word in words]
    box.bound = wire.encode([[os.fsencode(path)], argv, pairs])


def outlive_kernel(box: Box) -> None:
    """Init stays after the program that it started, until there is no process left but itself."""
    box.outlives_kernel = True


def make_user_namespace(box: Box, name: str, uid_map: str, gid_map: str, owner: str = "0") -> None:
    """Make a user namespace of *owner*, that lives as long as our descriptor of it.

    user_namespaces(7): the maps are written from outside of it, by one who has CAP_SETUID there. A
    child is made in it and waits, so that we stay who we are.
    """

    def write_maps(pid: int) -> None:
        _write(f"/proc/{pid}/uid_map", uid_map)
        _write(f"/proc/{pid}/gid_map", gid_map)

    kernel.become_keeping_capabilities(int(owner))
    try:
        box.user_namespaces[name] = _made_user_namespace(write_maps)
    finally:
        kernel.become_keeping_capabilities(0)


def _made_user_namespace(write_maps: Callable[[int], None]) -> int:
    """A descriptor of a new user namespace; *write_maps* gets the pid of a process in it."""
    done, finish = os.pipe()
    try:
        pid = kernel.fork_into(kernel.CLONE_NEWUSER)
        if pid == 0:
            os.close(finish)
            os.read(done, 1)
            os._exit(0)
    finally:
        os.close(done)
    try:
        write_maps(pid)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(finish)
        os.waitpid(pid, 0)


def find_again(box: Box, target: str, path: str) -> None:
    """Let the place for *target* be what stands at *path*, which has to be the same file.

    open_tree(2) clones only mounts of our own mount namespace; a descriptor from before unshare(2)
    belongs to those of the old one.
    """
    before = box.places.pop(target)
    box.places[target] = kernel.openat2(kernel.AT_FDCWD, path, os.O_PATH, _NO_LINKS)
    same = os.path.samestat(os.fstat(before), os.fstat(box.places[target]))
    os.close(before)
    if not same:
        raise OSError(errno.ESTALE, f"{path!r} has been replaced during the start")


def take_place(box: Box, target: str, *attributes: str) -> None:
    """The same as `take`, for the place that came with the plan."""
    fd = box.places.pop(target)
    _keep_clone(box, target, kernel.open_tree("", dir_fd=fd), attributes)
    os.close(fd)


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


def _keep_clone(box: Box, target: str, source: int, attributes: tuple[str, ...]) -> None:
    box.taken[target] = source
    added = 0
    for word in attributes:
        how, equals, name = word.partition("=")
        if equals:  # "idmap" is of the whole tree, "idmap-top" without the mounts below
            namespace, whole = box.user_namespaces[name], how == "idmap"
            kernel.mount_setattr(
                source, add=kernel.MOUNT_IDMAP, userns_fd=namespace, recursive=whole
            )
        else:
            added |= _ATTRIBUTES[word]
    kernel.mount_setattr(source, add=added, propagation=kernel.MS_PRIVATE)


def enter_user_namespace(box: Box, name: str) -> None:
    """Become uid 0 of the namespace *name*, which is nobody outside."""
    kernel.setns(box.user_namespaces[name], kernel.CLONE_NEWUSER)
    for fd in box.user_namespaces.values():
        os.close(fd)
    box.user_namespaces.clear()
    become_root_inside(box)


def become_root_inside(_box: Box) -> None:
    """Be uid 0 of our user namespace, and in no group."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def map_child(_box: Box, init_pid: str, pid: str, uid_map: str, gid_map: str) -> None:
    """Map the ids of *pid*, which has made its user namespace in that of *init_pid*; we have the
    rights for it there, and stay there."""
    fd = os.open(f"/proc/{init_pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    kernel.setns(fd, kernel.CLONE_NEWUSER)
    os.close(fd)
    _write(f"/proc/{pid}/uid_map", uid_map)
    _write(f"/proc/{pid}/gid_map", gid_map)


def unshare_user_namespace(box: Box, uid_map: str, gid_map: str) -> None:
    """A user namespace for a process without privileges."""
    kernel.unshare(kernel.CLONE_NEWUSER)
    map_own_ids(box, uid_map, gid_map)


def map_own_ids(_box: Box, uid_map: str, gid_map: str) -> None:
    """user_namespaces(7): without privileges one maps oneself, after giving up setgroups(2)."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", uid_map)
    _write("/proc/self/gid_map", gid_map)


def map_user_namespace(
    _box: Box, uid_helper: str, gid_helper: str, uid_map: str, gid_map: str
) -> None:
    """newuidmap(1), newgidmap(1): set-uid helpers map more than oneself, as subuid(5) allows.

    They run outside of the namespace, where their rights count. We stay who we are inside of it, in
    the same groups: what we may open there is what we may open here.
    """

    def run_helpers(pid: int) -> None:
        _run_helper(uid_helper, str(pid), *uid_map.split())
        _run_helper(gid_helper, str(pid), *gid_map.split())

    fd = _made_user_namespace(run_helpers)
    kernel.setns(fd, kernel.CLONE_NEWUSER)
    os.close(fd)


def _run_helper(path: str, *words: str) -> None:
    """Run it with nothing of our environment; what it says becomes the error's text."""
    name = os.path.basename(path)
    said, theirs = os.pipe()
    outputs = [(os.POSIX_SPAWN_DUP2, theirs, number) for number in (1, 2)]
    try:
        pid = os.posix_spawn(path, [name, *words], {}, file_actions=outputs)
    finally:
        os.close(theirs)
    text = b""
    while chunk := os.read(said, 1 << 12):
        text += chunk
    os.close(said)
    if os.waitpid(pid, 0)[1]:
        told = os.fsdecode(text.strip())
        raise kernel.CallFailed(name, errno.EPERM, words=" ".join(words), said=told)


def unshare(_box: Box, *names: str) -> None:
    """All other namespaces in one call."""
    flags = 0
    for name in names:
        flags |= _NAMESPACES[name]
    kernel.unshare(flags)


def fork_init(box: Box) -> None:
    """Go on as PID 1 of the new PID namespace, a child of the server; the launcher ends here."""
    pid = kernel.fork_as_sibling()
    if pid:
        box.report(wire.PID, str(pid))
        os._exit(0)
    box.init_pid = os.getpid()
    say_who(box.control_fd, wire.INIT)


def say_who(control_fd: int, word: str) -> None:
    """Tell the server *word*. It learns our pid from the message's credentials; with it comes a
    pidfd, since we may have ended when it looks, and have been waited for by whatever handler of
    SIGCHLD it has."""
    pidfd = os.pidfd_open(os.getpid())
    kernel.send_descriptors(control_fd, wire.message(word), [pidfd])
    os.close(pidfd)


def new_session(_box: Box) -> None:
    """No controlling terminal, no process group and no keyring of the server; and a command line
    that names no folder of the host, since everybody inside may read that of PID 1."""
    kernel.show_arguments(("sandbox-init",))
    kernel.set_dumpable(dumpable=False)
    os.setsid()
    kernel.join_new_session_keyring()


def new_root(box: Box, staging: str, size: str) -> None:
    """An empty tmpfs that will be the root; built over *staging*, in our own mount namespace."""
    kernel.make_mounts_private()
    root = kernel.new_mount("tmpfs", {"mode": "0755", "size": size}, kernel.MOUNT_NODEV)
    over = os.open(staging, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.move_mount(root, over)
    os.close(over)
    box.root_fd = root
    os.umask(0o022)
    os.fchdir(root)


def symlink(box: Box, path: str, text: str) -> None:
    """A symbolic link of the new root."""
    os.close(_walk(box, os.path.dirname(path)))
    os.symlink(text, path.lstrip("/"))


def file(box: Box, path: str, text: str) -> None:
    """A file of the new root, readable by all."""
    os.close(_walk(box, os.path.dirname(path)))
    fd = os.open(path.lstrip("/"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.write(fd, os.fsencode(text))
    os.close(fd)


def private_file(box: Box, path: str, uid: str, gid: str, text: str) -> None:
    """A file for the kernel's eyes only, in a directory of its own, which it may write to."""
    folder = os.path.dirname(path)
    os.close(_walk(box, folder))
    file(box, path, text)
    os.chmod(path.lstrip("/"), 0o600)
    for name in (path, folder):
        os.chown(name.lstrip("/"), int(uid), int(gid))


def attach(box: Box, target: str) -> None:
    """Put what was taken for *target* there; the target is made where it does not exist."""
    mount_fd = box.taken.pop(target)
    _attach(box, mount_fd, target)
    os.close(mount_fd)


def _attach(box: Box, mount_fd: int, target: str) -> None:
    is_directory = stat.S_ISDIR(os.fstat(mount_fd).st_mode)
    fd = _walk(box, target, is_directory=is_directory)
    kernel.move_mount(mount_fd, fd, target=target)
    os.close(fd)
    if box.covers:
        box.covers.attached(target, os.fstat(mount_fd))


def mount(box: Box, filesystem: str, target: str, options: str, *attributes: str) -> None:
    """A fresh file system at *target*; *options* are "key=value,flag"."""
    parsed: dict[str, str | None] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        parsed[key] = value if equals else None
    added = 0
    for word in attributes:
        added |= _ATTRIBUTES[word]
    mount_fd = kernel.new_mount(filesystem, parsed, added)
    _attach(box, mount_fd, target)
    os.close(mount_fd)


def scratch(box: Box, uid: str, gid: str, room: str, *targets: str) -> None:
    """One tmpfs, and so one cap, for every place that the kernel may write to.

    *room* are the tmpfs's options. Each target is "MODE:PATH". The tmpfs stays reachable at
    /.scratch for `cover`, until `pivot`.
    """
    mount(box, "tmpfs", "/.scratch", f"mode=0755,{room}", "nosuid", "nodev")
    for number, word in enumerate(("0700:stand-ins", *targets)):
        mode, _, target = word.partition(":")
        inside = f".scratch/{number if number else target}"
        os.mkdir(inside)
        os.chmod(inside, int(mode, 8))
        os.chown(inside, int(uid), int(gid))
        if number:
            mount_fd = kernel.open_tree(inside)
            _attach(box, mount_fd, target)
            os.close(mount_fd)


def mask(box: Box, *paths: str) -> None:
    """Hide files of /proc behind /dev/null and directories behind an empty read-only tmpfs."""
    for path in paths:
        fd = look(box.root_fd, path.lstrip("/"))
        if fd < 0:
            continue  # what this kernel does not have needs no mask
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            cover_fd = _empty_directory(box)
            box.masked_directory = path.lstrip("/")
        else:
            cover_fd = kernel.open_tree("dev/null")
        kernel.move_mount(cover_fd, fd, source="an empty one", target=path)
        os.close(cover_fd)
        os.close(fd)


def _empty_directory(box: Box) -> int:
    """A mount of it; of the one that there is, if there is one: a file system costs ten mounts."""
    if box.masked_directory:
        return kernel.open_tree(box.masked_directory)
    return kernel.new_mount("tmpfs", {"size": "0"}, kernel.MOUNT_RDONLY)


def show_only(box: Box, directory: str, *names: str) -> None:
    """Mask all that is in *directory* of /proc but *names*, and processes."""
    there = os.listdir(directory.lstrip("/"))
    hidden = (name for name in there if name not in names and not name.isdigit())
    mask(box, *(f"{directory}/{name}" for name in hidden))


def freeze_paths(box: Box, *paths: str) -> None:
    """Make what is at *paths* read-only by binding each onto itself."""
    for path in paths:
        fd = look(box.root_fd, path.lstrip("/"))
        if fd < 0:
            continue
        rebind(fd, kernel.MOUNT_RDONLY, path)
        os.close(fd)


def covers_of(box: Box, workdir: str, uid: str, gid: str, written_through: str) -> None:
    """Parts of *workdir*, which is *uid*'s and *gid*'s inside, are going to be taken away. What a
    program outside writes through a link that stands in for a file goes to *written_through*."""
    owner = int(uid), int(gid)
    box.covers = Covers(box.root_fd, workdir, *owner, lambda *made: box.report(wire.MADE, *made))
    box.covers.written_through = written_through
    box.files_as = owner


def cover(box: Box, kind: str, *paths: str) -> None:
    """Put private empty stand-ins over *paths* of the work directory; see `Covers.cover`."""
    assert box.covers
    box.covers.as_owner([(box.covers.cover, kind, path) for path in paths])


def place(box: Box, *words: str) -> None:
    """Make files, a path and a text each, where there are none."""
    assert box.covers
    pairs = zip(words[::2], words[1::2], strict=True)
    box.covers.as_owner([(box.covers.place, *pair) for pair in pairs])


def make_folders(box: Box, *paths: str) -> None:
    """Make directories in the work directory."""
    assert box.covers
    box.covers.as_owner([(box.covers.make_folder, path) for path in paths])


def protect(box: Box, *paths: str) -> None:
    """Make what exists at *paths* of the work directory read-only, and pin the way to it."""
    assert box.covers
    box.covers.each([(box.covers.protect, path) for path in paths])


def _walk(box: Box, path: str, *, is_directory: bool = True) -> int:
    """An O_PATH descriptor of *path* in the new root; what is missing of it is made."""
    fd = os.dup(box.root_fd)
    names = [name for name in path.split("/") if name]
    for position, name in enumerate(names, 1):
        found = look(fd, name)
        if found < 0:
            if position < len(names) or is_directory:
                os.mkdir(name, 0o755, dir_fd=fd)
            else:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=fd))
            found = look(fd, name)
        os.close(fd)
        fd = found
    return fd


def seal_after(box: Box, path: str, uid: str, *names: str) -> None:
    """Once the kernel of user *uid* listens on all sockets *names*, init makes *path* read-only."""
    box.kernel_uid = int(uid)
    box.seal_names = names
    box.seal_path = path
    if box.namespaces:
        box.seal_fd = kernel.openat2(
            box.root_fd, path.lstrip("/"), os.O_RDONLY | os.O_DIRECTORY, STRAIGHT
        )
    else:
        box.seal_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def pivot(box: Box) -> None:
    """pivot_root(2): the new root becomes "/", and the host's is let go of."""
    os.fchdir(box.root_fd)
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")


def close_root(box: Box) -> None:
    """Everything is in its place: "/" is read-only from here on."""
    os.chdir("/")
    kernel.detach("/.scratch")
    os.rmdir("/.scratch")
    kernel.mount_setattr(
        box.root_fd, add=kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID, recursive=False
    )
    if not box.covers:  # they are looked after from there
        os.close(box.root_fd)


def hostname(_box: Box, name: str) -> None:
    """The name in the UTS namespace of our own."""
    kernel.set_hostname(name)


def loopback_up(_box: Box) -> None:
    """Without it, a debugger inside hangs the kernel for good: debugpy connects to 127.0.0.1."""
    kernel.loopback_up()


def oom_score(_box: Box, score: str) -> None:
    """proc(5), oom_score_adj: where the whole machine runs out, a kernel goes before its server."""
    _write("/proc/self/oom_score_adj", score)


def survive_server(box: Box) -> None:
    """Do not end with the server (jupyter_client's "independent" kernels)."""
    box.survives_server = True


def stdio(box: Box, kind: str, *logged: str) -> None:
    """ "pump": init reads what the kernel writes and passes it on, so that the kernel holds no
    descriptor of the server's log or terminal. "inherit": the caller's own, as `run` wants it.
    Of stdout and stderr those that are *logged* have a budget (`output.py`)."""
    if kind == "pump":
        box.pumps = [os.pipe(), os.pipe()]
    box.logged = tuple(("stdout", "stderr").index(name) + 1 for name in logged)


def terminal(_box: Box) -> None:
    """Make the terminal among the inherited descriptors ours, so that a shell has job control."""
    kernel.take_terminal(next(fd for fd in (0, 1, 2) if os.isatty(fd)))


def become(_box: Box, uid: str, gid: str) -> None:
    """Give up every right for good: no capability, no way to gain one, an ordinary user."""
    kernel.drop_bounding_set()
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    kernel.set_capabilities()
    kernel.set_no_new_privileges()


def share_namespaces(box: Box) -> None:
    """The rest of the plan happens among the host's processes and files; init looks after what a
    namespace would have: that everything ends with it."""
    box.namespaces = False


def private_folder(_box: Box, *paths: str) -> None:
    """Directories of our own, each in one that is there."""
    for path in paths:
        os.mkdir(path, 0o700)


def own_file(_box: Box, path: str, text: str) -> None:
    """A file of the kernel's own, where there is no root of our own to put it into."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.write(fd, os.fsencode(text))
    os.close(fd)


def end_with_init(box: Box) -> None:
    """SIGKILL when init ends. If it has ended already, nobody is going to tell us."""
    kernel.die_with_parent()
    if os.getppid() != box.init_pid:
        os._exit(1)


def renounce(_box: Box) -> None:
    """An ordinary user's part of `become`: no capability that a service manager may have given, and
    no way to gain one (which also makes the bounding set mean nothing)."""
    kernel.set_capabilities()
    kernel.set_no_new_privileges()


def keep_paths(box: Box, *paths: str) -> None:
    """Let init hold open what the rules will name.

    A rule belongs to an inode in memory. Where the Linux kernel forgets one, as it does with /proc
    and some overlays when memory is short, the next look at the path makes another without a rule.
    """
    for path in paths:
        if path.startswith("/proc/self/"):
            box.kept_of_kernel.append(path.removeprefix("/proc/self/"))
        else:
            box.kept.append(_opened(box, path))


def landlock_rules(box: Box, version: str) -> None:
    """Begin a set of rules: all that *version* of Landlock's ABI can forbid is forbidden."""
    known = int(version)
    box.rules = (1 << _LANDLOCK_RIGHTS[min(known, len(_LANDLOCK_RIGHTS)) - 1]) - 1
    network = _LANDLOCK_TCP if known >= 4 else 0
    scoped = _LANDLOCK_SCOPES if known >= 6 else 0
    box.rules_fd = kernel.landlock_create_ruleset(box.rules, network, scoped)


def landlock_allow(box: Box, kind: str, *paths: str) -> None:
    """What may be done with each of *paths*, and with what lies beneath it."""
    for path in paths:
        fd = _opened(box, path)
        try:
            access = _LANDLOCK_KINDS[kind] & box.rules
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                access &= _LANDLOCK_OF_FILES
            kernel.landlock_allow(box.rules_fd, path, fd, access)
        finally:
            os.close(fd)


def chdir_place(box: Box, target: str, path: str) -> None:
    """The directory in which the kernel starts: *path* below a place that came with the plan. There
    is no root of its own in which any other path would lead nowhere."""
    fd = os.dup(box.places[target])
    if path:
        os.close(fd)
        stays = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_MAGICLINKS
        fd = kernel.openat2(box.places[target], path, os.O_PATH | os.O_DIRECTORY, stays)
    os.fchdir(fd)
    os.close(fd)


def _opened(box: Box, path: str) -> int:
    """A descriptor of *path*: of the place that came with the plan, if that is one."""
    if path in box.places:
        return os.dup(box.places[path])
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def landlock_restrict(box: Box) -> None:
    """From here on the rules hold."""
    kernel.landlock_restrict_self(box.rules_fd)


def resource_limits(_box: Box, *words: str) -> None:
    """setrlimit(2), each "NAME=SOFT:HARD". Where a hard limit is lower already, and we are nobody
    who could raise it, that one stands."""
    for word in words:
        name, _, values = word.partition("=")
        soft, hard = (_UNLIMITED if v == "unlimited" else int(v) for v in values.split(":"))
        number = _LOCKS if name == "locks" else getattr(resource, f"RLIMIT_{name.upper()}")
        try:
            resource.setrlimit(number, (soft, hard))
        except ValueError:  # EPERM
            most = resource.getrlimit(number)[1]
            inside = soft != _UNLIMITED and soft < most
            resource.setrlimit(number, (soft if inside else most, most))


def umask(_box: Box, mask: str) -> None:
    """umask(2): that of the server, which is how a person says who may read new files."""
    os.umask(int(mask, 8))


def own_limits(box: Box, *words: str) -> None:
    """Each "PATH=VALUE" below /proc/sys: settings of namespaces that are ours. One that this Linux
    does not know limits nothing."""
    for word in words:
        path, _, value = word.partition("=")
        fd = look(box.root_fd, f"proc/sys/{path}")
        if fd >= 0:
            os.close(fd)
            _write(f"proc/sys/{path}", value)


def environment(box: Box, *pairs: str) -> None:
    """The kernel's whole environment, as NAME=VALUE; nothing of the launcher's is in it."""
    for pair in pairs:
        name, _, value = os.fsencode(pair).partition(b"=")
        box.environment[name] = value


def chdir(_box: Box, path: str) -> None:
    """The directory in which the kernel starts."""
    os.chdir(path)


def system_call_filter(_box: Box, program: bytes) -> None:
    """seccomp(2). The last but one step: from here on only what the filter lets through."""
    kernel.load_filter(program)


def execute(box: Box, *argv: str) -> None:
    """execve(2). The report pipe closes with it: the server reads the end of file as success."""
    kernel.close_on_exec_from(3)
    os.execve(argv[0], argv, box.environment)


def run_kernel(box: Box, *argv: str) -> None:
    """The last step in a process that has the kernel's program loaded already: leave what `execute`
    would leave, for the caller to run *argv*.

    Both signals are as Python sets them when it starts.
    """
    kernel.show_arguments(argv)
    for signal in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(signal, _signal.SIG_IGN)
    kernel.set_dumpable(dumpable=True)
    kept = sorted((box.binding[0], box.ready[1])) if box.unclaimed else []
    first = 3
    for fd in (*kept, _OPEN_FILES):
        os.closerange(first, fd)
        first = fd + 1
    box.kernel_argv = argv


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise kernel.CallFailed("write", error.errno or 0, file=path, text=text) from None
    finally:
        os.close(fd)


# The steps that only a plan without namespaces has.
_OF_LANDLOCK = (
    share_namespaces, private_folder, own_file, keep_paths, end_with_init, renounce,
    chdir_place, landlock_rules, landlock_allow, landlock_restrict,
)  # fmt: skip
# Those that only a start from a nursery has, and the nursery's own.
_OF_WARM_START = (
    hand_over, await_opened, outlive_kernel, run_kernel, map_child, map_own_ids,
    become_root_inside, stay_unclaimed, bind_kernel,
)  # fmt: skip
LANDLOCK_VERBS = frozenset(verb.__name__.replace("_", "-") for verb in _OF_LANDLOCK)
WARM_VERBS = frozenset(verb.__name__.replace("_", "-") for verb in _OF_WARM_START)


def _names() -> dict[str, Callable[..., None]]:
    verbs = (
        *_OF_LANDLOCK, *_OF_WARM_START,
        exit_file, join_cgroup, open_memory, watch_memory, oom_score, make_user_namespace, take,
        find_again, take_place, receive,
        enter_user_namespace, unshare_user_namespace, map_user_namespace, unshare, fork_init,
        new_session, new_root, symlink, file, private_file, attach, mount, scratch, mask,
        freeze_paths, show_only, covers_of, cover, place, make_folders, protect, seal_after, pivot,
        close_root, hostname, loopback_up, survive_server, stdio, terminal, become,
        resource_limits, own_limits, umask, environment, chdir, system_call_filter, execute,
    )  # fmt: skip
    return {verb.__name__.replace("_", "-"): verb for verb in verbs}


VERBS = _names()
