"""app/doctor.py - a command of its own: `jupyter sandbox doctor` finds out what works here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from traitlets import Bool, Integer, Unicode

from sandbox_provisioner import card_life, doctor, served_image
from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    SandboxCommand,
    lend,
    provisioner_name_of,
    silent_log,
    working_directory,
)
from sandbox_provisioner.app.elsewhere import Place, look_from
from sandbox_provisioner.app.hub_server import Started, box_of, look_at_server, server_of
from sandbox_provisioner.app.leftovers import left_groups, left_sandboxes
from sandbox_provisioner.broker.talk import check_answers
from sandbox_provisioner.checks import Check, Findings, Kernel, State
from sandbox_provisioner.contract import Labels, Launcher, Stdio
from sandbox_provisioner.errors import LaunchError, SandboxError
from sandbox_provisioner.facilities.ids.facts import find_id_range
from sandbox_provisioner.facilities.namespaces.facts import Surroundings
from sandbox_provisioner.facilities.storage.facts import STORAGE, image_obstacle, project_obstacle
from sandbox_provisioner.facilities.storage.images import room_bytes
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.hub.tell import examine_account, examine_box, examine_hub, note_account
from sandbox_provisioner.hub.through_broker import check_serves
from sandbox_provisioner.inside.printable import printable
from sandbox_provisioner.network_trial import catch_obstacle
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.policy.current import current_policy
from sandbox_provisioner.provisioner import SandboxProvisioner, user_name
from sandbox_provisioner.records import runtime_directory
from sandbox_provisioner.spec import Covers, Network, NetworkWish, SandboxSpec
from sandbox_provisioner.unboxed import inner_command

_TRIAL_SECONDS = 30


_ALIASES = {"pid": "DoctorApp.pid", "user": "DoctorApp.user", **COMMON_ALIASES}
_FLAGS = {
    **COMMON_FLAGS,
    "hub": ({"DoctorApp": {"hub": True}}, "Look for ways around the box in a hub user's server."),
    "json": ({"DoctorApp": {"json_output": True}}, "Print a list of checks as JSON."),
}


class DoctorApp(SandboxCommand):
    """Looks, tries, tells; changes nothing."""

    usage = "jupyter sandbox doctor [--json] [--hub] [--pid PID | --user NAME]"
    description = (
        "Tell what of a sandbox works for you on this machine, what follows where something is "
        "missing, and the command that mends it. It really starts a sandbox, and exits with 1 if "
        "that fails."
    )
    examples = """
    jupyter sandbox doctor
    sudo jupyter sandbox doctor --pid 4711    # from the place of another user's server
    sudo jupyter sandbox doctor --hub --user alice    # what runs without a box in her server
    sudo -u jupyterhub jupyter sandbox doctor --hub    # whether this account has servers started
    jupyter sandbox doctor --json | jq '.[] | select(.state == "missing")'
    """
    json_output = Bool(False, help="Print a list of checks as JSON.").tag(config=True)
    pid = Integer(
        0,
        help="Look from the place of this process, such as another user's Jupyter server: as its "
        "user, in its control groups and its directory, with its limits. For root.",
    ).tag(config=True)
    user = Unicode("", help="The same, for the Jupyter server of this user.").tag(config=True)
    hub = Bool(
        False,
        help="Tell what the server, and what its administrator has configured, lets run without a "
        "box (docs/jupyterhub.md); to the account of a hub that is not root, whether the broker "
        "starts servers for it. Nothing is started; 1 is answered where something is amiss.",
    ).tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def start(self) -> None:
        """Called once by `main`."""
        self.refuse_words()
        if self.pid and self.user:
            raise self.wrong("--pid and --user exclude each other")
        if self.hub and self.user and (box := box_of(self.user, self.runtime())):
            self._show(examine_box(box.sandbox_id, box.init_pid, box.user))
            return
        pid = server_of(self.user) if self.user else self.pid
        look = self._examine
        if self.hub:
            look = partial(self._examine_hub, Started.of(pid) if pid else Started())
        if self.hub and not pid and os.geteuid():
            look = self._examine_account
        if pid:
            raise SystemExit(look_from(Place.of(pid), look))
        look()

    def _examine(self) -> None:
        findings = self._find()
        self._show(doctor.examine(findings))
        if isinstance(findings.trial, SandboxError):
            raise SystemExit(1)

    def _examine_hub(self, started: Started) -> None:
        self._tell(examine_hub(look_at_server(started)))

    def _examine_account(self) -> None:
        """We are a hub's account, or whoever would start a server here."""
        account, policy = user_name(), current_policy()
        obstacle = _answer(lambda: check_serves(self.provisioner().broker_socket))
        if obstacle is None or (policy and policy.hub and policy.hub.account == account):
            self._tell(examine_account(account, obstacle))
        else:
            self._tell([*examine_hub(look_at_server(Started())), note_account(account, obstacle)])

    def _tell(self, checks: list[Check]) -> None:
        self._show(checks)
        if any(check.state is State.MISSING for check in checks):
            raise SystemExit(1)

    def _show(self, checks: list[Check]) -> None:
        if self.json_output:
            print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
        else:
            print(printable(doctor.describe(checks)))

    def _find(self) -> Findings:
        host, here = HostFacts.probe(), working_directory()
        provisioner, workdir = self.provisioner(), _answer(lambda: _work_directory(here, host))
        runtime = _answer(lambda: runtime_directory(provisioner.runtime_dir))
        usable = not isinstance(runtime, SandboxError)
        return Findings(
            host=host,
            workdir=workdir,
            sysctls=dict(_sysctls()),
            surroundings=Surroundings.probe(),
            id_range=_answer(lambda: find_id_range(host.caller.uid)),
            runtime=str(runtime) if usable else runtime,
            runtime_free_bytes=shutil.disk_usage(runtime).free if usable else 0,
            entry_point=_entry_point(),
            server=_other_jupyter(),
            kernels=tuple(self._kernels()),
            left_sandboxes=left_sandboxes(runtime) if usable else (),
            left_groups=left_groups(runtime) if usable else (),
            catch_obstacle=_catch_obstacle(host),
            card=_card_obstacle(provisioner) if host.privileged else "",
            broker=_broker(provisioner.broker_socket),
            image_obstacle=image_obstacle(privileged=host.privileged),
            project_obstacle=project_obstacle(
                STORAGE, host.machine.kernel, privileged=host.privileged
            ),
            storage_room=room_bytes() if host.privileged else (0, 0, 0),
            image_tools={name: bool(shutil.which(name)) for name in doctor.IMAGE_TOOLS},
            filesystems=_filesystems(),
            image_reader=served_image.program(),
            has_fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
            **_trials(provisioner, host),
        )

    def _kernels(self) -> Iterator[Kernel]:
        for name, found in sorted(self.kernels().get_all_specs().items()):
            spec = found["spec"]
            yield Kernel(
                name=name,
                sandboxed=provisioner_name_of(spec["metadata"]) == PROVISIONER,
                guarded=inner_command(spec["argv"]) != spec["argv"],
            )


