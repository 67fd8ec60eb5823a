"""Attempted escapes: through files, mounts, devices, and what the Linux kernel shows as files."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import venv

import pytest
from probes import answer_of, attempt_to_open

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.plan import HOME
from sandbox_provisioner.spec import Limits, Volume
from sandbox_provisioner.system_files import system_files

pytestmark = pytest.mark.requires("userns")

MIB = 1 << 20
DEVICES = {"null", "zero", "full", "random", "urandom", "tty"}
DEV_LINKS = {"fd", "stdin", "stdout", "stderr", "ptmx"}


def mounts():
    """Per mount: root within its file system, mount point, type, source."""
    with open("/proc/self/mountinfo") as file:
        found = []
        for line in file:
            left, right = line.split(" - ")
            found.append([*left.split()[3:5], *right.split()[:2]])
        return found


def options_of_mounts():
    with open("/proc/self/mountinfo") as file:
        return {line.split()[4]: line.split()[5].split(",") for line in file}


def answers_of_opening(paths, flags):
    return {path: attempt_to_open(path, flags) for path in paths}


def of_the_interpreter(folder):
    """The entries of *folder* in which our Python or a package of it lies: they must be there."""
    places = [sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path)]
    within = [os.path.relpath(os.path.realpath(place), folder) for place in places]
    return {place.partition("/")[0] for place in within} - {".", ".."}


# -- no work directory


def test_without_a_work_directory_a_box_writes_to_memory_alone(run_inside, new_folder):
    def writes(files):
        import os

        def opened(path):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            except OSError as error:
                return error.strerror
            return "opened"

        with open("/proc/self/mountinfo") as file:
            lines = [line.split(" - ") for line in file]
        writable = [right.split()[0] for left, right in lines if left.split()[5].startswith("rw")]
        return os.getcwd(), opened("own"), opened(f"{files}/own"), sorted(set(writable))

    files = new_folder()
    cwd, own, of_host, writable = run_inside(
        writes,
        "/files",
        workdir="none",
        cwd=HOME,
        volumes=(Volume(source=str(files), target="/files"),),
    )
    assert (cwd, own, of_host) == (HOME, "opened", "Read-only file system")
    assert set(writable) <= {"tmpfs", "proc", "devtmpfs", "devpts"}
    assert os.listdir(files) == []


# -- the root


def test_the_root_is_not_the_hosts(run_inside):
    def root():
        import os

        status = os.stat("/")
        return [status.st_dev, status.st_ino], os.listdir("/")

    (device, inode), names = run_inside(root)
    here = os.stat("/")
    assert (device, inode) != (here.st_dev, here.st_ino)
    expected = {"bin", "sbin", "usr", "lib", "lib32", "lib64", "libx32", "nix", "etc", "dev",
                "proc", "tmp", "home", "run", "var"}  # fmt: skip
    assert set(names) <= expected | of_the_interpreter("/")


def test_the_mounts_are_what_was_asked_for_and_nothing_else(run_inside, sandbox, workdir):
    found = run_inside(mounts)
    plan = sandbox.explain()
    declared = {"/"} | {
        target for step in plan.steps if step.verb == "attach" for target in step.words
    }
    declared |= {step.words[1] for step in plan.steps if step.verb == "mount"}
    declared |= {word for step in plan.steps if step.verb in {"mask", "freeze-paths"}
                 for word in step.words}  # fmt: skip
    declared |= {word.partition(":")[2] for step in plan.steps if step.verb == "scratch"
                 for word in step.words[3:]}  # fmt: skip
    below_proc = {point for _, point, _, _ in found if point.startswith("/proc/")}
    assert {point for _, point, _, _ in found} - below_proc <= declared
    shown = {step.words[0]: step.words[1:] for step in plan.steps if step.verb == "show-only"}
    for place in below_proc - declared:
        folder, name = os.path.split(place)
        assert name not in shown[folder], place


def test_nothing_of_the_old_root_stays_mounted(run_inside):
    found = run_inside(mounts)
    devices = {f"/{name}" for name in DEVICES}
    of_host = [m for m in found if m[2] in {"cgroup", "cgroup2", "sysfs", "devtmpfs", "devpts"}]
    assert {(root, kind) for root, _, kind, _ in of_host} <= {
        *((device, "devtmpfs") for device in devices),
        ("/", "devpts"),
    }
    assert not [point for _, point, _, _ in found if "old" in point or "scratch" in point]


def test_every_mount_forbids_set_id_programs_and_every_one_but_dev_forbids_devices(run_inside):
    for point, options in run_inside(options_of_mounts).items():
        assert "nosuid" in options or point == "/" or point.startswith("/proc/"), point
        if not point.startswith(("/dev", "/proc/")):
            assert "nodev" in options, point


def test_a_walk_upwards_ends_at_the_own_root(run_inside):
    def walk():
        import os

        up = "../" * 64
        same = os.path.samestat(os.stat(up), os.stat("/"))
        return same, os.getcwd(), answer_of(lambda: os.stat(up + "root/.ssh"))

    same, cwd, answer = run_inside(walk, using=(answer_of,))
    assert same
    assert not cwd.startswith("(unreachable)")
    assert answer == "ENOENT"


def test_the_root_and_the_systems_programs_are_read_only(run_inside):
    def write():
        import os

        places = ("/", "/usr", "/etc", "/usr/bin", "/dev", "/home", "/proc/sys/kernel", "/var")
        flags = os.O_CREAT | os.O_WRONLY
        found = {place: attempt_to_open(f"{place}/planted", flags) for place in places}
        found["passwd"] = attempt_to_open("/etc/passwd", os.O_WRONLY)
        found["chmod"] = answer_of(lambda: os.chmod("/etc/passwd", 0o666))
        found["unlink"] = answer_of(lambda: os.unlink("/etc/passwd"))
        found["rename"] = answer_of(lambda: os.rename("/etc", "/etc2"))
        return found

    answers = run_inside(write, using=(answer_of, attempt_to_open))
    assert set(answers.values()) <= {"EROFS", "EACCES", "ENOENT", "EPERM", "EBUSY"}, answers


def test_the_kernels_environment_is_read_only(run_inside):
    def write(places):
        import os

        flags = os.O_CREAT | os.O_WRONLY
        return {place: attempt_to_open(f"{place}/planted.pth", flags) for place in places}

    places = [sys.prefix, sysconfig.get_path("purelib"), f"{sys.prefix}/bin", sys.base_prefix]
    answers = run_inside(write, places, using=(attempt_to_open,))
    assert set(answers.values()) == {"EROFS"}, answers


def test_an_environment_in_the_work_directory_is_read_only_and_its_parent_cannot_move(
    sandbox, workdir
):
    def write(prefix):
        import os

        folder = os.path.dirname(prefix)
        return {
            "open": attempt_to_open(f"{prefix}/pyvenv.cfg", os.O_WRONLY),
            "create": attempt_to_open(f"{prefix}/lib/planted.pth", os.O_CREAT | os.O_WRONLY),
            "rename": answer_of(lambda: os.rename(prefix, prefix + "2")),
            "rename parent": answer_of(lambda: os.rename(folder, folder + "2")),
            "beside": attempt_to_open(f"{folder}/mine", os.O_CREAT | os.O_WRONLY),
        }

    prefix = workdir / "project" / ".venv"
    venv.create(prefix, symlinks=True)
    argv = [str(prefix / "bin/python"), *default_argv()[1:]]
    with sandbox(argv) as box:
        answers = box.call(write, str(prefix), using=(answer_of, attempt_to_open))
    assert answers.pop("beside") == "opened"
    assert set(answers.values()) <= {"EROFS", "EBUSY"}, answers


def default_argv():
    from boxes import PROGRAM

    return [sys.executable, "-c", PROGRAM]


def test_a_volume_is_read_only_unless_it_says_otherwise(run_inside, new_folder):
    def write(places):
        import os

        return [attempt_to_open(f"{p}/file", os.O_CREAT | os.O_WRONLY) for p in places]

    shown, open_one = new_folder(), new_folder()
    for folder in (shown, open_one):
        folder.chmod(0o777)
    volumes = (
        Volume(source=str(shown), target="/data"),
        Volume(source=str(open_one), target="/drop", readonly=False),
    )
    answers = run_inside(write, ["/data", "/drop"], using=(attempt_to_open,), volumes=volumes)
    assert answers == ["EROFS", "opened"]
    assert os.listdir(shown) == []


@pytest.mark.requires("root")
@pytest.mark.parametrize("owner", [0, 4321])
def test_what_a_kernel_writes_to_a_volume_belongs_to_the_volumes_owner(
    run_inside, new_folder, owner
):
    def write():
        open("/data/file", "w").close()

    folder = new_folder()
    os.chown(folder, owner, owner)
    run_inside(write, volumes=(Volume(source=str(folder), target="/data", readonly=False),))
    assert (folder / "file").stat().st_uid == owner


def test_a_volume_cannot_be_shown_in_the_work_directory(run_inside, new_folder, workdir):
    volume = Volume(source=str(new_folder()), target=f"{workdir}/data")
    with pytest.raises(SpecError, match="lies in the work directory"):
        run_inside(os.getpid, volumes=(volume,))


# -- files of the host


def test_secrets_of_the_host_are_not_there(run_inside):
    paths = [
        "/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/ssh", "/etc/ssh/ssh_host_rsa_key",
        "/root/.ssh", "/root/.bashrc", "/boot", "/var/log", "/var/spool", "/var/lib/dpkg",
        "/etc/ssl/private", "/etc/machine-id", "/etc/fstab", "/etc/crontab", "/etc/environment",
        "/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd", "/run/user",
        "/var/run/docker.sock", "/mnt", "/media", "/srv",
    ]  # fmt: skip
    answers = run_inside(answers_of_opening, paths, os.O_RDONLY, using=(attempt_to_open,))
    found = {path for path, answer in answers.items() if answer == "opened"}
    assert found <= {f"/{name}" for name in of_the_interpreter("/")}


def test_of_var_only_what_packages_made_for_everybody_is_there(run_inside):
    def names():
        import os

        return [f"{at}/{name}" for at in ("/var/lib", "/var/cache") if os.path.isdir(at)
                for name in os.listdir(at)]  # fmt: skip

    assert set(run_inside(names)) - set(system_files()) <= {
        f"{at}/{name}" for at in ("/var/lib", "/var/cache") for name in of_the_interpreter(at)
    }


def test_other_entries_of_tmp_and_home_are_not_there(run_inside, workdir, new_folder):
    def names():
        import os

        return {place: os.listdir(place) for place in ("/tmp", "/home", "/var/tmp", "/run")}

    other = new_folder()
    found = run_inside(names)
    assert other.name not in found["/tmp"]
    assert set(found["/tmp"]) <= {workdir.name} | of_the_interpreter("/tmp")
    assert found["/home"] == ["jovyan"]
    assert set(found["/var/tmp"]) <= of_the_interpreter("/var/tmp")
    assert found["/run"] == []


def test_of_a_home_only_the_work_directory_is_there(run_inside, new_folder):
    def names(path):
        import os

        return os.listdir(path)

    home = new_folder()
    (home / "work").mkdir()
    (home / "secret").write_text("s3cret")
    assert run_inside(names, str(home), workdir=home / "work") == ["work"]


def test_no_socket_of_the_host_is_in_sight(run_inside, workdir):
    def sockets():
        import os
        import stat

        found = []
        for folder, folders, names in os.walk("/"):
            if folder == "/":
                folders.remove("proc")
                folders.remove("usr")
            for name in names:
                path = os.path.join(folder, name)
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    found.append(path)
        return found

    assert run_inside(sockets) == []


def test_a_link_in_the_work_directory_leads_nowhere_on_the_host(run_inside, workdir):
    (workdir / "shadow").symlink_to("/etc/shadow")
    (workdir / "host").symlink_to("/proc/1/root/etc/shadow")
    (workdir / "up").symlink_to("../../../../root/.ssh")
    names = ["shadow", "host", "up"]
    answers = run_inside(answers_of_opening, names, os.O_RDONLY, using=(attempt_to_open,))
    assert "opened" not in answers.values()


# -- devices


def test_dev_holds_the_harmless_devices_and_nothing_else(run_inside):
    def names():
        import os

        return os.listdir("/dev"), os.listdir("/dev/pts"), os.listdir("/dev/shm")

    dev, terminals, shared = run_inside(names)
    assert set(dev) == DEVICES | DEV_LINKS | {"pts", "shm"}
    assert (terminals, shared) == (["ptmx"], [])


def test_devices_of_the_host_cannot_be_opened(run_inside):
    names = ("mem", "kmem", "port", "kmsg", "kvm", "fuse", "loop0", "loop-control", "vda", "sda",
             "net/tun", "console", "tty1", "hwrng", "rtc0", "vsock", "input", "dri")  # fmt: skip
    paths = [f"/dev/{name}" for name in names]
    answers = run_inside(answers_of_opening, paths, os.O_RDONLY, using=(attempt_to_open,))
    assert set(answers.values()) == {"ENOENT"}


@pytest.mark.parametrize("place", [".", "/tmp", "/dev/shm"])
def test_no_device_can_be_made(run_inside, place):
    def make(place):
        import os
        import stat

        null, disk = (stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 254, 0)
        return [
            answer_of(lambda k=k: os.mknod(f"{place}/made", k[0] | 0o666, os.makedev(*k[1:])))
            for k in (null, disk)
        ]

    assert run_inside(make, place, using=(answer_of,)) == ["EPERM", "EPERM"]


# -- what the Linux kernel shows as files


def test_no_sysfs_and_no_cgroup_file_is_there(run_inside):
    paths = ["/sys", "/sys/fs/cgroup", "/sys/firmware", "/sys/kernel/debug", "/sys/class/powercap"]
    answers = run_inside(answers_of_opening, paths, os.O_RDONLY, using=(attempt_to_open,))
    assert set(answers.values()) == {"ENOENT"}


def test_nothing_of_proc_tells_more_than_programs_need(run_inside):
    """Whatever else this Linux has there is empty, or cannot be opened."""

    def read():
        import os

        def text_of(path):
            if os.path.isdir(path):
                return "".join(os.listdir(path))
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                return os.read(fd, 64).decode("latin-1")
            except OSError:
                return ""

        names = [name for name in os.listdir("/proc") if not name.isdigit()]
        names += [f"sys/{name}" for name in os.listdir("/proc/sys")]
        names += ["sys/kernel/random/boot_id", "sys/kernel/core_pattern", "sys/fs/binfmt_misc"]
        return sorted(name for name in names if text_of(f"/proc/{name}"))

    needed = {
        "cpuinfo", "filesystems", "loadavg", "meminfo", "mounts", "net", "self", "stat", "sys",
        "sysvipc", "thread-self", "uptime", "version", "vmstat", "sys/crypto", "sys/fs",
        "sys/kernel", "sys/net", "sys/user", "sys/vm",
    }  # fmt: skip
    found = set(run_inside(read))
    assert found <= needed
    assert {"cpuinfo", "meminfo", "stat", "version", "sys/kernel"} <= found


def test_a_mask_cannot_be_written_through(run_inside):
    def write():
        import os

        paths = ("/proc/sysrq-trigger", "/proc/kcore", "/proc/sys/kernel/core_pattern")
        found = {}
        for path in paths:
            try:
                status = os.stat(path)
                found[path] = os.major(status.st_rdev), os.minor(status.st_rdev)
            except FileNotFoundError:
                continue
        return list(found.values())

    assert set(map(tuple, run_inside(write))) == {(1, 3)}


def test_settings_of_the_linux_kernel_cannot_be_changed(run_inside):
    def write():
        import os

        found = {}
        for folder, _, names in os.walk("/proc/sys"):
            for name in names:
                path = os.path.join(folder, name)
                if os.stat(path).st_rdev != os.makedev(1, 3):  # masked
                    found[path] = attempt_to_open(path, os.O_WRONLY)
        return sorted(set(found.values())), len(found)

    answers, count = run_inside(write, using=(attempt_to_open,))
    assert count > 100
    assert set(answers) <= {"EROFS", "EACCES", "EPERM", "ENOENT"}


def test_no_file_of_proc_lets_itself_be_written_that_acts_on_others(run_inside):
    def write():
        import os

        found = {}
        for folder, folders, names in os.walk("/proc"):
            if folder == "/proc":
                folders[:] = [f for f in folders if not f.isdecimal()]
                folders[:] = [f for f in folders if f not in ("self", "thread-self", "sys")]
            for name in names:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    found[path] = attempt_to_open(path, os.O_WRONLY)
        masked = {p for p in found if os.path.exists(p) and os.stat(p).st_rdev == os.makedev(1, 3)}
        return sorted(p for p, answer in found.items() if answer == "opened" and p not in masked)

    assert run_inside(write, using=(attempt_to_open,)) == []


# -- room


def test_shared_memory_is_as_large_as_asked_for(run_inside):
    def fill(path):
        import os

        written = 0
        try:
            with open(path, "wb", buffering=0) as file:
                while True:
                    written += file.write(bytes(1 << 16))
        except OSError as error:
            os.unlink(path)
            return written, error.strerror

    limits = Limits(shm_bytes=4 * MIB)
    written, answer = run_inside(fill, "/dev/shm/file", limits=limits)
    assert answer == "No space left on device"
    assert written == 4 * MIB


def test_all_writable_places_share_one_cap(run_inside):
    def fill():
        import contextlib
        import os

        places = [os.path.expanduser("~"), "/tmp", "/run", "/var/tmp"]
        total = 0
        for place in places:
            with contextlib.suppress(OSError), open(f"{place}/file", "wb", buffering=0) as file:
                while True:
                    total += file.write(bytes(1 << 16))
        return total

    assert run_inside(fill, limits=Limits(tmp_bytes=8 * MIB)) <= 8 * MIB


@pytest.mark.requires("cgroup-memory")
def test_shared_memory_follows_the_cap_on_memory(run_inside):
    def sizes():
        import os

        found = [os.statvfs(path) for path in ("/dev/shm", "/tmp")]
        return [each.f_blocks * each.f_frsize for each in found]

    limits = Limits(memory_bytes=256 * MIB)
    assert run_inside(sizes, limits=limits) == [128 * MIB, 128 * MIB]


def test_the_root_itself_gives_no_room(run_inside):
    def find_room():
        import os

        found = []
        for folder, folders, _ in os.walk("/"):
            if folder == "/":
                folders.remove("proc")
                folders.remove("usr")
            if os.access(folder, os.W_OK):
                found.append(folder)
        return [f for f in found if f.count("/") <= 2]

    private = {"/tmp", "/dev/shm", "/run", "/var/tmp", "/home/jovyan"}
    assert {f for f in run_inside(find_room) if not f.startswith("/tmp/")} == private


def test_a_full_inode_table_is_refused_before_it_costs_much(run_inside):
    def fill():
        count = 0
        try:
            while count < 1 << 20:
                open(f"/dev/shm/{count}", "w").close()
                count += 1
        except OSError as error:
            return count, error.strerror
        return count, ""

    count, answer = run_inside(fill, limits=Limits(shm_bytes=1 * MIB))
    assert answer == "No space left on device"
    assert count < 1 << 18


def test_sockets_bound_by_the_host_in_the_work_directory_are_all_that_can_be_reached(
    run_inside, workdir
):
    """A socket that a person keeps in the work directory is theirs to show; abstract ones not."""

    def connect(path):
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            return one.connect_ex(path)

    path = str(workdir / "mine")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert run_inside(connect, path) == 0
