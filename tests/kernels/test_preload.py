"""Modules that a nursery imports for its kernels: they decide what they would in a cold kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warmth import came_from, made, status_of

from sandbox_provisioner.warm import ahead

pytestmark = [pytest.mark.requires("userns"), pytest.mark.timeout(360)]

# Each is compared where it is installed.
WISHED = (
    "numpy", "scipy.stats", "pandas", "pyarrow", "matplotlib.pyplot", "sklearn.linear_model",
    "seaborn", "plotly.express", "tqdm.auto", "ipywidgets", "torch", "sqlite3", "multiprocessing",
    "email.mime.text", "concurrent.futures.process", "logging.handlers", "ssl", "rich.traceback",
)  # fmt: skip
MODULES = [name for name in WISHED if importlib.util.find_spec(name.partition(".")[0])]
# What a module can look at when it is imported, each as it finds it then.
DECIDES = """
import asyncio, builtins, glob, locale, logging, multiprocessing, os, site, sys, tempfile, threading
import time, warnings
shell = builtins.get_ipython() if hasattr(builtins, "get_ipython") else None
handler = logging.StreamHandler()
kept = sys.stdout, sys.stderr
FOUND = {
    "variables": sorted((n, v) for n, v in os.environ.items()), "argv": sys.argv[:-1],
    "caps": {path: open(path).read() for path in glob.glob("/sys/fs/cgroup/*")},
    "path": sys.path, "umask": os.umask(0o22), "locale": locale.setlocale(locale.LC_ALL),
    "zone": time.tzname, "temporary": tempfile.gettempdir(),
    "user site": site.getusersitepackages(), "base": site.USER_BASE,
    "home": os.path.expanduser("~"), "config": os.environ.get("XDG_CONFIG_HOME"),
    "displayhook": type(sys.displayhook).__name__, "names": sorted(vars(builtins)),
    "shell": type(shell).__name__, "has kernel": hasattr(shell, "kernel"),
    "is a kernel's": "IPKernelApp" in getattr(shell, "config", ()),
    "parent": shell is not None and shell.kernel is not None,
    "main": sys.modules["__main__"].__name__, "executable": sys.executable,
    "flags": list(sys.flags), "isatty": [s.isatty() for s in kept],
    "names of streams": [s.name for s in kept], "filters": [str(f) for f in warnings.filters],
    "policy": type(asyncio.get_event_loop_policy()).__name__,
    "start": multiprocessing.get_start_method(allow_none=True),
    "main thread": threading.current_thread() is threading.main_thread(),
    "ignored": [str(n) for n in (sys.excepthook.__name__, sys.getrecursionlimit())],
}
log = logging.getLogger("decides")
log.addHandler(handler)
folder = os.path.expanduser("~/.cache/decides")
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "index"), "w") as file:
    file.write("made when it was imported")
os.chmod(file.name, 0o640)
"""
ASK = """
import json, os, sys, threading, multiprocessing.process
import decides
status = os.stat(decides.folder + "/index")
print(json.dumps({
    **decides.FOUND, "is stream": [decides.kept[0] is sys.stdout, decides.kept[1] is sys.stderr],
    "index": open(decides.folder + "/index").read(), "mode": status.st_mode,
    "owner": status.st_uid == os.getuid(), "started in": multiprocessing.process.ORIGINAL_DIR,
    "variables now": sorted(os.environ.items()),
}))
"""
# All values of all modules, but for what is an address, a time or an order of each process's own.
VALUES = """
def values(names):
    import importlib, json, pathlib, re, sys
    for name in names:
        importlib.import_module(name)
    plain = (str, bytes, int, float, bool, type(None), pathlib.PurePath, complex)
    def shown(value, depth=0):
        if type(value) in plain:
            return re.sub("0x[0-9a-f]+", "0x", repr(value))[:400]
        few = isinstance(value, (tuple, list, set, frozenset, dict)) and len(value) < 999
        few = few and depth < 4
        if few and isinstance(value, dict):
            return sorted(f"{shown(k, depth + 1)}: {shown(v, depth + 1)}" for k, v in value.items())
        if few:
            return sorted(str(shown(one, depth + 1)) for one in value)
        return f"{type(value).__module__}.{type(value).__name__}"
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in {n.partition(".")[0] for n in names}:
            for key, value in list(vars(module).items()):
                if not key.startswith("__"):
                    found[f"{name}.{key}"] = shown(value)
    return json.dumps(found)
