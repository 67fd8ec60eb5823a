"""What a kernel with a network installs: into its private home, and it finds it at once."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from boxes import PROGRAM
from stand_in import in_place_of_the_gateway

from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns")

GATEWAY = NetworkWish(mode=Network.GATEWAY)


@pytest.fixture
def with_network(sandbox, monkeypatch):
    """A box with a network in which nobody answers."""

    @contextmanager
    def started(program):
        with in_place_of_the_gateway(monkeypatch):
            with sandbox([program, "-c", PROGRAM], network=GATEWAY) as box:
                yield box

    return started


def has_pip(program: str) -> bool:
    asked = [program, "-c", "import importlib.util as u; raise SystemExit(not u.find_spec('pip'))"]
    return subprocess.run(asked, check=False).returncode == 0


# Of a virtual environment, and the one that it was made from.
OF_BOTH_KINDS = [sys.executable, str(Path(sys.executable).resolve())]
# Of the system's own "pip" may be another one's.
PYTHONS = [
    program
    for program in dict.fromkeys(OF_BOTH_KINDS)
    if has_pip(program) and not program.startswith(("/usr/bin/", "/usr/local/bin/"))
]


def wheel(folder):
    """A wheel as small as can be: a module, and a program that prints."""
    import zipfile

    name = "tiny_thing-1.0.dist-info"
    files = {
        "tiny_thing.py": "def main():\n    print('from the program')\n",
        f"{name}/METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        f"{name}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}/entry_points.txt": "[console_scripts]\ntiny = tiny_thing:main\n",
        f"{name}/RECORD": "",
    }
    path = f"{folder}/tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def shell(command):
    import subprocess

    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_and_use():
    import importlib

    from_pip = shell(f"pip install --no-index {wheel('/tmp')}")
    module = importlib.import_module("tiny_thing")
    told = shell("pip list --format=freeze")
    assert "Successfully installed tiny-thing" in from_pip, from_pip
    assert "tiny-thing==1.0" in told or "tiny_thing==1.0" in told, told
    assert shell("tiny") == "from the program\n"
    assert shell("python3 -c 'import tiny_thing; print(1)'") == "1\n"
    shell("pip uninstall --yes tiny-thing")
    return module.__file__


@pytest.mark.parametrize("program", PYTHONS, ids=["of-one", "of-the-other"][: len(PYTHONS)])
def test_what_pip_installs_is_found_at_once_and_by_its_name(with_network, program):
    with with_network(program) as box:
        found = box.call(install_and_use, using=(wheel, shell))
    assert found.startswith("/home/jovyan/.local/lib/")


def test_the_users_own_packages_are_still_found_and_come_second(
    with_network, new_folder, monkeypatch
):
    program = OF_BOTH_KINDS[-1]
    base = new_folder()
    base.chmod(0o755)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = base / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    for name in ("tiny_thing", "of_this_user"):
        (packages / f"{name}.py").write_text("")
    (base / "more").mkdir()
    (base / "more/by_a_path.py").write_text("")
    (packages / "more.pth").write_text(f"{base}/more\n")
    monkeypatch.setenv("PYTHONUSERBASE", str(base))

    def look():
        import site
        import sys

        import by_a_path
        import of_this_user
        import tiny_thing

        open(f"{site.getusersitepackages()}/tiny_thing.py", "w").close()
        again = shell(f"{sys.executable} -c 'import tiny_thing; print(tiny_thing.__file__)'")
        return [m.__file__ for m in (by_a_path, of_this_user, tiny_thing)], again.strip()

    with with_network(program) as box:
        before, after = box.call(look, using=(shell,))
    assert before == [f"{base}/more/by_a_path.py", *(f"{packages}/{n}.py" for n in (
        "of_this_user", "tiny_thing"))]  # fmt: skip
    assert after.startswith("/home/jovyan/.local/")


def test_without_a_network_nothing_of_it_is_there(sandbox):
    def look():
        import os

        return os.path.exists("/home/jovyan/.local"), [n for n in os.environ if n == "PIP_PREFIX"]

    with sandbox() as box:
        assert box.call(look) == [False, []]
