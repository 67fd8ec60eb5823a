"""hub_account.py - in the test process, as root: a real hub with its proxy that are not root.

They run as an account of their own, beside a broker, which runs as root and starts the servers.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from brokers import Broker, copy_code
from facilities import packages, public_python
from hub_server import PATIENCE_SECONDS, Hub, start_apart

from sandbox_provisioner.descriptors import is_readable

ACCOUNT, ACCOUNT_UID = "sbxhub", 4330
_OF_ACCOUNT = """
c.SandboxSpawner.broker_socket = "{runtime}/socket"
c.Spawner.cmd = ["PROGRAM", "-m", "jupyterhub.singleuser"]
c.Spawner.args = [
    "--ServerApp.jpserver_extensions=jupyter_server_terminals=True",
]
c.Spawner.env_keep = ["PYTHONPATH"]
"""


class BrokerApart(Broker):
    """A broker that is a child of nobody's here, since it comes and goes within tests."""

    def start(self) -> None:
        """Start it, and wait until it listens."""
        log = self.home / "broker.log"
        pid = start_apart(self.command(), log, b'"event": "listen"', env=self.environment())
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        """As a crash would."""
        self._end_by(signal.SIGKILL)

    def close(self) -> None:
        """Let it end in order."""
        self._end_by(signal.SIGTERM)

    def _end_by(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)
        assert is_readable(self._pidfd, PATIENCE_SECONDS)
        os.close(self._pidfd)


class HubOfAccount(Hub):
    """One that runs as `ACCOUNT`, and has servers from a broker beside it."""

    def __init__(self, people: Sequence[str], more: str = "", policy: str = "") -> None:
        super().__init__(people, more, "/opt")
        copy_code(self.folder)
        self.add(ACCOUNT, ACCOUNT_UID)
        for name in ("subuid", "subgid"):
            shutil.copy(f"/etc/{name}", self.folder / name)
        (self.folder / "policy.toml").write_text(policy.replace("{folder}", str(self.folder)))
        self.broker = BrokerApart(
            self.folder, self.runtime, f"--BrokerApp.state_dir={self.folder}/state",
            python=public_python(), packages=packages(),
        )  # fmt: skip

    @property
    def own(self) -> str:
        """Lines of its configuration; the Python of the tests may be root's alone."""
        return _OF_ACCOUNT.replace("PROGRAM", public_python())

    @property
    def ways(self) -> Path:
        """Where the proxy comes in."""
        return Path(f"{self.runtime}-ways")

    def _make_runtime(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="sbx-", dir="/run"))

    def _python(self) -> list[str]:
        uid = ACCOUNT_UID
        return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", public_python()]

    def _works_in(self) -> Path:
        return self.home(ACCOUNT)

    def _environment(self) -> dict[str, str]:
        """With a copy of our code, which is where everybody can read it."""
        found, home = super()._environment(), str(self._works_in())
        paths = [str(self.folder / "code"), found["PYTHONPATH"], *packages()]
        return found | {
            "HOME": home,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def close(self) -> None:
        """End the broker, too, when there is nothing more for it to do."""
        super().close()
        self.broker.close()
        for folder in (self.runtime, f"{self.runtime}-hub", self.ways):
            shutil.rmtree(folder, ignore_errors=True)