print(values(@))
"""
# Each process's own, or of the moment.
OWN = re.compile(
    r"psutil\._last_.*|logging\._startTime|torch\._C\._dynamo\.guards\.\w+|torch\.cuda\._queued_calls|"
    r"joblib\._multiprocessing_helpers\.name|numpy\.f2py\.rules\.(generationtime|module_rules)|"
    r"torch\.fx\.(_symbolic_trace\._wrapped_fns_to_patch|graph\._illegal_names)|"
    r"multiprocessing\.(process\._process_counter|util\._\w+)|.*\._pointer_type_cache"
)


@pytest.fixture
def decides(new_folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module, which kernels find."""
    folder = new_folder()
    folder.chmod(0o755)
    (folder / "decides.py").write_text(DECIDES)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("TERM", "dumb")
    return folder


@pytest.mark.parametrize("spares", [0, 1])
def test_a_module_decides_what_it_would_in_a_cold_kernel(
    kernel: Any, warm: Any, decides: Path, spares: int
) -> None:
    options = {"preload": ["decides"], "spares": spares}
    with kernel(**options) as k:
        cold = json.loads(k.run(ASK))
    with warm(**options):
        pass
    ahead.wait()
    with warm(**options) as k:
        assert came_from(k)
        assert k.run("import sys; 'decides' in sys.modules") == "True"
        found = json.loads(k.run(ASK))
        for name in ("variables", "variables now"):
            assert dict(found.pop(name)) == dict(cold.pop(name))
        assert found == cold
        assert k.run("decides.log.warning('seen')") == "seen\n"
        assert k.run("print('also', file=decides.kept[0])") == "also\n"


