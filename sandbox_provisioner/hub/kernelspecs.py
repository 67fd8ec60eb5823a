"""hub/kernelspecs.py - in a hub user's Jupyter server: which kernels there are, all in sandboxes.

Named in a configuration of root's::

    c.ServerApp.kernel_spec_manager_class = (
        "sandbox_provisioner.hub.kernelspecs.SandboxKernelSpecManager"
    )

A kernelspec says who starts the kernel, and under which caps. So it counts only where the user of
the server cannot have written it; our provisioner starts every one, whomever it names; and what it
says of the sandbox is believed where root alone can have written it. Otherwise the box is that of
``c.SandboxProvisioner``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from jupyter_client.kernelspec import (
    NATIVE_KERNEL_NAME,
    KernelSpec,
    KernelSpecManager,
    NoSuchKernel,
)

from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.trust import Writer, changeable, is_roots

_STANZA = "kernel_provisioner"


class NotOffered(NoSuchKernel):
    """There is no such kernel for this user; *why* is for the server's log."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.why = why

    def __str__(self) -> str:
        return f"No such kernel named {one_line(self.name)}: {self.why}"


class SandboxKernelSpecManager(KernelSpecManager):
    """Lists, and gives away, kernelspecs that the user has not written, with our provisioner."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._told: set[str] = set()

    def find_kernel_specs(self) -> dict[str, str]:
        """Called to list kernels: names and folders."""
        found: dict[str, str] = {}
        for name, folder in self._installed():
            if name not in found and not self._written_by_user(folder):
                found[name] = folder
        if self.ensure_native_kernel and NATIVE_KERNEL_NAME not in found:
            found |= self._native()
        allowed = self.allowed_kernelspecs
        return {name: where for name, where in found.items() if not allowed or name in allowed}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Called for each start, by the name that a client sent: what is not listed is not there,
        which upstream's does not say of `allowed_kernelspecs`."""
        name = kernel_name.lower()
        folder = self.find_kernel_specs().get(name)
        if folder is None:
            raise NotOffered(kernel_name, self._why_not(name))
        return _boxed(self._read(name, folder))

    def _installed(self) -> Iterator[tuple[str, str]]:
        """All of them by name and folder, in the order in which they count."""
        for folder in self.kernel_dirs:
            found = KernelSpecManager(
                kernel_dirs=[folder], ensure_native_kernel=False, log=self.log
            )
            yield from found.find_kernel_specs().items()

    def _native(self) -> dict[str, str]:
        """The kernel of the server's own Python: what it says comes with the code that the server
        runs, so there is nothing more to ask."""
        found = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True, log=self.log)
        return found.find_kernel_specs()

    def _read(self, name: str, folder: str) -> KernelSpec:
        """Without upstream's question whether the provisioner that it names is installed."""
        if self._native().get(name) == folder:
            return KernelSpecManager(kernel_dirs=[], log=self.log).get_kernel_spec(name)
        return self.kernel_spec_class.from_resource_dir(folder)

    def _written_by_user(self, folder: str) -> bool:
        """Whether the user could write the kernelspec in *folder*; the log says so once."""
        path = os.path.abspath(os.path.join(folder, "kernel.json"))
        place = changeable(path, Writer.this_process())
        if place and path not in self._told:
            self._told.add(path)
            self.log.warning(
                "The kernelspec %s does not count: the user of this server may change %s",
                one_line(path), one_line(place),
            )  # fmt: skip
        return bool(place)

    def _why_not(self, name: str) -> str:
        if any(name == other for other, _ in self._installed()):
            if self.allowed_kernelspecs and name not in self.allowed_kernelspecs:
                return "it is not in KernelSpecManager.allowed_kernelspecs"
            return "kernelspecs that the user of this server may change do not count"
        return "it is not installed"


def _boxed(spec: KernelSpec) -> KernelSpec:
    """*spec*, started by our provisioner, with its options if root alone has written them."""
    stanza = spec.metadata.get(_STANZA)
    options: Any = {}
    if isinstance(stanza, dict) and stanza.get("provisioner_name") == PROVISIONER:
        path = os.path.abspath(os.path.join(spec.resource_dir, "kernel.json"))
        options = stanza.get("config", {}) if is_roots(path) else {}
    mine = {"provisioner_name": PROVISIONER, "config": options}
    spec.metadata = {**spec.metadata, _STANZA: mine}
    return spec
