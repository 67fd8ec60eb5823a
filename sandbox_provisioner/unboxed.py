"""unboxed.py - what a sandboxed kernel.json's argv names: refuses to run without the sandbox.

Some front ends (VS Code's own launcher, nteract) start a kernel.json's argv by themselves and know
nothing of provisioners: the kernel would run with all the rights of its user. So the argv is::

    python -P -m sandbox_provisioner.unboxed -- python -m ipykernel_launcher -f {connection_file}

Without -P Python looks for modules in the current directory first, where a kernel may have put a
``sandbox_provisioner`` of its own. Kernelspecs that were installed without it are understood too.

`SandboxProvisioner` runs what follows the "--" in a sandbox; everybody else gets `main`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

MODULE = "sandbox_provisioner.unboxed"
_REFUSAL = (
    "This kernel runs in a sandbox, and the program that tried to start it ignores the\n"
    "'kernel_provisioner' of its kernel.json, so it was not started: it would have run without\n"
    "the sandbox. Use a front end that starts kernels through jupyter_client (JupyterLab,\n"
    "Notebook, nbconvert, papermill), or connect this one to a Jupyter server.\n"
)


def guarded_command(command: Sequence[str], interpreter: str = "python") -> list[str]:
    """*command* behind the refusal; what `install` writes into a kernel.json."""
    return [interpreter, "-P", "-m", MODULE, "--", *command]


def inner_command(command: Sequence[str]) -> list[str]:
    """The command behind the refusal, with jupyter_client's rule for a bare "python" applied."""
    words = [word for word in command[1:4] if word != "-P"]
    if words[:2] != ["-m", MODULE] or "--" not in command:
        return list(command)
    inner = list(command[command.index("--") + 1 :])
    major, minor = sys.version_info[:2]
    if inner and inner[0] in {"python", f"python{major}", f"python{major}.{minor}"}:
        inner[0] = sys.executable
    return inner


def main() -> None:
    """Say why not, and end."""
    sys.stderr.write(_REFUSAL)
    os._exit(1)


if __name__ == "__main__":
    main()