def test_all_that_modules_remember_is_as_in_a_cold_kernel(
    kernel: Any, warm: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    code = VALUES.replace("@", repr(MODULES))
    with kernel() as k:
        cold = json.loads(_printed(k, code))
    with warm(preload=MODULES):
        nursery = made(runtime_dir)
    assert status_of(nursery, runtime_dir)["preloaded"] == MODULES
    with warm(preload=MODULES) as k:
        assert came_from(k) == nursery.sandbox_id
        found = json.loads(_printed(k, code))
    both = {name for name in cold.keys() & found.keys() if not OWN.fullmatch(name)}
    assert len(both) > 5000
    assert {n: (cold[n], found[n]) for n in both if cold[n] != found[n]} == {}


def _printed(k: Any, code: str) -> str:
    """What *code* wrote to standard output alone: libraries warn."""
    found: list[str] = []

    def note(message: dict[str, Any]) -> None:
        if message["content"].get("name") == "stdout":
            found.append(message["content"]["text"])

    k.client.execute_interactive(code, output_hook=note, timeout=120)
    return "".join(found)


@pytest.mark.requires("matplotlib")
@pytest.mark.parametrize("spares", [0, 1])
def test_a_preloaded_pyplot_shows_figures(warm: Any, spares: int) -> None:
    options = {"preload": ["numpy", "matplotlib.pyplot"], "spares": spares}
    with warm(**options):
        pass
    ahead.wait()
    with warm(**options) as k:
        assert came_from(k)
        assert k.run("import sys; 'matplotlib.pyplot' in sys.modules") == "True"
        asked = k.client.execute("import matplotlib.pyplot as plt; plt.plot([1])")
        shown = k.until(lambda message: message["msg_type"] == "display_data", asked)
        assert shown["content"]["data"]["image/png"].startswith("iVBOR")
        places = k.run("import matplotlib, os; os.listdir(matplotlib.get_cachedir())")
        assert "fontlist" in places


def test_what_no_kernel_could_have_from_a_nursery_is_left_out_with_the_reason(
    warm: Any, decides: Path, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (decides / "asks.py").write_text("import os\nhere = os.getcwd()\n")
    (decides / "looks.py").write_text("get_ipython().kernel.comm_manager\n")
    names = ["asks", "looks", "decides"]
    with warm(preload=names):
        nursery = made(runtime_dir)
    told = status_of(nursery, runtime_dir)
    assert (told["preloaded"], [*told["refused"]]) == (["decides"], ["asks", "looks"])
    assert "asks is not preloaded: it asks for the current directory" in caplog.text
    assert "looks is not preloaded: it looks into the kernel" in caplog.text
    with warm(preload=names) as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run("import asks; asks.here") == repr(os.getcwd())
        assert k.run("import looks") == ""


@pytest.mark.requires("numpy")
def test_a_module_that_draws_random_numbers_of_its_own_is_left_out(
    warm: Any, decides: Path, runtime_dir: Path
) -> None:
    (decides / "draws.py").write_text("import numpy\nsource = numpy.random.default_rng()\n")
    seeds = (
        "import ssl, tempfile\ndrawn = ssl.RAND_bytes(8), next(tempfile._get_candidate_names())\n"
    )
    (decides / "seeds.py").write_text(seeds)
    options = {"preload": ["draws", "seeds"]}
    with warm(**options):
        told = status_of(made(runtime_dir), runtime_dir)
    assert (told["preloaded"], [*told["refused"]]) == (["seeds"], ["draws"])
    code = "import draws, seeds, ssl; draws.source.random(), ssl.RAND_bytes(8)"
    with warm(**options) as one, warm(**options) as other:
        assert one.run(code) != other.run(code)
        for own in ("ssl.RAND_bytes(8)", "next(seeds.tempfile._get_candidate_names())"):
            assert one.run(own) != other.run(own)


def test_a_kernel_whose_home_is_the_work_directory_imports_them_itself(
    warm: Any, decides: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    with warm(preload=["decides"]):
        nursery = made(runtime_dir)
    assert "Not preloaded for a kernel whose work directory is the home directory" in caplog.text
    with warm(preload=["decides"]) as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run("import sys; 'decides' in sys.modules") == "False"
        assert json.loads(k.run(ASK))["home"] == os.getcwd()


# LAPACK on both sides of the fork: a module that computes when it is imported, and the kernel.
COMPUTES = """
import numpy
numpy.random.seed(1)
matrix = numpy.random.rand(400, 400)
values = numpy.linalg.svd(matrix)[1]
"""
COMPUTE = """
import ctypes, json, os, numpy, computes
same = numpy.allclose(numpy.linalg.svd(computes.matrix)[1], computes.values)
solved = numpy.allclose(computes.matrix @ numpy.linalg.solve(computes.matrix, numpy.eye(400)),
    numpy.eye(400))
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "openblas" in line}
counts = []
for path in sorted(loaded):
    library = ctypes.CDLL(path)
    for name in ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_",
            "openblas_get_num_threads"):
        if hasattr(library, name):
            counts.append(getattr(library, name)())
pid = os.fork()
if pid == 0:
    numpy.linalg.svd(computes.matrix)
    os._exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps([bool(same), bool(solved), status, counts]))
"""


@pytest.mark.requires("numpy")
@pytest.mark.parametrize("cores", [None, 1.0])
def test_linear_algebra_works_on_both_sides_of_the_fork_with_as_many_threads_as_cold(
    kernel: Any, warm: Any, decides: Path, runtime_dir: Path, cores: float | None
) -> None:
    (decides / "computes.py").write_text(COMPUTES)
    options: dict[str, Any] = {"preload": ["computes"]}
    if cores:
        options |= {"cpu_limit": cores, "on_missing": {"cpu": "warn"}}
    with kernel(**options) as k:
        cold = json.loads(k.run(COMPUTE))
    assert cold[:3] == [True, True, 7]
    with warm(**options):
        nursery = made(runtime_dir)
    assert status_of(nursery, runtime_dir)["preloaded"] == ["computes"]
    with warm(**options) as k:
        assert came_from(k) == nursery.sandbox_id
        assert json.loads(k.run(COMPUTE)) == cold
