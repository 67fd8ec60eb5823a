"""The rooms of docs/design.md, as far as a machine can hold them: who imports whom."""

from __future__ import annotations

import ast
import importlib
import json
import re
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sandbox_provisioner
from sandbox_provisioner import contract
from sandbox_provisioner.facilities.caps.wish import BY_FACILITY, CAPS
from sandbox_provisioner.stem import BOOT

PACKAGE = Path(sandbox_provisioner.__file__).parent
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))
DESIGN = Path(__file__).parents[2] / "docs/design.md"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# What the launcher's boot loads: its ground, each facility's part of it, and what stands on both.
GROUND = sorted(path.stem for path in PACKAGE.glob("inside/*.py") if path.stem != "__init__")
PARTS = sorted(
    path.relative_to(PACKAGE).parts[1]
    for form in ("inside.py", "inside/__init__.py")
    for path in PACKAGE.glob(f"facilities/*/{form}")
)
OF_PARTS = [module_of(path) for path in PACKAGE.glob("facilities/*/inside/*.py")]
LAUNCHER = {
    *(f"{NAME}.inside.{name}" for name in GROUND),
    *(f"{NAME}.facilities.{name}.inside" for name in PARTS),
    *OF_PARTS,
    *(f"{NAME}.launcher.{path.stem}" for path in PACKAGE.glob("launcher/*.py")),
} - {f"{NAME}.launcher.__init__"}
OF_LAUNCHER = {
    "__future__", "_signal", "collections", "ctypes", "errno", "gc", "os", "resource", "select",
    "stat", "struct", "sys", "time",
}  # fmt: skip
LONGEST_FUNCTION = 60
LONGEST_MEDIAN = 12


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path, *, only_at_top: bool = False) -> set[str]:
    """The full names of all modules that *path* imports, those for type checkers left out."""
    found = set()
    nodes = tree_of(path).body if only_at_top else _run_nodes(tree_of(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = ".".join(path.relative_to(PACKAGE.parent).parts[: -node.level])
            module = ".".join(filter(None, (folder if node.level else "", node.module)))
            found |= {_resolved(module, name.name) for name in node.names}
    return found


def _resolved(module: str, name: str) -> str:
    """ "from package import module" imports the module, "from module import name" does not."""
    path = PACKAGE.parent.joinpath(*module.split("."), name)
    is_module = path.with_suffix(".py").exists() or path.joinpath("__init__.py").exists()
    return f"{module}.{name}" if is_module else module


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_nodes(node)


def ours_of(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] == NAME}


def functions() -> Iterator[tuple[str, int]]:
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{module_of(path)}.{node.name}", lines


# -- the launcher's room


@pytest.mark.parametrize("name", sorted(LAUNCHER))
def test_the_launcher_imports_built_in_modules_and_its_own_rooms(name):
    found = imports_of(file_of(name))
    ours = {module for module in found if module.split(".")[0] == NAME}
    assert {module.split(".")[0] for module in found - ours} <= OF_LAUNCHER
    # Below each: the ground knows no facility, a facility no other one and not who stands above.
    own = name.rpartition(".")[0]
    if name.split(".")[1] == "facilities":
        own = ".".join(name.split(".")[:4])
    below = {f"{NAME}.inside"} | {f"{NAME}.inside.{other}" for other in GROUND}
    if own == f"{NAME}.launcher":
        below |= LAUNCHER | {own}
    assert {module for module in ours if not module.startswith(own)} <= below


@pytest.mark.parametrize("name", PARTS)
def test_every_function_of_a_facility_that_is_a_step_is_a_verb(name):
    module = importlib.import_module(f"{NAME}.facilities.{name}.inside")
    steps = [
        found
        for word, found in vars(module).items()
        if callable(found) and getattr(found, "__module__", "") == module.__name__
        and not isinstance(found, type) and not word.startswith("_")
    ]  # fmt: skip
    assert set(module.VERBS) == set(steps)


def test_what_is_pure_in_the_launchers_room_stays_so():
    numbers = f"{NAME}.facilities.rights.plan.syscall_numbers"
    for name in ("seccomp", "syscall_numbers"):
        found = imports_of(PACKAGE / "facilities/rights/plan" / f"{name}.py")
        allowed = {"__future__", "collections.abc", "dataclasses", "enum", "errno", "functools"}
        assert found <= allowed | {"struct", "typing", numbers}, name


def test_only_one_file_speaks_to_the_c_library():
    users = {module_of(path) for path in FILES if "ctypes" in imports_of(path)}
    # One of the others writes into objects of Python's own; the relay is in a box, alone.
    others = {f"{NAME}.nursery.immortal", f"{NAME}.hub.relay"}
    assert users == {f"{NAME}.inside.kernel_calls"} | others


def test_a_real_launcher_loads_nothing_that_a_start_does_not_need():
    """What is in sys.modules when the launcher's boot is done, of the modules not frozen in."""
    boot = BOOT.replace("main(sys.argv[2:])", "names = sorted(sys.modules)")
    script = f"{boot}\nimport sys; sys.stdout.write(repr(names))"
    answer = subprocess.run(
        [sys.executable, "-SI", "-c", script, str(PACKAGE.parent)],
        env={}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    loaded = set(ast.literal_eval(answer.stdout))
    bare = subprocess.run(
        [sys.executable, "-SI", "-c", "import sys; print(sorted(sys.modules))"],
        env={}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    added = loaded - set(ast.literal_eval(bare.stdout))
    folders = {f"{NAME}.facilities.{name}" for name in PARTS}
    ours = {NAME, *LAUNCHER, *folders, f"{NAME}.inside", f"{NAME}.launcher", f"{NAME}.facilities"}
    built_in_or_small = {
        "_collections_abc", "_ctypes", "_signal", "_stat", "_struct", "abc", "_abc", "ctypes",
        "ctypes._endian", "errno", "gc", "genericpath", "os", "os.path", "posixpath", "resource",
        "select", "stat", "struct", "sys", "types", "__future__",
    }  # fmt: skip
    assert added - ours - built_in_or_small == set()


def test_the_collector_leaves_alone_what_launchers_share_with_the_stem():
    told = f"{NAME}.launcher.enter.os._exit = lambda code: print(gc.get_freeze_count())"
    boot = BOOT.replace("; main(", f"; import gc, {NAME}.launcher.enter; {told}; main(")
    ours, theirs = socket.socketpair()
    theirs.close()  # the server's end: it is gone at once
    with ours:
        answer = subprocess.run(
            [sys.executable, "-SI", "-c", boot, str(PACKAGE.parent), str(ours.fileno()), "60"],
            env={}, check=True, capture_output=True, text=True, pass_fds=[ours.fileno()],
        )  # fmt: skip
    assert int(answer.stdout) > 1000


# -- the other rooms


NURSERY = sorted(PACKAGE.glob("nursery/*.py"))


@pytest.mark.parametrize("path", NURSERY, ids=lambda path: path.name)
def test_what_runs_in_a_nursery_knows_nothing_of_who_launches(path):
    """Every kernel inherits what is loaded there."""
    own = f"{NAME}.nursery"
    assert {name for name in ours_of(path) if not name.startswith(own)} <= LAUNCHER


def test_only_one_file_speaks_to_systemd():
    users = {module_of(path) for path in FILES if "jeepney" in _top_names(path)}
    assert users == {f"{NAME}.facilities.caps.cgroup.manager"}


def test_only_one_file_loads_what_compiles_messages_for_interfaces_and_no_other_start_does():
    users = {module_of(path) for path in FILES if "pyroute2" in _top_names(path)}
    assert users == {f"{NAME}.facilities.network.card.links"}
    script = f"import sys, {NAME}.provisioner, {NAME}.launch; print('pyroute2' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "False\n"


def test_what_draws_tables_is_loaded_by_three_commands_and_by_no_start():
    users = {module_of(path) for path in FILES if "rich" in _top_names(path)}
    assert users == {f"{NAME}.app.listing", f"{NAME}.app.grade", f"{NAME}.app.image"}
    script = f"import sys, {NAME}.provisioner, {NAME}.app.running; print('rich' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "False\n"


def test_nbgrader_is_loaded_by_two_files_and_by_whoever_grades_alone():
    users = {module_of(path) for path in FILES if _top_names(path) & {"nbgrader", "sqlalchemy"}}
    assert users <= {f"{NAME}.grade.course", f"{NAME}.grade.preprocessor"}
    graders = {module_of(path) for path in FILES if any(".grade" in n for n in ours_of(path))}
    assert {name for name in graders if not name.startswith(f"{NAME}.grade")} <= {
        f"{NAME}.app.grade"
    }
    pure = {name: ours_of(PACKAGE / f"grade/{name}.py") for name in ("terms", "verdict", "shown")}
    words = {f"{NAME}.{name}" for name in ("ends", "inside.printable", "story", "told", "units")}
    assert pure == {"terms": set(), "verdict": words, "shown": set()}


def test_who_counts_for_prometheus_is_loaded_where_somebody_asks_for_it_alone():
    users = {module_of(path) for path in FILES if "prometheus_client" in _top_names(path)}
    assert users == {f"{NAME}.metrics", f"{NAME}.broker.scrape"}
    for path in FILES:
        at_top = imports_of(path, only_at_top=True) & {f"{NAME}.metrics", f"{NAME}.broker.scrape"}
        assert not at_top or module_of(path) == f"{NAME}.broker.scrape", path


def test_the_spec_stands_on_nothing_but_wishes_sizes_and_errors():
    wishes = (
        "facilities.caps.wish", "facilities.devices.wish", "facilities.network.wish.network",
        "facilities.storage.wish",
    )  # fmt: skip
    assert ours_of(PACKAGE / "spec.py") == {
        f"{NAME}.{name}" for name in (*wishes, "errors", "units")
    }


def test_a_gateway_takes_the_rules_without_the_options():
    rules = PACKAGE / "facilities/network/wish"
    below = {f"{NAME}.facilities.network.wish.{name}" for name in ("addresses", "names")}
    assert ours_of(rules / "rules.py") == below | {f"{NAME}.errors"}
    for name in ("addresses", "names"):
        assert ours_of(rules / f"{name}.py") == set()
    assert ours_of(rules / "__init__.py") == set()


GATEWAY = sorted(PACKAGE.glob("gateway/*.py"))
# What of it reads bytes of strangers, or keeps books: it calls nobody.
PURE_OF_GATEWAY = (
    "dns", "gate", "head", "hello", "meter", "names", "refused", "seats", "settings",
)  # fmt: skip
OF_OTHER_ROOMS = {
    f"{NAME}.{name}"
    for name in (
        "errors", "facilities.network.tell.counts", "facilities.network.tell.pace",
        "facilities.network.wish.addresses",
        "facilities.network.wish.rules", "inside.kernel_calls", "inside.printable", "inside.wire",
    )
}  # fmt: skip


@pytest.mark.parametrize("path", GATEWAY, ids=lambda path: path.stem)
def test_a_gateway_stands_on_the_rules_the_counts_and_the_words(path):
    """Strangers' bytes are parsed there: the less is in that process, the better."""
    ours = {name for name in ours_of(path) if not name.startswith(f"{NAME}.gateway")}
    assert ours <= OF_OTHER_ROOMS
    others = _top_names(path) - {NAME, "dnslib"}
    assert others <= sys.stdlib_module_names
    assert not others & {"asyncio", "subprocess", "multiprocessing", "ctypes", "http", "ssl"}


@pytest.mark.parametrize("name", PURE_OF_GATEWAY)
def test_what_reads_bytes_of_strangers_calls_nobody(name):
    path = PACKAGE / f"gateway/{name}.py"
    assert not imports_of(path) & {"os", "socket", "select", "time", "threading"}
    pure = {f"{NAME}.gateway.{other}" for other in PURE_OF_GATEWAY}
    assert {other for other in ours_of(path) if ".gateway." in other} <= pure


def test_nobody_outside_takes_anything_from_a_gateway():
    """It is a program of its own, of which others know the words alone."""
    for path in FILES:
        if path not in GATEWAY:
            assert not any(name.startswith(f"{NAME}.gateway.") for name in ours_of(path)), path


@pytest.mark.parametrize("name", ["frames", "server_wish", "values", "wishes"])
def test_what_the_broker_reads_of_strangers_calls_nobody(name):
    imported = imports_of(PACKAGE / f"broker/{name}.py")
    assert not imported & {"os", "socket", "select", "time", "threading", "pathlib", "subprocess"}
    pure = ("frames", "server_wish", "values", "wishes")
    called = {f"{NAME}.broker.{other}" for other in pure}
    assert {other for other in imported if ".broker." in other} <= called


def test_the_broker_knows_no_jupyter_and_nobody_above_it():
    for path in PACKAGE.glob("broker/*.py"):
        assert not _top_names(path) & {"jupyter_client", "jupyter_core", "zmq", "traitlets"}, path
        assert not ours_of(path) & {f"{NAME}.provisioner", f"{NAME}.options", f"{NAME}.app"}, path


def test_what_has_servers_for_a_hub_is_handed_to_the_broker_which_does_not_know_it():
    for path in PACKAGE.glob("broker/*.py"):
        assert not {name for name in ours_of(path) if name.startswith(f"{NAME}.hub")}, path
    users = {module_of(path) for path in FILES if f"{NAME}.hub.for_hub" in ours_of(path)}
    assert users == {f"{NAME}.app.broker"}


def test_a_hub_that_is_not_root_loads_jupyterhub_in_one_file_and_the_broker_never():
    assert {module_of(path) for path in FILES if "jupyterhub" in _top_names(path)} == {
        f"{NAME}.hub.spawner"
    }


def test_what_a_server_in_a_box_finds_is_told_by_constants_alone():
    assert imports_of(PACKAGE / "broker/box.py") == {"__future__"}


def test_a_desk_starts_nothing_and_only_the_daemon_and_a_hub_have_one():
    assert not ours_of(PACKAGE / "broker/desk.py") & {f"{NAME}.launch", f"{NAME}.broker.kernels"}
    users = {module_of(path) for path in FILES if f"{NAME}.broker.desk" in ours_of(path)}
    assert users == {f"{NAME}.broker.kernels", f"{NAME}.hub.kernels"}


WISHES = sorted(PACKAGE.glob("facilities/caps/wish/*.py"))


@pytest.mark.parametrize("path", WISHES, ids=lambda path: path.stem)
def test_a_cap_stands_on_sizes_and_errors_and_knows_no_other(path):
    """So that a new one touches its own file, and the list of all."""
    allowed = {f"{NAME}.{name}" for name in ("facilities.caps.wish.cap", "errors", "units")}
    if path.name == "__init__.py":
        allowed |= {f"{NAME}.facilities.caps.wish.{other.stem}" for other in WISHES}
    assert ours_of(path) <= allowed


def test_who_makes_groups_knows_no_cap_by_what_it_may_be_asked_for():
    """The drivers loop over all caps; what they read, watch and freeze is their own."""
    words = {field for cap in CAPS for field in (*cap.fields, *cap.options)} - set(BY_FACILITY)
    for path in PACKAGE.glob("facilities/caps/cgroup/*.py"):
        names = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
        assert not names & words, path


def test_what_opens_places_stands_on_the_spec_and_the_calls():
    allowed = {"errors", "mounts", "spec", "inside.kernel_calls"}
    assert ours_of(PACKAGE / "places.py") == {f"{NAME}.{name}" for name in allowed}


def test_errors_stand_on_nothing_but_what_makes_them_printable():
    assert ours_of(PACKAGE / "errors.py") == {f"{NAME}.inside.printable"}
    assert imports_of(PACKAGE / "inside" / "printable.py") == {"__future__"}


def test_who_is_trusted_is_found_out_by_looking_alone():
    names = {"__future__", "collections.abc", "dataclasses", "os", "stat"}
    assert imports_of(PACKAGE / "trust.py") == names


LAYERS = sorted(PACKAGE.glob("layers/*.py"))


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_what_outlives_kernels_is_read_by_who_runs_none_of_it(path):
    forbidden = {"subprocess", "runpy", "pickle", "marshal", "shutil", "ctypes", "asyncio"}
    assert not imports_of(path) & forbidden
    above = ("launch", "ledger", "handle", "app", "provisioner", "orders", "performer", "broker")
    assert not {name for name in ours_of(path) if name.split(".")[1] in above}


def test_what_may_be_kept_is_decided_without_a_look():
    assert ours_of(PACKAGE / "layers/guard.py") == {f"{NAME}.spec"}
    assert not imports_of(PACKAGE / "layers/guard.py") & {"os", "stat"}


def test_who_removes_folders_stands_on_nothing():
    assert ours_of(PACKAGE / "removal.py") == set()


FACTS = [str(path.relative_to(PACKAGE))[:-3] for path in PACKAGE.glob("facilities/*/facts/*.py")]


@pytest.mark.parametrize("name", ["host", "python_files", *FACTS])
def test_what_only_reads_starts_no_process_and_runs_no_text(name):
    """What it reads may have been written by a kernel."""
    forbidden = {"subprocess", "runpy", "pickle", "marshal", "ast", "ctypes", "tokenize"}
    assert not imports_of(PACKAGE / f"{name}.py") & forbidden
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(PACKAGE / f"{name}.py"))
              if isinstance(node, ast.Call)}  # fmt: skip
    assert not called & {"exec", "eval", "compile", "os.system", "importlib.import_module"}


ALL_WISHES = [
    *WISHES,
    *sorted(PACKAGE.glob("facilities/network/wish/*.py")),
    *sorted(PACKAGE.glob("facilities/*/wish.py")),
]
PURE = ["plan", "spec", "story", "errors", "ends", "units", "told", "checks", "doctor"]


@pytest.mark.parametrize("name", [*PURE, *(str(p.relative_to(PACKAGE))[:-3] for p in ALL_WISHES)])
def test_what_is_pure_starts_nothing_and_opens_nothing(name):
    forbidden = {"subprocess", "socket", "asyncio", "shutil", "tempfile", "threading", "ctypes"}
    assert not imports_of(PACKAGE / f"{name}.py") & forbidden
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(PACKAGE / f"{name}.py"))
              if isinstance(node, ast.Call)}  # fmt: skip
    assert not called & {"open", "os.open", "os.mkdir", "os.listdir", "os.unlink", "os.environ.get"}


