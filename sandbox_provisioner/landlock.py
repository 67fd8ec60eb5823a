"""landlock.py - pure: the plan where there are no namespaces, the confinement "landlock".

The kernel stays among the host's processes, mounts and sockets, as the server's own user. What
holds it: Landlock's rules for files, TCP and signals, a stricter system call filter
(`seccomp.SHARED_REFUSED`), limits, and an init outside of the rules that ends everybody at the end.

Rules only ever allow, for a directory and all beneath it. So whatever a mount would cover cannot be
covered here: a work directory in which something has to be, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandbox_provisioner.bounds import kernels_limits
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside.seccomp import SHARED, compile_filter
from sandbox_provisioner.plan import SOCKET_NAMES, LaunchRequest, Plan, Site, Step
from sandbox_provisioner.spec import relative
from sandbox_provisioner.variables import kernel_environment

# What each version of Landlock's ABI brought that nothing else of this plan has instead.
_SIGNALS_SINCE = 6
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Of /proc what tells of the machine, and of the kernel's own process: no command line, no
# environment and no sockets of anybody else.
_PROC = (
    "cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "sys", "uptime", "version",
    "self/auxv", "self/cgroup", "self/cmdline", "self/comm", "self/environ", "self/fd",
    "self/fdinfo", "self/limits", "self/maps", "self/smaps_rollup", "self/stat", "self/statm",
    "self/status",
)  # fmt: skip
_IPYTHON_FOLDERS = (
    ".ipython", ".ipython/profile_default", ".ipython/profile_default/startup",
)  # fmt: skip
_REMEDY = 'Use a directory below it, or confinement = "namespaces", which can cover parts of it.'


def private(folder: str, name: str = "") -> str:
    """A directory of the kernel's own below the *folder* of its record."""
    return os.path.join(folder, "private", name).rstrip("/")


def obstacle(facts: HostFacts) -> HostError | None:
    """Why this confinement cannot be had by this user here; None where it can."""
    attempt = 'use confinement = "landlock"'
    if facts.landlock < 1:
        return HostError(
            attempt=attempt,
            answer="this Linux has no Landlock, or it is not switched on",
            remedy="Boot Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK=y and landlock in the "
            "parameter lsm= (see /sys/kernel/security/lsm); a container's system call filter has "
            "to allow landlock_create_ruleset.",
        )
    if facts.uid == 0:
        return HostError(
            attempt=attempt,
            answer="the server is root, and the kernel would be, too",
            remedy='Run the server as an ordinary user, or use confinement = "namespaces".',
        )
    return None


def losses(facts: HostFacts) -> tuple[str, ...]:
    """What this confinement does not give here and namespaces do, a clause each."""
    lost: tuple[str, ...] = (
        "the kernel has the server's user id, and runs among the host's processes",
        "names, sizes and times of the user's files anywhere can be looked up by their paths",
        "there is no network at all, not even 127.0.0.1, and no connect(2): no debugger, no "
        "output of forked processes",
        "no /tmp, /dev/shm, terminals or other processes' /proc: !command in IPython and "
        "multiprocessing's locks do not work",
        "no mode, owner or attribute changes by a file's name: shutil.copy and git init fail",
        "tmp_limit, shm_limit and hostname have no effect",
    )
    if facts.landlock < _SIGNALS_SINCE:
        lost += (
            f"version {facts.landlock} of Landlock cannot keep back signals (6 can, Linux 6.12): "
            "the kernel can end any process of its user, the server too",
        )
    return lost


def compile_landlock_plan(request: LaunchRequest, site: Site) -> Plan:
    """The steps for *request* at *site*. Raises HostError or SpecError if it cannot be as asked."""
    problem = obstacle(site.facts)
    if problem:
        raise problem
    _check_workdir(site)
    _check_volumes(site)
    folder = os.path.dirname(site.sockets)
    rules = tuple(_rule_steps(request, site, folder))
    named = (word for rule in rules if rule.verb == "landlock-allow" for word in rule.words[1:])
    opened = tuple(f"place:{place.source}" for _, place in site.places)
    steps = (
        Step("receive", opened, "opened and judged before; no path is looked up again"),
        Step("share-namespaces", (), "; ".join(losses(site.facts))),
        Step("exit-file", (site.exit_file,), "where init will write how the kernel ended"),
        Step("join-cgroup", site.join_files, "memory, CPU and processes are charged from here on"),
        Step("oom-score", ("300",), "if the machine runs out, kernels go before their server"),
        Step("fork-init", (), "a process outside of the rules watches the kernel, and ends all"),
        Step("new-session", (), "no terminal, process group or keyring of the server"),
        *_folder_steps(request, site, folder),
        Step("keep-paths", tuple(map(str, named)), "a rule lasts as long as Linux knows its file"),
        *((Step("survive-server", (), "asked for by the caller"),) * request.survive_server),
        request.stdio,
        Step("fork-kernel", (), "init stays behind and adopts orphans; the rest is the kernel's"),
        *_kernel_steps(request, site, folder, rules),
    )
    return Plan(tuple(step for step in steps if step.verb != "join-cgroup" or step.words))


