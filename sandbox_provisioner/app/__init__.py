"""app/ - a command of its own: `jupyter sandbox …`, one file a subcommand, and the way out of all.

::

    install   gives an installed kernel a sandboxed twin        twins.py
              or sets up the server beside it (--server)        server.py
    doctor    what works here for this user, by trying it       ../doctor.py (the checks, pure)
              or, for root, from a server's place (--pid)       elsewhere.py
              or what a hub's server runs without a box (--hub) hub_server.py
    explain   the steps of a start with their reasons, not run
    run       any command in the box                            terminal.py
    shell     a server's terminal in the box                    run.py
    list      what runs now                                     running.py
    diff      what a kernel has changed; keep or discard it     review.py
    layer     what kernels have installed that is kept          layer.py
    quota     how much a work directory may hold
    network   with whom a kernel has spoken
    image     makes root file systems for kernels              ../images/
    warm      prepares a kernel's next starts
    policy    what an administrator lets people have
    limits    other limits for kernels that run        change.py
    freeze    stops kernels as they are; thaw lets them go on
    stop      ends kernels, whoever started them
    gc        removes what killed servers left                  running.py
    broker    starts kernels for others, as root                ../broker/
    grade     all submissions of an assignment of nbgrader's
    demo      one notebook on a plain and on a sandboxed kernel
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback

from tornado.web import HTTPError
from traitlets import TraitError

from sandbox_provisioner.app.command import SandboxCommand, UsageError, spoken
from sandbox_provisioner.errors import InternalError, SandboxError, in_lines, nearest
from sandbox_provisioner.inside.printable import printable, with_place

__all__ = ["SandboxApp", "main"]

_HERE = "sandbox_provisioner.app"


_SUBCOMMANDS = {
    "install": (f"{_HERE}.install.InstallApp", "Give a kernel a sandboxed twin."),
    "doctor": (f"{_HERE}.doctor.DoctorApp", "Tell what works here, and what mends the rest."),
    "explain": (f"{_HERE}.explain.ExplainApp", "Show the steps of a kernel's start."),
    "run": (f"{_HERE}.run.RunApp", "Run any command in a sandbox."),
    "shell": (f"{_HERE}.shell.ShellApp", "Open a server's terminal in a sandbox."),
    "list": (f"{_HERE}.running.ListApp", "Show the sandboxes that run."),
    "diff": (f"{_HERE}.review.DiffApp", "Show what a kernel has changed in its work directory."),
    "keep": (f"{_HERE}.review.KeepApp", "Have what a kernel has changed."),
    "discard": (f"{_HERE}.review.DiscardApp", "Throw away what a kernel has changed."),
    "layer": (f"{_HERE}.layer.LayerApp", "Show or empty what kernels have installed."),
    "quota": (f"{_HERE}.quota.QuotaApp", "Show or change how much a work directory may hold."),
    "image": (f"{_HERE}.image.ImageApp", "Make root file systems for kernels."),
    "network": (f"{_HERE}.network.NetworkApp", "Show with whom a kernel has spoken."),
    "policy": (f"{_HERE}.policy.PolicyApp", "Check the policy, show what it gives to a user."),
    "limits": (f"{_HERE}.change.LimitsApp", "Give kernels that run other limits."),
    "freeze": (f"{_HERE}.change.FreezeApp", "Stop kernels as they are."),
    "thaw": (f"{_HERE}.change.ThawApp", "Let kernels go on that were stopped."),
    "stop": (f"{_HERE}.stop.StopApp", "End kernels, whoever started them."),
    "warm": (f"{_HERE}.warm.WarmApp", "Prepare a kernel's next starts."),
    "gc": (f"{_HERE}.running.CollectApp", "Remove what killed servers left."),
    "broker": (f"{_HERE}.broker.BrokerApp", "Start kernels for ordinary users' servers, as root."),
    "grade": (f"{_HERE}.grade.GradeApp", "Grade an assignment of nbgrader's."),
    "demo": (f"{_HERE}.demo.DemoApp", "Compare a plain and a sandboxed kernel."),
}


class SandboxApp(SandboxCommand):
    """`jupyter sandbox`: knows its subcommands, and shows them when none is asked for."""

    name = "jupyter sandbox"
    usage = "jupyter sandbox COMMAND [options]"
    description = (
        "Jupyter kernels in Linux namespaces of their own, under memory, CPU and process caps."
    )
    examples = """
    jupyter sandbox demo               # what a sandbox keeps from a notebook, side by side
    jupyter sandbox doctor             # does it work here, and what would mend it
    jupyter sandbox install            # then choose "Python 3 (ipykernel) (sandboxed)"
    jupyter sandbox explain python3-sandbox
    jupyter sandbox run -- bash        # a look around from inside
    jupyter sandbox list --watch
    """
    subcommands = _SUBCOMMANDS

    def start(self) -> None:
        """Called for every command line: hands over to the subcommand."""
        if self.subapp is not None:
            self.subapp.start()
            return
        known = f"the commands are: {', '.join(self.subcommands)}"
        if not self.extra_args:
            raise UsageError(f"no command; {known}")
        meant = nearest(self.extra_args[0], self.subcommands)
        hint = f"did you mean {meant!r}?" if meant else known
        raise UsageError(f"there is no command {self.extra_args[0]!r}; {hint}")


def main() -> None:
    """Called by `jupyter-sandbox`: exits with 0, 1 (it failed), 2 (wrong usage) or, for `run`, with
    the status of the command."""
    try:
        SandboxApp.launch_instance()
    except UsageError as error:
        _leave(2, in_lines(f"{error}\nSee: {error.usage} --help"))
    except TraitError as error:
        _leave(2, _told(error))
    except SandboxError as error:
        _leave(1, _told(error))
    except HTTPError as error:
        _leave(1, _told(error))
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(141)
    except Exception as error:
        traceback.print_exception(error)
        attempt = f"do what `{shlex.join(['jupyter', 'sandbox', *sys.argv[1:]])}` asks for"
        _leave(1, _told(InternalError(attempt=attempt, answer=with_place(error))))


def _told(error: Exception) -> str:
    """In lines, where it is one of ours."""
    ours = getattr(error, "error", error)
    return ours.for_people() if isinstance(ours, SandboxError) else in_lines(str(error))


def _leave(status: int, text: str = "") -> None:
    if text:
        print(printable(spoken(text)), file=sys.stderr)
    raise SystemExit(status)
