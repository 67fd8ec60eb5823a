"""Kernels and commands whose changes somebody looks at, by the commands for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warmth import spares

from sandbox_provisioner.layers.folders import folders_of
from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns")

APP = (sys.executable, "-m", "sandbox_provisioner.app")
PATIENCE_SECONDS = 60
Sandbox = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def layers(new_folder: Callable[[], Path]) -> Path:
    """Where what is laid aside lies."""
    return new_folder()


@pytest.fixture
def options(layers: Path) -> dict[str, Any]:
    return {"workdir_mode": "review", "layer_dir": str(layers)}


@pytest.fixture
def jupyter_sandbox(layers: Path, workdir: Path, kernelspec: Any) -> Sandbox:
    """``jupyter_sandbox("diff", KERNEL)``."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*APP, words[0], f"--layer-dir={layers}", *words[1:]]
        return subprocess.run(
            command, cwd=workdir, env={**os.environ, "PWD": str(workdir)}, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_SECONDS,
        )  # fmt: skip

    return run


@pytest.mark.ordinary_user
def test_an_ordinary_users_kernel_is_reviewed_as_roots_is(
    kernel, options, workdir, layers, jupyter_sandbox
):
    changed_and_kept(kernel, options, workdir, layers, jupyter_sandbox)


@pytest.mark.requires("root")
def test_what_a_kernel_changes_waits_over_restarts_until_it_is_kept(
    kernel, options, workdir, layers, jupyter_sandbox
):
    changed_and_kept(kernel, options, workdir, layers, jupyter_sandbox)


def changed_and_kept(kernel, options, workdir, layers, jupyter_sandbox):
    (workdir / "old").write_text("as it was")
    with kernel(**options) as k:
        k.run("open('old', 'w').write('changed'); open('new', 'w').close()")
        [(_, about)] = folders_of(layers)
        kernel_id = about.short_id
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=PATIENCE_SECONDS)
        assert k.run("open('old').read()") == "'changed'"
        assert "running" in jupyter_sandbox("diff").stdout
        refused = jupyter_sandbox("keep", kernel_id)
        assert (refused.returncode, "Shut it down first" in refused.stderr) == (1, True)
    assert (workdir / "old").read_text() == "as it was"
    assert not (workdir / "new").exists()
    told = json.loads(jupyter_sandbox("diff", kernel_id, "--json").stdout)
    assert {(one["what"], one["path"]) for one in told["changes"]} == {
        ("changed", "old"), ("added", "new"),
    }  # fmt: skip
    kept = jupyter_sandbox("keep", kernel_id)
    assert (kept.returncode, kept.stdout) == (
        0, f"Kept 2 changes of kernel {kernel_id} in {workdir}.\n",
    )  # fmt: skip
    assert (workdir / "old").read_text() == "changed"
    assert (workdir / "new").stat().st_uid == workdir.stat().st_uid
    assert list(folders_of(layers)) == []


@pytest.mark.requires("root")
def test_a_spare_that_is_bound_lays_aside_too(warm, options, workdir, layers, runtime_dir):
    (workdir / "old").write_text("as it was")
    with warm(spares=1, **options):
        ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(spares=1, **options) as k:
        assert k.provisioner.handle.record.group == spare.tree
        k.run("open('old', 'w').write('changed')")
        ahead.wait()
    assert (workdir / "old").read_text() == "as it was"
    [(folder, _)] = folders_of(layers)
    assert (folder.upper / "old").read_text() == "changed"


def test_a_command_says_what_to_do_next(jupyter_sandbox, workdir, layers):
    ran = jupyter_sandbox("run", "--workdir-mode=review", "--", "sh", "-c", "echo 1 > new; exit 3")
    assert ran.returncode == 3
    [(_, about)] = folders_of(layers)
    assert f"jupyter sandbox diff {about.short_id}" in " ".join(ran.stderr.split())
    shown = jupyter_sandbox("diff", about.short_id)
    assert "+  new  2 bytes" in shown.stdout
    assert jupyter_sandbox("discard", about.short_id).returncode == 0
    assert os.listdir(workdir) == []
    assert jupyter_sandbox("diff").stdout == "No kernel's changes wait for a decision.\n"
    lost = jupyter_sandbox("keep", about.short_id)
    assert (lost.returncode, "no such kernel has left any" in lost.stderr) == (1, True)


def test_nothing_is_said_where_nothing_has_changed(jupyter_sandbox, workdir, layers):
    (workdir / "old").write_text("as it was")
    ran = jupyter_sandbox("run", "--workdir-mode=review", "--", "cat", "old")
    assert (ran.stdout, ran.stderr, ran.returncode) == ("as it was", "", 0)
    assert list(folders_of(layers)) == []