# -- facilities: a folder for each, and the name of a file is a law

# "cgroup", "card", "images", "folders", "projects" and "quotas" are what is made outside.
MADE_OUTSIDE = {"cgroup", "card", "images", "folders", "projects", "quotas"}
LAWS = {"wish", "facts", "plan", "inside", "tell"} | MADE_OUTSIDE
FACILITIES = sorted(path for path in (PACKAGE / "facilities").iterdir() if path.is_dir())
FACILITIES = [path for path in FACILITIES if (path / "__init__.py").exists()]


def rooms_of(facility: Path) -> Iterator[tuple[str, Path]]:
    """The law and the file of everything in *facility*: "facts.py", or a file of "facts/"."""
    for path in sorted(facility.rglob("*.py")):
        first = path.relative_to(facility).parts[0]
        if first != "__init__.py":
            yield first.removesuffix(".py"), path


@pytest.mark.parametrize("facility", FACILITIES, ids=lambda path: path.name)
def test_a_facility_has_no_other_rooms_and_knows_no_other_facility(facility):
    own = f"{NAME}.facilities.{facility.name}."
    for law, path in rooms_of(facility):
        assert law in LAWS, path
        for name in ours_of(path):
            other = name.startswith(f"{NAME}.facilities.") and not name.startswith(own)
            assert not other, (path, name)
            assert not name.startswith((f"{NAME}.orders", f"{NAME}.launch", f"{NAME}.warm")), path


