"""app/broker.py - a command of its own: `jupyter sandbox broker`, the daemon of docs/broker.md."""

from __future__ import annotations

import asyncio
import os
import sys
from importlib.resources import files
from pathlib import Path

from traitlets import Bool, Unicode

import sandbox_provisioner
from sandbox_provisioner.app.command import COMMON_ALIASES, SandboxCommand
from sandbox_provisioner.broker import daemon, units
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.errors import COMMAND, HostError, SpecError
from sandbox_provisioner.hub.for_hub import ServersOfHub
from sandbox_provisioner.hub.ranges import FOLDER
from sandbox_provisioner.policy.read import POLICY_FILE
from sandbox_provisioner.trust import Writer, changeable

_ALIASES = {
    "socket": "BrokerApp.socket",
    "policy": "BrokerApp.policy",
    "metrics": "BrokerApp.metrics",
    **COMMON_ALIASES,
}
_FLAGS = {
    "install": (
        {"BrokerApp": {"install": True}},
        "Write the units of systemd, and tell how they are started; runs no broker.",
    )
}
_UNITS = ("sandbox-broker.socket", "sandbox-broker.service")


class BrokerApp(SandboxCommand):
    """Runs until it is ended; the kernels that it has started live on."""

    usage = "jupyter sandbox broker [--socket PATH] [--policy FILE] [--metrics ADDRESS] [--install]"
    description = (
        "Be the sandbox broker, as root: a daemon that starts the kernels of ordinary users' "
        "servers, with user ids and control groups that these users could not give them. It tells "
        "what it does on standard error, a line of JSON each. As a service of systemd: see "
        "docs/broker.md."
    )
    examples = """
    sudo jupyter sandbox broker             # by hand, until Ctrl-C
    sudo jupyter sandbox broker --install   # as a service
    """
    socket = Unicode(
        daemon.SOCKET, help="Where it listens, unless systemd has passed a socket on."
    ).tag(config=True)
    policy = Unicode(POLICY_FILE, help="The file that tells what people may have.").tag(config=True)
    metrics = Unicode(
        "",
        help="Where Prometheus scrapes metrics: the path of a socket, or an address and port of "
        "the loopback, such as 127.0.0.1:9185. The default is nowhere.",
    ).tag(config=True)
    state_dir = Unicode(
        str(FOLDER),
        help="Where it is written down, for ever, which range of ids is whose, of the people whose "
        "servers a hub has it start.",
    ).tag(config=True)
    install = Bool(False, help="Write the units of systemd.").tag(config=True)
    folder = Unicode("/etc/systemd/system", help="Where to.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`."""
        self.refuse_words()
        if os.geteuid():
            raise SpecError(
                attempt="be the sandbox broker",
                answer="only root can give kernels ids of their own",
                remedy=("Start it as administrator:", f"{COMMAND}sudo jupyter sandbox broker"),
            )
        if self.install:
            self._install()
            return
        options = self.provisioner()
        kept = Kept(options.layer_dir, options.review_days)
        runtime_dir = options.runtime_dir
        servers = ServersOfHub(runtime_dir, self.policy, daemon.log, self.state_dir)
        asyncio.run(daemon.run(self.socket, runtime_dir, self.policy, self.metrics, kept, servers))

    def _install(self) -> None:
        _refuse_changeable()
        for name in _UNITS:
            text = (files(units) / name).read_text().replace("@PYTHON@", sys.executable)
            Path(self.folder, name).write_text(text)
            print(f"Wrote {self.folder}/{name}")
        print("Now:  systemctl daemon-reload && systemctl enable --now sandbox-broker.socket")


def _refuse_changeable() -> None:
    """HostError where somebody else than root could change what root will run."""
    package = os.path.dirname(os.path.abspath(sandbox_provisioner.__file__))
    for path in (sys.executable, os.path.realpath(sys.executable), package):
        if place := changeable(path, Writer(0, frozenset())):
            raise HostError(
                attempt="install the sandbox broker",
                answer=f"root would run {path}, and others than root may change {place}",
                remedy="Install sandbox-provisioner into an environment of root's, such as one in "
                "/opt, and run this command of that one.",
            )
