"""What keeps a hub user's server from running what its user may change."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from traitlets.config import Application, Config
from traitlets.config.loader import JSONFileConfigLoader, PyFileConfigLoader

from sandbox_provisioner.hub import trusted_code
from sandbox_provisioner.hub.trusted_code import ImportPath, run_trusted_code_only


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the user may change; all else is root's. What the call changes of this process
    is as before afterwards."""
    folder = tmp_path / "theirs"
    folder.mkdir()

    def changeable(path: str, writer: object) -> str:
        return path if path.startswith(str(folder)) else ""

    monkeypatch.setattr(trusted_code, "changeable", changeable)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    for loader in (PyFileConfigLoader, JSONFileConfigLoader):
        monkeypatch.setattr(loader, "_read_file_as_dict", loader._read_file_as_dict)
    yield folder


def config_in(*folders: Path) -> Config:
    app = Application()
    app.load_config_file("x_config", path=[str(folder) for folder in folders])
    return app.config


def test_configuration_that_the_user_may_change_is_not_read(theirs: Path, tmp_path: Path) -> None:
    for folder in (theirs, tmp_path):
        (folder / "x_config.py").write_text(f"c.A.python = {folder.name!r}")
        (folder / "x_config.json").write_text(json.dumps({"A": {"json": folder.name}}))
    assert config_in(theirs, tmp_path).A == {"python": "theirs", "json": "theirs"}
    run_trusted_code_only(Config())
    trusted = {"python": tmp_path.name, "json": tmp_path.name}
    assert dict(config_in(theirs, tmp_path).A) == trusted
    assert config_in(theirs) == {}
    (tmp_path / "x_config.py").write_text(f"load_subconfig('x_config.py', {str(theirs)!r})")
    assert "python" not in config_in(tmp_path).A


def test_nothing_of_it_comes_onto_the_import_path(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trusted_code_only(Config())
    monkeypatch.chdir(theirs)
    before = list(sys.path)
    assert str(theirs) not in before
    assert os.environ["PYTHONSAFEPATH"]
    for bad in (str(theirs), "", ".", f"{tmp_path}/theirs/../theirs"):
        sys.path.insert(0, bad)
        sys.path.append(bad)
        sys.path.extend([bad])
        sys.path += [bad]
        sys.path[0] = bad
        sys.path[:0] = [bad]
        assert list(sys.path) == before
    sys.path.insert(0, str(tmp_path))
    sys.path[1:1] = ["/one", str(theirs)]
    sys.path += ["/last"]
    assert list(sys.path) == [str(tmp_path), "/one", *before, "/last"]
    assert isinstance(sys.path, ImportPath)


def test_a_list_that_is_made_of_it_keeps_nothing_of_it_either(theirs: Path) -> None:
    path, bad = ImportPath(["/one", "/two"]), [str(theirs)]
    made = [bad + path, path + bad, path[:] + bad, path.copy() + bad]
    assert made == [["/one", "/two"]] * 4
    assert all(isinstance(one, ImportPath) for one in made)


def test_a_relative_path_is_no_place_whatever_it_leads_to_now(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = ImportPath(["", "/one"])
    path.insert(0, ".")
    path += ["theirs/.."]
    assert path == ["/one"]


def test_what_belongs_to_the_running_python_stays(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user has to hear of that from doctor, not from a server that finds no module."""
    monkeypatch.setattr(sys, "prefix", str(theirs))
    run_trusted_code_only(Config())
    assert str(theirs) in sys.path


def test_a_second_call_does_nothing_more(theirs: Path) -> None:
    config = Config()
    run_trusted_code_only(config)
    path, read = sys.path, PyFileConfigLoader._read_file_as_dict
    run_trusted_code_only(config)
    assert (sys.path, PyFileConfigLoader._read_file_as_dict) == (path, read)
    assert config.TemplateExporter.extra_template_basedirs == []