@pytest.mark.parametrize("facility", FACILITIES, ids=lambda path: path.name)
def test_what_a_facility_plans_and_tells_is_pure(facility):
    forbidden = {"subprocess", "socket", "asyncio", "shutil", "tempfile", "threading", "ctypes"}
    for law, path in rooms_of(facility):
        if law in {"plan", "tell"}:
            assert not imports_of(path) & forbidden, path
            called = {ast.unparse(node.func) for node in ast.walk(tree_of(path))
                      if isinstance(node, ast.Call)}  # fmt: skip
            assert not called & {"open", "os.open", "os.listdir", "os.environ.get"}, path
        if law == "inside":
            own = f"{NAME}.facilities.{facility.name}.inside", f"{NAME}.inside"
            assert {m for m in ours_of(path) if not m.startswith(own)} == set(), path


def test_what_a_facility_has_to_tell_people_is_collected():
    """A tell that has rows of doctor, causes of an end or notices is one of those asked for it."""
    collectors = {"ENDS": "story.py", "NOTICES": "story.py", "Check": "doctor.py"}
    for path in PACKAGE.glob("facilities/*/tell.py"):
        names = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
        for name, collector in collectors.items():
            if name in names:
                assert module_of(path) in imports_of(PACKAGE / collector), (path, name)


