"""Volumes as a kernel's options have them: for the user who asks, and how they are shown."""

from __future__ import annotations

import logging
import os
import pwd

import pytest
from traitlets.config import Config

from sandbox_provisioner import provisioner
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.spec import Volume


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioner, "_told", set())


def volumes_of(written: object) -> tuple[Volume, ...]:
    config = Config({"SandboxProvisioner": {"volumes": written}})
    return SandboxProvisioner(config=config, kernel_spec=None).spec_for("/srv").volumes


@pytest.mark.parametrize(
    "written",
    [
        ["/srv/{username}:/data/{username}:rw"],
        {"/srv/{username}": {"bind": "/data/{username}", "mode": "rw"}},
    ],
)
def test_username_is_the_user_of_this_process_whatever_a_variable_says(
    written: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "..")
    name = pwd.getpwuid(os.geteuid()).pw_name
    expected = Volume(source=f"/srv/{name}", target=f"/data/{name}", readonly=False)
    assert volumes_of(written) == (expected,)


def test_a_dictionarys_volume_without_a_mode_is_read_only_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    written = {"/srv/a": "/a", "/srv/b": {"bind": "/b", "mode": "rw"}}
    for _ in range(2):
        assert [volume.readonly for volume in volumes_of(written)] == [True, False]
    (said,) = (record.getMessage() for record in caplog.records)
    assert '"/srv/a" can only be read' in said
