"""The fixtures that other tests stand on: a function of a test runs inside a sandbox."""

from __future__ import annotations

import errno
import os

import pytest

pytestmark = pytest.mark.requires("userns")


def own_uid():
    import os

    return os.getuid()


def add(one, other):
    return one + other


def fail():
    raise FileNotFoundError(2, "no such thing")


def call_helper():
    return add(1, 2)


def test_a_function_returns_its_value(run_inside):
    assert run_inside(add, [1], [2]) == [1, 2]


def test_a_function_runs_in_the_sandbox_and_not_here(run_inside, workdir):
    def look():
        import os

        return os.getcwd(), os.getpid()

    assert run_inside(look) == [str(workdir), 2]
    assert os.getpid() != 2


def test_an_exception_comes_back_with_its_type_and_its_traceback(run_inside):
    with pytest.raises(FileNotFoundError) as caught:
        run_inside(fail)
    assert caught.value.errno == errno.ENOENT
    assert "in fail" in caught.value.__notes__[0]


def test_helpers_travel_along(run_inside):
    assert run_inside(call_helper, using=(add,)) == 3


def test_a_running_sandbox_answers_more_than_once_and_ends_with_its_stdin(sandbox):
    with sandbox() as box:
        assert box.call(add, 1, 1) == 2
        assert box.call(add, 2, 2) == 4
        assert box.finish().code == 0


def test_two_sandboxes_run_at_once(sandbox):
    with sandbox() as one, sandbox() as other:
        one.send(add, 1, 1)
        other.send(add, 2, 2)
        assert (one.receive(), other.receive()) == (2, 4)