def test_the_ground_knows_no_facility():
    ground = (
        "errors",
        "units",
        "told",
        "mounts",
        "places",
        "descriptors",
        "off_loop",
        "removal",
        "links",
    )
    for name in ground:
        found = {module for module in ours_of(PACKAGE / f"{name}.py") if ".facilities" in module}
        assert found == set(), name


def test_options_are_the_provisioners_and_the_apps_alone():
    users = {module_of(path) for path in FILES if "traitlets" in _top_names(path)}
    # The contents manager is a configurable of the server's own, without options of a sandbox.
    # So is nbgrader's preprocessor.
    rooms = {
        "provisioner", "options", "option_errors", "facilities", "app", "contents", "hub", "grade",
    }  # fmt: skip
    others = {user for user in users if user.split(".")[1] not in rooms}
    assert others == {f"{NAME}.policy.meaning"}  # which has an administrator write the same ones


POLICY = sorted(PACKAGE.glob("policy/*.py"))
READS_OF_POLICY = {"__init__", "person", "meaning", "read", "current"}


@pytest.mark.parametrize("path", POLICY, ids=lambda path: path.stem)
def test_a_policy_stands_on_wishes_and_only_what_says_so_reads_anything(path):
    """What decides what somebody may have knows nobody who starts it."""
    below = (
        "policy", "spec", "errors", "units", "options", "option_errors", "host", "inside.printable",
        "facilities.caps.wish", "facilities.devices.wish", "facilities.network.wish",
        "facilities.volumes.wish",
    )  # fmt: skip
    for name in ours_of(path):
        assert name.removeprefix(f"{NAME}.").startswith(below), (path, name)
    if path.stem not in READS_OF_POLICY:
        forbidden = {"os", "pwd", "grp", "stat", "subprocess", "socket", "threading", "pathlib"}
        assert not imports_of(path) & forbidden


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("images/*.py")), ids=lambda path: path.stem)
def test_who_makes_images_starts_no_kernel_and_knows_no_options(path):
    """The box in which pip runs is handed in."""
    outside = (
        "caller",
        "errors",
        "facilities.ids.facts",
        "locks",
        "policy.lines",
        "removal",
        "state",
    )
    below = ("images", "inside.kernel_calls", *outside)
    for name in ours_of(path):
        assert name.removeprefix(f"{NAME}.").startswith(below) or name == NAME, (path, name)
    if path.stem == "tree":
        forbidden = {"os", "subprocess", "pathlib", "tarfile", "io"}
        assert not imports_of(path) & forbidden


