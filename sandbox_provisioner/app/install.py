"""app/install.py - a command of its own: `jupyter sandbox install` makes sandboxed twins."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_core.paths import jupyter_config_dir, prefer_environment_over_user
from traitlets import Bool, Unicode

from sandbox_provisioner.app.apparmor import write_profile
from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    OPTION_ALIASES,
    SandboxCommand,
    find_kernel,
    silent_log,
    working_directory,
)
from sandbox_provisioner.app.course import Course, in_its_root, read_course, told_of
from sandbox_provisioner.app.server import reset_server, set_up_server
from sandbox_provisioner.app.twins import twin_of, write_twin
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.inside.printable import printable
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.spec import Confinement

_ALIASES = {
    "kernel": "InstallApp.kernel",
    "name": "InstallApp.kernel_name",
    "display-name": "InstallApp.display_name",
    "prefix": "InstallApp.prefix",
    "from": "InstallApp.course",
    "output": "InstallApp.output",
    **OPTION_ALIASES,
    **COMMON_ALIASES,
}
_FLAGS = {
    **COMMON_FLAGS,
    "user": ({"InstallApp": {"user": True}}, "Install for this user."),
    "sys-prefix": (
        {"InstallApp": {"prefix": sys.prefix}},
        "Install into the environment that this command belongs to.",
    ),
    "replace": ({"InstallApp": {"replace": True}}, "Replace a kernel of that name."),
    "server": (
        {"InstallApp": {"server": True}},
        "Install no kernel, but set up the Jupyter server beside the kernels.",
    ),
    "remove": ({"InstallApp": {"remove": True}}, "With --server: undo it."),
    "apparmor-profile": (
        {"InstallApp": {"apparmor_profile": True}},
        "Install nothing, but print the AppArmor profile that lets sandboxes start on Ubuntu.",
    ),
}


class InstallApp(SandboxCommand):
    """Makes the twin's kernel.json, checks all of it, and only then writes."""

    usage = "jupyter sandbox install [--kernel NAME] [options]"
    description = (
        "Install a sandboxed twin of a kernel: the same kernel, started in a sandbox, beside the "
        "plain one.\n\n"
        "Without --user, --sys-prefix or --prefix it goes into the virtual or conda environment "
        "that this command belongs to, if that is yours, and otherwise to your own kernels. For "
        "all users of a machine: --prefix=/usr/local. The options of the sandbox that you give "
        "here stand in its kernel.json and win over configuration files; leave one out, and "
        "c.SandboxProvisioner of the server's configuration decides."
    )
    examples = """
    jupyter sandbox install
    jupyter sandbox install --mem-limit 2G --cpu-limit 1.5 --pids-limit 256
    jupyter sandbox install --kernel ir --display-name "R, sandboxed" --user
    jupyter sandbox install --name student --volume /data:/data:ro --prefix=/usr/local
    jupyter sandbox install --name python3 --replace     # no plain Python 3 remains
    jupyter sandbox install --from sandbox.toml          # a course, as one file says it
    jupyter sandbox install --server                     # links of kernels do not mislead saving
    jupyter sandbox install --apparmor-profile           # for the administrator of an Ubuntu

    To remove one: jupyter kernelspec remove python3-sandbox
    """
    kernel = Unicode("", help="The installed kernel to make a twin of. Default: python3.").tag(
        config=True
    )
    kernel_name = Unicode(
        "", help="The twin's name. Default: KERNEL-sandbox, or KERNEL-landlock."
    ).tag(config=True)
    display_name = Unicode(
        "",
        help='What front ends show. Default: the kernel\'s and " (sandboxed)" or " (landlock)".',
    ).tag(config=True)
    course = Unicode(
        "",
        help="A file that has options of the sandbox, and name, display_name and kernel, beside "
        "the notebooks that are for it (docs/images.md). What is given here wins.",
    ).tag(config=True)
    user = Bool(False, help="Install for this user.").tag(config=True)
    prefix = Unicode("", help="Install to PREFIX/share/jupyter/kernels.").tag(config=True)
    replace = Bool(False, help="Replace an installed kernel of that name.").tag(config=True)
    server = Bool(False, help="Set up the server instead.").tag(config=True)
    remove = Bool(False, help="Undo that.").tag(config=True)
    apparmor_profile = Bool(False, help="Print an AppArmor profile instead.").tag(config=True)
    output = Unicode("", help="Where to write that profile. Default: stdout.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`: check, write, tell."""
        self.refuse_words()
        if self.output and not self.apparmor_profile:
            raise self.wrong("--output is for --apparmor-profile")
        if self.apparmor_profile:
            write_profile(self.output)
            return
        if self.user and self.prefix:
            raise self.wrong("--user and --prefix (or --sys-prefix) exclude each other")
        if self.remove and not self.server:
            raise self.wrong("--remove is for --server; kernels: jupyter kernelspec remove NAME")
        if self.server:
            print(self._set_up_server())
            return
        manager = self.kernels()
        course = read_course(self.course) if self.course else Course()
        of_kernel = self.kernel or course.kernel or "python3"
        kernel = find_kernel(manager, of_kernel)
        with told_of(self.course):
            options = self._checked_options(course)
            kernel = in_its_root(kernel, options.get("rootfs", "host"))
        held_by = confiner(options.get("confinement") or Confinement.NAMESPACES)
        # A weaker one can stand beside the usual one.
        kind = held_by.shown_as if held_by.must_be_shown else "sandbox"
        name = (self.kernel_name or course.name or f"{of_kernel}-{kind}").lower()
        twin = twin_of(kernel, options, name=name, display_name=self._shown_name(course))
        folder = self._install(manager, kernel, twin, name)
        print(printable(_report(manager, name, twin, folder)))

    def _set_up_server(self) -> str:
        prefix = self._prefix()
        folder = Path(prefix, "etc/jupyter") if prefix else Path(jupyter_config_dir())
        return reset_server(folder) if self.remove else set_up_server(folder, replace=self.replace)

    def _prefix(self) -> str:
        """Where all goes to, "" for the user's own."""
        in_environment = not self.user and prefer_environment_over_user()
        return self.prefix or (sys.prefix if in_environment else "")

    def _shown_name(self, course: Course) -> str:
        """Of a course its own, where it has none its name."""
        of_course = course.display_name or (f"{course.name} (sandboxed)" if course.name else "")
        return self.display_name or of_course

    def _checked_options(self, course: Course) -> dict[str, Any]:
        """Read the options as a start would; nothing is written with one that cannot be meant."""
        options = {**course.options, **self.given_options()}
        checked = SandboxProvisioner(**{**options, "workdir": working_directory()})
        checked.spec_for(working_directory())
        if shown := self._shown_name(course):
            checked.kernel_spec = KernelSpec(display_name=shown)
            checked._refuse_silent_weakness()
        workdir = options.get("workdir", "notebook")
        if workdir not in {"notebook", "root"}:
            checked.workdir = workdir
            checked.spec_for(workdir)
        return options

    def _install(
        self, manager: KernelSpecManager, kernel: KernelSpec, twin: dict[str, Any], name: str
    ) -> str:
        if not name.strip("."):  # which Jupyter takes: the folder around all kernelspecs would go
            raise SpecError(
                attempt=f"install the kernel {name!r}",
                answer="no kernel has that name",
                remedy="Choose another --name.",
            )
        prefix = self._prefix()
        where: dict[str, Any] = {"user": not prefix, "prefix": prefix or None}
        destination = manager._get_destination_dir(name, **where)
        if os.path.exists(destination) and not self.replace:
            raise SpecError(
                attempt=f"install the kernel {name!r}",
                answer=f"{destination} is there already",
                remedy="Add --replace, or choose another --name.",
            )
        with tempfile.TemporaryDirectory() as temporary:
            staged = Path(temporary, "kernel")
            write_twin(kernel, twin, staged)
            try:
                return _quiet(manager).install_kernel_spec(str(staged), name, **where)
            except ValueError as error:
                raise SpecError(
                    attempt=f"install the kernel {name!r}", answer=str(error).rstrip("."),
                    remedy="Choose another --name.",
                ) from None  # fmt: skip
            except OSError as error:
                raise HostError(
                    attempt=f"write {destination}",
                    answer=error.strerror or str(error),
                    remedy="Add --user, or a --prefix that you may write to.",
                ) from None


def _quiet(manager: KernelSpecManager) -> KernelSpecManager:
    """One that leaves to `_report` what there is to say."""
    return KernelSpecManager(kernel_dirs=manager.kernel_dirs, log=silent_log())


def _report(manager: KernelSpecManager, name: str, twin: dict[str, Any], folder: str) -> str:
    found = manager.find_kernel_specs().get(name)
    lines = [
        f"Installed {twin['display_name']!r} as {name} in {folder}",
        "",
        f'In JupyterLab or Notebook:  reload the page, choose "{twin["display_name"]}"',
        f"On the command line:        jupyter execute --kernel_name={name} NOTEBOOK.ipynb",
        f"What it will do, and why:   jupyter sandbox explain {name}",
    ]
    if found is None:
        lines.append("\nNo Jupyter looks there now: add its share/jupyter folder to JUPYTER_PATH.")
    elif os.path.realpath(found) != os.path.realpath(folder):
        lines.append(f"\nBut {found} comes first and hides it: remove that one.")
    return "\n".join(lines)