def _catch_obstacle(host: HostFacts) -> str:
    """Nothing where no launcher starts: the trial tells of that."""
    found = _answer(lambda: catch_obstacle(host))
    return "" if isinstance(found, SandboxError) else found


def _broker(path: str) -> Any:
    return _answer(lambda: check_answers(path)) or path if os.path.exists(path) else ""


def _work_directory(path: str, host: HostFacts) -> WorkdirFacts:
    with ExitStack() as opened:
        return WorkdirFacts.probe(path, host, Covers(), opened)


def _answer(question: Any) -> Any:
    """Its value, or the SandboxError that it raised."""
    try:
        return question()
    except SandboxError as error:
        return error


def _sysctls() -> Iterator[tuple[str, str]]:
    for name in doctor.SYSCTLS:
        path = Path("/proc/sys", *name.split("."))
        try:
            yield name, path.read_text().strip()
        except OSError:
            continue


def _entry_point() -> str:
    group = KernelProvisionerFactory.GROUP_NAME
    return next((f"{e.name} = {e.value}" for e in entry_points(group=group, name=PROVISIONER)), "")


def _other_jupyter() -> str:
    """`jupyter` of the PATH if it is not of our environment."""
    path = shutil.which("jupyter")
    ours = os.path.join(sys.prefix, "bin", "jupyter")
    if path is None or not os.path.exists(ours) or os.path.samefile(path, ours):
        return ""
    return path


def _trials(provisioner: SandboxProvisioner, host: HostFacts) -> dict[str, Any]:
    """With the options in force, and, if that fails and caps are missing here, without these."""
    trial = _answer(lambda: try_sandbox(provisioner, host))
    if not isinstance(trial, SandboxError) or not host.cgroups.missing:
        return {"trial": trial}
    provisioner.on_missing = dict.fromkeys(host.cgroups.missing, "warn")
    provisioner.log = silent_log()
    return {"trial": trial, "uncapped_trial": _answer(lambda: try_sandbox(provisioner, host))}


def try_sandbox(provisioner: SandboxProvisioner, host: HostFacts) -> float:
    """Start and end our Python in a sandbox; the milliseconds. Raises why it cannot be done."""
    with tempfile.TemporaryDirectory(prefix="jupyter-sandbox-doctor-") as folder:
        lend(Path(folder), host)
        provisioner.workdir = folder
        spec = provisioner.spec_for(folder)
        started = time.monotonic()
        asyncio.run(_try(provisioner.starter, spec, folder))
        return 1e3 * (time.monotonic() - started)


async def _try(launcher: Launcher, spec: SandboxSpec, folder: str) -> None:
    request = LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=spec,
        argv=(sys.executable, "-c", "pass"),
        environment=os.environ,
        cwd=folder,
    )
    handle = await launcher.start(request, Labels(name="doctor"), Stdio())
    try:
        async with asyncio.timeout(_TRIAL_SECONDS):
            story = await handle.wait()
    except TimeoutError:
        story = None
    finally:
        await handle.close()
    if story is None or story.code != 0:
        raise LaunchError(
            attempt=f"run {sys.executable} in a sandbox",
            answer=f"it ended with status {story.code}" if story else "it did not end",
            remedy=(story and story.reason) or "See what it wrote.",
            step="run",
            stderr_tail=story.stderr_tail if story else "",
        )


def _card_obstacle(provisioner: SandboxProvisioner) -> SandboxError | str:
    """Why kernels cannot have the cards that the configuration has, whether it gives them one or
    not."""
    ipv6 = provisioner.network_ipv6 and provisioner.network == Network.CARD
    try:
        wish = NetworkWish(
            mode=Network.CARD, pool=provisioner.network_pool, ipv6=ipv6,
            pool_ipv6=provisioner.network_pool_ipv6,
        )  # fmt: skip
    except SandboxError as error:
        return error
    return card_life.obstacle(wish)


def _filesystems() -> frozenset[str]:
    """Those that Linux has (filesystems(5)), and those that it loads when one is asked for."""
    names = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    with contextlib.suppress(OSError):
        modules = Path(f"/lib/modules/{os.uname().release}/modules.dep").read_text()
        names |= set(re.findall(r"/(\w+)\.ko[.\w]*:", modules))
    return frozenset(names)
