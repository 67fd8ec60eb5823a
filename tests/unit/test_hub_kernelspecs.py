"""Which kernelspecs there are for a hub's user, and what becomes of them; on files of root's."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import NoSuchKernel

from sandbox_provisioner.hub.kernelspecs import SandboxKernelSpecManager

pytestmark = pytest.mark.requires("root")

LOCAL = {"kernel_provisioner": {"provisioner_name": "local-provisioner", "config": {"a": 1}}}
OURS = {"kernel_provisioner": {"provisioner_name": "sandbox-provisioner", "config": {"warm": True}}}


@pytest.fixture
def kernels() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sbx-", dir="/opt"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def add(kernels: Path, name: str, **spec: Any) -> Path:
    (kernels / name).mkdir()
    text = {"argv": ["true"], "display_name": name, "language": "none"} | spec
    (kernels / name / "kernel.json").write_text(json.dumps(text))
    return kernels / name


def manager(*folders: Path, **options: Any) -> SandboxKernelSpecManager:
    return SandboxKernelSpecManager(kernel_dirs=[str(folder) for folder in folders], **options)


def stanza(found: dict[str, Any]) -> Any:
    return found["metadata"]["kernel_provisioner"]


def test_every_kernelspec_names_our_provisioner_and_no_one_elses_options(kernels: Path) -> None:
    add(kernels, "bare")
    add(kernels, "local", metadata=LOCAL | {"debugger": True})
    add(kernels, "ours", metadata=OURS)
    found = {n: model["spec"] for n, model in manager(kernels).get_all_specs().items()}
    assert set(found) == {"bare", "local", "ours", "python3"}
    for name, options in (("bare", {}), ("local", {}), ("ours", {"warm": True}), ("python3", {})):
        assert stanza(found[name]) == {"provisioner_name": "sandbox-provisioner", "config": options}
    assert found["local"]["metadata"]["debugger"] is True


def test_what_is_not_allowed_cannot_be_had_by_its_name(kernels: Path) -> None:
    add(kernels, "good")
    add(kernels, "bad")
    specs = manager(kernels, allowed_kernelspecs={"good"})
    assert set(specs.get_all_specs()) == {"good"}
    assert specs.get_kernel_spec("GOOD").argv == ["true"]
    for name in ("bad", "BAD", "python3", "../good", "missing"):
        with pytest.raises(NoSuchKernel):
            specs.get_kernel_spec(name)
    with pytest.raises(NoSuchKernel, match="allowed_kernelspecs"):
        specs.get_kernel_spec("bad")


def test_one_that_can_be_changed_is_passed_over(kernels: Path) -> None:
    for name in ("first", "second"):
        (kernels / name).mkdir()
        add(kernels / name, "both", display_name=name)
    (kernels / "first/both").chmod(0o777)
    assert manager(kernels / "first", kernels / "second").get_kernel_spec("both").display_name == (
        "second"
    )
    with pytest.raises(NoSuchKernel, match="may change"):
        manager(kernels / "first").get_kernel_spec("both")


def test_a_file_that_is_no_kernelspec_does_not_hide_the_others(kernels: Path) -> None:
    add(kernels, "good")
    add(kernels, "broken")
    (kernels / "broken/kernel.json").write_text("[")
    assert set(manager(kernels, ensure_native_kernel=False).get_all_specs()) == {"good"}
