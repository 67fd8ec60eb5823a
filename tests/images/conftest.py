"""conftest.py - in the test process: commands that make images, with a store of the test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traitlets.config import Config

from sandbox_provisioner.app import SandboxApp
from sandbox_provisioner.app.command import SandboxCommand
from sandbox_provisioner.images import store
from sandbox_provisioner.warm import ahead


@pytest.fixture
def command(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Runs a command line in this process, with a store and kernels of this test's own."""
    monkeypatch.setattr(store, "ROOTS_STORE", tmp_path / "images")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "prefix/share/jupyter"))
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / name.lower()))

    def run(*words: object) -> None:
        config = Config({"SandboxProvisioner": {"runtime_dir": str(runtime_dir)}})
        app = SandboxApp(log_level=50, config=config)
        try:
            app.initialize([*map(str, words), f"--runtime-dir={runtime_dir}"])
            app.start()
        finally:
            for application in (SandboxApp, *SandboxCommand.__subclasses__()):
                application.clear_instance()

    yield run
    ahead.end_own()
    shutil.rmtree(tmp_path / "images", ignore_errors=True)  # pytest would keep it
