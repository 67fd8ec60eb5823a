"""sandbox_provisioner - any process: Jupyter kernels in Linux namespaces of their own.

The public names are loaded when they are asked for, so that importing `inside/`, which a start
does every time, costs nothing else.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["SandboxProvisioner"]

TYPE_CHECKING = False  # as typing has it, but each launcher would pay 12 ms for its import
if TYPE_CHECKING:
    from typing import Any

    from sandbox_provisioner.provisioner import SandboxProvisioner


def __getattr__(name: str) -> Any:
    if name == "SandboxProvisioner":
        from sandbox_provisioner.provisioner import SandboxProvisioner  # noqa: PLC0415

        return SandboxProvisioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