def _check_workdir(site: Site) -> None:
    workdir, found = site.workdir, site.workdir.covered
    covered = (
        *found.directories, *found.files, *found.links, *found.sockets, *found.frozen,
    )  # fmt: skip
    if covered:
        some = ", ".join(covered[:3]) + (", ..." if len(covered) > 3 else "")
        raise SpecError(
            attempt=f'use {workdir.path} as the work directory with confinement = "landlock"',
            answer=f"what the host would run or trust lies in it ({some}), and Landlock cannot "
            "take away parts of a directory",
            remedy=_REMEDY,
        )
    for path in site.files.readonly:
        if relative(os.path.realpath(path), workdir.source) is not None:
            raise SpecError(
                attempt=f'use {workdir.path} as the work directory with confinement = "landlock"',
                answer=f"the kernel's environment {path} lies in it, and could be changed",
                remedy=_REMEDY,
            )


def _check_volumes(site: Site) -> None:
    for facts in site.volumes:
        if facts.volume.target != facts.source:
            raise SpecError(
                attempt=f"show the volume {facts.volume.source} at {facts.volume.target}",
                answer='confinement = "landlock" has no mounts: a path is what it is outside',
                remedy=f'Write "{facts.source}:{facts.source}".',
            )


def _folder_steps(request: LaunchRequest, site: Site, folder: str) -> Iterator[Step]:
    home = private(folder, "home")
    own = tuple(private(folder, name) for name in ("", "home", "tmp", "jupyter"))
    profile = tuple(f"{home}/{name}" for name in _IPYTHON_FOLDERS)
    yield Step("private-folder", own, "in place of /home/jovyan, /tmp and /run/jupyter")
    why = "IPython would copy its own, with the chmod(2) that the filter refuses"
    yield Step("private-folder", profile, why)
    yield Step("own-file", (f"{profile[-1]}/README", "Start-up files of IPython.\n"))
    if request.connection_file:
        name, text = request.connection_file
        path = f"{private(folder, 'jupyter')}/{name}"
        yield Step("own-file", (path, text), "its keys are its own")
        why = "init says so once the kernel listens; it can make sockets there, and no links"
        yield Step("seal-after", (site.sockets, str(site.uid), *SOCKET_NAMES), why)


# -- in the process that becomes the kernel


def _kernel_steps(
    request: LaunchRequest, site: Site, folder: str, rules: tuple[Step, ...]
) -> Iterator[Step]:
    yield Step("end-with-init", (), "nobody else would end it")
    if request.terminal:
        yield Step("terminal", (), "a shell inside has job control, and Ctrl-C goes to its jobs")
    yield from _limit_steps(request, site)
    yield Step("renounce", (), "no capability, no way to gain one")
    variables = kernel_environment(
        request.environment,
        site.server_environment,
        kept=request.env_keep,
        limits=request.spec.limits,
        network=request.spec.network,
        home=private(folder, "home"),
        hostname=request.spec.hostname,
        found=site.files.variables,
    )
    variables["TMPDIR"] = private(folder, "tmp")
    pairs = tuple(f"{name}={value}" for name, value in sorted(variables.items()))
    yield Step("environment", pairs, "this, and nothing of the server's")
    below = relative(request.cwd, site.workdir.path) or ""
    yield Step("chdir-place", (site.workdir.source, below))
    yield from rules
    program = compile_filter(site.facts.machine, SHARED)
    why = "an allow-list of what the kernel may ask Linux, and no connection to anybody"
    yield Step("system-call-filter", (program, SHARED), why)
    yield Step("execute", (site.files.program, *request.argv[1:]))


def _limit_steps(request: LaunchRequest, site: Site) -> Iterator[Step]:
    """Where a cap was waived since there is no cgroup for it, what setrlimit(2) has instead.

    RLIMIT_AS is not among it: programs reserve addresses by the gigabyte and use few of them.
    """
    limits, missing = request.spec.limits, site.facts.cgroups.missing
    yield Step("resource-limits", kernels_limits(), "all, so that none is the server's by chance")
    yield Step("umask", (f"{site.facts.umask:04o}",), "the server's: who may read new files")
    if limits.pids is not None and "pids" in missing:
        why = f"no cgroup caps processes here: {limits.pids} more than the user has now"
        most = limits.pids + site.user_tasks
        yield Step("resource-limits", (f"nproc={most}:{most}",), why)
    if limits.memory_bytes is not None and "memory" in missing:
        why = "no cgroup caps memory here: at least each process has a cap on what it writes to"
        words = (f"data={limits.memory_bytes}:{limits.memory_bytes}",)
        yield Step("resource-limits", words, why)


def _rule_steps(request: LaunchRequest, site: Site, folder: str) -> Iterator[Step]:
    facts = site.facts
    why = f"version {facts.landlock}: everything it knows is forbidden but for what follows"
    yield Step("landlock-rules", (str(facts.landlock),), why)
    programs = (*facts.system_directories, *site.files.readonly)
    yield Step("landlock-allow", ("run", *programs), "the system's and the kernel's programs")
    yield Step("landlock-allow", ("read", *facts.system_files), "what programs need of /etc")
    yield Step("landlock-allow", ("use", *(f"/dev/{name}" for name in _DEVICES)))
    yield Step("landlock-allow", ("read", *(f"/proc/{name}" for name in _PROC)))
    writable = [site.workdir.source, *(private(folder, name) for name in ("home", "tmp"))]
    if request.connection_file:
        writable.append(private(folder, "jupyter"))
    yield Step("landlock-allow", ("change", *writable), "the work directory, and what is private")
    if request.connection_file:
        yield Step("landlock-allow", ("bind", site.sockets), "the kernel's own sockets")
    for volume in site.volumes:
        kind = "run" if volume.volume.readonly else "change"
        yield Step("landlock-allow", (kind, volume.source), "asked for by volumes")
    yield Step("landlock-restrict", (), "from here on the rules hold, for all that it starts too")
