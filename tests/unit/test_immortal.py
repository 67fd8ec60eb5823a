"""What a nursery makes immortal; where it is really done, in a process of its own, for good."""

from __future__ import annotations

import subprocess
import sys

import sandbox_provisioner
from sandbox_provisioner.nursery import immortal

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from sandbox_provisioner.nursery import immortal
def function(): return ("a constant", 12345678901)
names = {"a name " + str(len(sys.path)): [object()]}
print(immortal.immortalize())
(name,), ((thing,),) = names, names.values()
code = function.__code__
for found in (function, code, code.co_consts[-1], code.co_consts[-1][1], names, name, thing):
    before = sys.getrefcount(found)
    holders = [found] * 10
    print(sys.getrefcount(found) == before)
"""


def test_references_are_counted_no_more_where_this_python_can_do_without() -> None:
    folder = sandbox_provisioner.__path__[0].removesuffix("/sandbox_provisioner")
    command = [sys.executable, "-c", SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    can = sys.version_info[:2] in {(3, 12), (3, 13)} and "t" not in sys.abiflags
    assert done.stdout.split() == [str(can)] * 8


def test_everything_is_reached_from_what_holds_it() -> None:
    """Code is nothing to the collector, nor are the keys of a dictionary that are all text."""

    def function() -> tuple[str, int]:
        return ("a constant", 12345678901)

    def holds(one: object, part: object) -> bool:
        return any(part is other for other in immortal._parts_of(one))

    code = function.__code__
    pair = code.co_consts[-1]
    (name,) = names = {f"a name {id(pair)}": pair}
    assert holds(function, code)
    assert holds(code, code.co_consts)
    assert holds(code.co_consts, pair)
    assert holds(pair, pair[1])
    assert holds(names, name)
    assert holds(names, pair)