# What stands behind the contracts: `contract.py`.
BEHIND = {
    "cgroup", "handle", "inside", "landlock", "launch", "places", "performer", "records",
    "stem", "warm.found", "warm.make_nursery", "warm.make_spare", "warm.start_from",
}  # fmt: skip


def test_the_provisioner_knows_contracts_and_not_what_stands_behind_them():
    path = PACKAGE / "provisioner.py"
    ours = {module.removeprefix(f"{NAME}.") for module in ours_of(path)}
    of_words = {"inside.printable"}
    assert {n for n in ours - of_words if n in BEHIND or n.split(".")[0] in BEHIND} == set()
    known = {"handle": contract.Handle, "starter": contract.Launcher}
    known |= {"meeting": contract.MeetingPlace}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            protocol = known.get(ast.unparse(node.value).removeprefix("self."))
            members = dir(protocol) + list(protocol.__annotations__) if protocol else [node.attr]
            assert node.attr in members, ast.unparse(node)


_NETWORK_FACTS = sorted(PACKAGE.glob("facilities/network/facts/*.py"))
ASKS_NOBODY = (
    "facilities/environment/facts/kernel_files.py", "python_files.py",
    *(f"facilities/network/facts/{path.name}" for path in _NETWORK_FACTS),
    "confinement.py", "handle.py", "host.py", "launch.py", "ledger.py",
    "meeting.py", "performer.py", "places.py", "plan.py", "stem.py", "warm/ahead.py",
    "warm/found.py", "warm/keys.py", "warm/launcher.py", "warm/make_nursery.py",
    "warm/make_spare.py", "warm/why_cold.py", "warm/start_from.py",
)  # fmt: skip


