"""unboxed.py - what a sandboxed kernel.json's argv names: the kernel gets its box all the same.

Some front ends (VS Code's own launcher, nteract) start a kernel.json's argv by themselves and know
nothing of provisioners: the kernel would run with all the rights of its user. So the argv is::

    python -P -m sandbox_provisioner.unboxed NAME -- python -m ipykernel_launcher -f …

Without -P Python looks for modules in the current directory first, where a kernel may have put a
``sandbox_provisioner`` of its own. NAME is the kernelspec's, which tells two of them apart that run
the same command. Kernelspecs that were installed without either are understood too.

`SandboxProvisioner` runs what follows the "--" in a sandbox; for everybody else `main` does, by
`app/by_argv.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

MODULE = "sandbox_provisioner.unboxed"


def guarded_command(
    command: Sequence[str], interpreter: str = "python", name: str = ""
) -> list[str]:
    """*command* behind ours; what `install` writes into the kernel.json of the kernel *name*."""
    return [interpreter, "-P", "-m", MODULE, *filter(None, [name]), "--", *command]


def inner_command(command: Sequence[str]) -> list[str]:
    """The command behind ours, with jupyter_client's rule for a bare "python" applied."""
    words = [word for word in command[1:4] if word != "-P"]
    if words[:2] != ["-m", MODULE] or "--" not in command:
        return list(command)
    inner = list(command[command.index("--") + 1 :])
    major, minor = sys.version_info[:2]
    if inner and inner[0] in {"python", f"python{major}", f"python{major}.{minor}"}:
        inner[0] = sys.executable
    return inner


def words_of_ours(command: Sequence[str]) -> list[str]:
    """What follows our module's name in *command*, which is what `main` is given; [] if it is no
    guarded one."""
    if inner_command(command) == list(command):
        return []
    return list(command[command.index(MODULE) + 1 :])


def main() -> None:
    """Run by a front end; leaves with the kernel's exit status."""
    # What a server needs of this file is pure.
    from sandbox_provisioner.app.by_argv import run_by_argv  # noqa: PLC0415

    run_by_argv(sys.argv[1:])


if __name__ == "__main__":
    main()
