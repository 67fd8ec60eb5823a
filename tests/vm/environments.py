"""Environments for a guest, made on the host: of the host's own release with its /usr/bin/python3,
which is the guest's too, and of another one ($VM_SUITE) from wheels for that one's Python.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
# Of Debian's releases that have one that we run on.
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
CACHE = Path(os.environ.get("VM_CACHE") or Path.home() / ".cache/sandbox-vm")


def environment(name: str, packages: Sequence[str], target: str) -> Path:
    """One with *packages*, what we need, and ourselves, for the place *target* in the guest; made
    once for a set of packages, but for ourselves."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *packages]
    version = subprocess.run([PYTHON, "-VV"], check=True, capture_output=True, text=True).stdout
    suite = os.environ.get("VM_SUITE", "")
    key = hashlib.sha256("\n".join([version, suite, *wanted]).encode()).hexdigest()[:12]
    made = CACHE / f"{name}-{key}"
    install = _by_wheels if _is_foreign(suite) else _by_the_hosts
    if not (made / "ok").exists():
        print(f"making {made}", flush=True)
        shutil.rmtree(made, ignore_errors=True)
        install(made, wanted)
        (made / "ok").touch()
    with tempfile.TemporaryDirectory() as folder:
        pip("wheel", "--no-deps", "--wheel-dir", folder, str(REPOSITORY))
        install(made, ["--no-deps", "--force-reinstall", *map(str, Path(folder).glob("*.whl"))])
    for path in (made / "bin").iterdir():
        if path.is_file() and not path.is_symlink():
            _name_interpreter(path, target)
    return made


def pip(*words: str, python: str = PYTHON) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", *words], check=True)


def _is_foreign(suite: str) -> bool:
    return bool(suite) and f"VERSION_CODENAME={suite}\n" not in Path("/etc/os-release").read_text()


def _by_the_hosts(made: Path, words: Sequence[str]) -> None:
    python = made / "bin/python"
    if not python.exists():
        subprocess.run([PYTHON, "-m", "venv", str(made)], check=True)
    pip("install", *words, python=str(python))


def _by_wheels(made: Path, words: Sequence[str]) -> None:
    """What pip and venv make of wheels for a Python that is not here."""
    version = PYTHONS[os.environ["VM_SUITE"]]
    site = made / f"lib/python{version}/site-packages"
    (made / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):
        (made / "bin" / name).unlink(missing_ok=True)
        (made / "bin" / name).symlink_to(PYTHON)
    (made / "pyvenv.cfg").write_text(
        f"home = {Path(PYTHON).parent}\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    platforms = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64")
    pip(
        "install", "--upgrade", "--target", str(site), "--only-binary=:all:",
        f"--python-version={version}", *(f"--platform={name}" for name in platforms), *words,
    )  # fmt: skip
    # pip's --target keeps these beside the packages.
    for name in ("bin", "share", "etc"):
        if (site / name).exists():
            shutil.copytree(site / name, made / name, dirs_exist_ok=True)
            shutil.rmtree(site / name)


def _name_interpreter(script: Path, target: str) -> None:
    """Scripts name the interpreter that is at *target* in the guest."""
    head, _, rest = script.read_bytes().partition(b"\n")
    if head.startswith(b"#!") and b"python" in head:
        script.write_bytes(f"#!{target}/bin/python\n".encode() + rest)