def test_the_way_of_a_start_asks_its_own_process_nothing_about_who_asks():
    """One that starts kernels for others has other ids, a home and variables of its own."""
    own = {"os.environ", "os.geteuid", "os.getegid", "os.getuid", "os.getcwd", "os.getlogin"}
    paths = [PACKAGE / name for name in ASKS_NOBODY]
    for pattern in (
        "facilities/*/facts/*.py", "facilities/*/plan.py", "facilities/*/plan/*.py",
        "facilities/*/tell.py", "facilities/*/tell/*.py", "orders/*.py",
    ):  # fmt: skip
        paths += PACKAGE.glob(pattern)
    for path in paths:
        nodes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute))
        assert not {ast.unparse(node) for node in nodes} & own, path


def test_what_holds_a_kernel_is_asked_and_not_compared():
    """One value a confinement, in place of a question at each place that differs."""
    users = {module_of(path) for path in FILES if "Confinement.LANDLOCK" in path.read_text()}
    assert users == {f"{NAME}.confinement", f"{NAME}.orders"}


def test_only_a_servers_configuration_loads_the_contents_manager():
    """jupyter_server is not among what a kernel needs, and a start does not wait for its import."""
    room = f"{NAME}.contents"
    for path in FILES:
        if not module_of(path).startswith(room):
            assert "jupyter_server" not in _top_names(path), path
            assert not any(name.startswith(room) for name in ours_of(path)), path
    ours = {name for path in FILES if module_of(path).startswith(room) for name in ours_of(path)}
    others = {f"{NAME}.inside.kernel_calls", f"{NAME}.templates"}
    assert {name for name in ours if not name.startswith(room)} == others


