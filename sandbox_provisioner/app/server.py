"""app/server.py - a command of its own: `install --server` writes a Jupyter server's settings.

It writes into jupyter_server_config.json, since of the files in jupyter_server_config.d a server
reads which extensions are enabled, and nothing else. What others have written there stays.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_config_path

from sandbox_provisioner.errors import HostError, SpecError

_FILE = "jupyter_server_config.json"
# By class and trait: the value, and what it does.
_SETTINGS = {
    ("ServerApp", "contents_manager_class"): (
        "sandbox_provisioner.contents.SandboxContentsManager",
        "saving, copying and deleting follow no link that a kernel may have put there",
    ),
    ("LanguageServerManager", "autodetect"): (
        False,
        "JupyterLab runs no language servers that it finds in directories that kernels write to",
    ),
}


def set_up_server(folder: Path, *, replace: bool) -> str:
    """Write our settings to the configuration in *folder*; what to tell.

    SpecError where another value stands there, unless *replace*.
    """
    path = folder / _FILE
    config = _read(path)
    for (owner, name), (value, _) in _SETTINGS.items():
        found = _section(config, owner, path).setdefault(name, value)
        if found != value and not replace:
            raise SpecError(
                attempt=f"set {owner}.{name}",
                answer=f"in {path} it is set to {found!r}",
                remedy="Add --replace, or take that out.",
            )
        config[owner][name] = value
    _write(path, config)
    return _report(path)


def reset_server(folder: Path) -> str:
    """Take our settings, where they stand, out of the configuration in *folder*; what to tell."""
    path = folder / _FILE
    config = _read(path)
    removed = []
    for (owner, name), (value, _) in _SETTINGS.items():
        section = _section(config, owner, path)
        if section.get(name) == value:
            del section[name]
            removed.append(f"{owner}.{name}")
        if not section:
            del config[owner]
    if not removed:
        return f"Nothing of ours stands in {path}."
    _write(path, config)
    return f"Took {' and '.join(removed)} out of {path}"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(config, dict):
        raise _unreadable(path, "it holds no settings")
    return config


def _section(config: dict[str, Any], owner: str, path: Path) -> dict[str, Any]:
    section = config.setdefault(owner, {})
    if not isinstance(section, dict):
        raise _unreadable(path, f"{owner} holds no settings")
    return section


def _unreadable(path: Path, answer: str) -> SpecError:
    return SpecError(attempt=f"read {path}", answer=answer, remedy="Correct that file, or move it.")


def _write(path: Path, config: dict[str, Any]) -> None:
    """Whole or not at all: a server that reads a half file ignores all of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(config, indent=2) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise HostError(
            attempt=f"write {path}",
            answer=error.strerror or str(error),
            remedy="Add --user, or a --prefix that you may write to.",
        ) from None


def _report(path: Path) -> str:
    lines = [f"Set in {path}:", ""]
    for (owner, name), (value, effect) in _SETTINGS.items():
        lines.append(f"  {owner}.{name} = {value}\n    {effect}")
    lines += ["", "Restart the server. To undo it: the same command with --remove."]
    if str(path.parent) not in jupyter_config_path():
        lines.append("No server looks there now: add that folder to JUPYTER_CONFIG_PATH.")
    return "\n".join(lines)
