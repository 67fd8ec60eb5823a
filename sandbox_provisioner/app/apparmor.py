"""app/apparmor.py - a command of its own: the AppArmor profile for the launcher's interpreter.

Ubuntu since 23.10 lets only programs with a profile make user namespaces. A profile is attached by
the real path of the program, and the launcher is a Python: the profile allows that one altogether.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.namespaces.facts import PROFILE
from sandbox_provisioner.stem import interpreter

_NAME = "jupyter-sandbox"
_TEXT = """\
# Lets {program} make user namespaces, for sandboxed Jupyter kernels.
# It confines nothing. It allows user namespaces to EVERY program that this interpreter runs.
abi <abi/4.0>,
include <tunables/global>

profile {name} {pattern} flags=(unconfined) {{
  userns,

  include if exists <local/{name}>
}}
"""


def profile_for(program: str) -> str:
    """The text of the profile for the real path *program*; AppArmor 4 and newer can read it."""
    return _TEXT.format(name=_NAME, program=program, pattern=_pattern(program))


def _pattern(path: str) -> str:
    """apparmor.d(5): a name in quotes, in which special characters stand for themselves."""
    escaped = re.sub(r'([\\\[\]{}*?^"@,!])', r"\\\1", path)
    return f'"{escaped}"' if re.search(r"[^\w./+-]", path) else escaped


def write_profile(output: str) -> None:
    """Write the profile to the file *output* or, for "", to stdout; tell the rest on stderr."""
    program = os.path.realpath(interpreter())
    text = profile_for(program)
    if output:
        try:
            Path(output).write_text(text)
        except OSError as error:
            raise HostError(
                attempt=f"write the profile to {output}",
                answer=error.strerror or str(error),
                remedy="Run it as administrator, or without --output.",
            ) from None
    else:
        sys.stdout.write(text)
    print(_advice(program, output), file=sys.stderr)


def _advice(program: str, output: str) -> str:
    at = output if output and os.path.dirname(os.path.abspath(output)) == "/etc/apparmor.d" else ""
    path = at or PROFILE
    lines = [
        f"WARNING: it allows user namespaces to everything that {program} runs, for every user.",
        "Where that is too much, run Jupyter with a Python installation of its own, in a folder of",
        "root's; a virtual environment shares the interpreter that it was made from.",
        "As administrator:",
    ]
    if output and not at:
        lines.append(f"  sudo cp {shlex.quote(output)} {path}")
    elif not output:
        lines.append(f"  jupyter sandbox install --apparmor-profile | sudo tee {path}")
    lines.append(f"  sudo apparmor_parser -r {shlex.quote(path)}")
    if not _belongs_to_root(program):
        lines.insert(1, f"{program} is not root's: its owner may put any program in its place.")
    return "\n".join(lines)


def _belongs_to_root(program: str) -> bool:
    return all(path.stat().st_uid == 0 for path in (Path(program), *Path(program).parents))