def test_jupyter_is_known_to_the_server_side_alone():
    known = {
        "provisioner", "last_words", "subscriber", "app", "contents", "hub", "nursery", "broker",
        "unboxed", "templates", "grade",
    }  # fmt: skip
    for path in FILES:
        if _top_names(path) & {"jupyter_client", "jupyter_core", "zmq", "tornado", "ipykernel"}:
            assert module_of(path).split(".")[1] in known, path


def _top_names(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize(
    "name",
    [
        "confinement", "contract", "ledger", "meeting", "performer", "stages", "stem",
        "plan", "spec", "places", "host", "handle", "records", "launch",
        "python_files", "story", "ends", "facilities",
    ],
)  # fmt: skip
def test_nothing_below_knows_who_stands_above(name):
    one = PACKAGE / f"{name}.py"
    paths = [one] if one.exists() else sorted((PACKAGE / name).rglob("*.py"))
    for path in paths:
        above = {f"{NAME}.provisioner", f"{NAME}.app", f"{NAME}.last_words"}
        assert not ours_of(path) & above, path


def test_no_import_goes_in_a_circle():
    graph = {module_of(path): _imported_at_top(path) for path in FILES}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def _imported_at_top(path: Path) -> set[str]:
    """A package's own modules import it only for its name, not for what it holds."""
    own = module_of(path)
    found = {name for name in imports_of(path, only_at_top=True) if name.split(".")[0] == NAME}
    return {name for name in found if not own.startswith(f"{name}.") and name != NAME} - {own}


# -- style


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_in_its_first_line_where_it_runs(path):
    first = (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
    folder = path.parent.name
    own = {"__init__.py": {folder, f"{folder}/", f"{path.parent.name}"}}.get(path.name, {path.name})
    names = own | {str(path.relative_to(PACKAGE))}
    name, dash, room = first.partition(" - ")
    assert dash, first
    assert name in names, first
    assert ":" in room or "." in room, first


# Files of Python's own, of jupyter_server's, and of nbgrader's users.
OF_OTHERS = {"site.py", "getpath.py", "services/sessions/handlers.py", "nbgrader_config.py"}


def test_every_file_that_a_text_names_is_there():
    """By its name alone, or by a path from the package, or from a folder that the text lies in."""
    names = {path.name for path in FILES}
    texts = [(DESIGN, text) for text in re.findall(r"`[^`\n]*`", DESIGN.read_text())]
    for path in FILES:
        texts += ((path, text) for text in _docstrings(path))
    for path, text in texts:
        for name in set(re.findall(r"(?<![\w/.*])\w[\w/]*\.py\b", text)) - OF_OTHERS:
            folders = (PACKAGE, *path.parents)
            assert name in names or any((f / name).exists() for f in folders), (path, name)


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_no_function_is_longer_than_a_screen():
    assert {name: lines for name, lines in functions() if lines > LONGEST_FUNCTION} == {}


def test_the_usual_function_is_short():
    assert statistics.median(lines for _, lines in functions()) < LONGEST_MEDIAN


def test_every_public_function_and_class_has_a_docstring():
    bare = []
    for path in FILES:
        for node in tree_of(path).body:
            is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_named and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{module_of(path)}.{node.name}")
    assert bare == []


def test_the_start_of_the_package_costs_no_other_import():
    script = f"import sys, json; import {NAME}; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    loaded = json.loads(answer.stdout)
    assert [name for name in loaded if name.startswith(f"{NAME}.")] == []


def test_a_number_is_one_decisions() -> None:
    numbers = re.findall(r"^(\d+)\. \*\*", DESIGN.read_text(), re.MULTILINE)
    assert len(numbers) > 200
    assert len({*numbers}) == len(numbers)
