"""conftest.py - in the test process, as root: a broker for the tests of a file, and who asks it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import users
from brokers import OTHER, Broker, User, copy_code
from facilities import missing

# As a service it runs where systemd does: in the lane of the virtual machine.
collect_ignore = ["test_units.py"] if missing("systemd-booted") else []
# Where there are such quotas; pytest asks the nearest conftest alone.
collect_ignore += ["test_limited_work_directory.py"] if missing("project-quotas") else []


@pytest.fixture(scope="module")
def kept_broker() -> Iterator[Broker]:
    """One that serves all tests of a file, with a home for those who ask."""
    home = Path(tempfile.mkdtemp(prefix="sbx-", dir="/opt"))
    runtime = Path(tempfile.mkdtemp(prefix="sbx-", dir="/run"))
    try:
        copy_code(home)
        made = Broker(users.make_home(home), runtime)
        yield made
        made.close()
    finally:
        shutil.rmtree(home)
        shutil.rmtree(runtime)


@pytest.fixture
def broker(kept_broker: Broker) -> Iterator[Broker]:
    """The same, which has no kernel before and none after."""
    yield kept_broker
    assert not kept_broker.records()


@pytest.fixture
def own_broker(user_home: Path, runtime_dir: Path) -> Iterator[Broker]:
    """One that a test may kill."""
    made = Broker(user_home, runtime_dir)
    yield made
    made.close()


@pytest.fixture(scope="module")
def user(kept_broker: Broker) -> Iterator[User]:
    """The user `users.USER`, to whom that home belongs, with `askers.py` at hand."""
    yield from _at_desk(kept_broker, users.USER)


@pytest.fixture(scope="module")
def other(kept_broker: Broker) -> Iterator[User]:
    """Another one, without a home of their own."""
    yield from _at_desk(kept_broker, OTHER)


@pytest.fixture
def own_user(own_broker: Broker) -> Iterator[User]:
    """As `user`, of a broker that a test may kill."""
    yield from _at_desk(own_broker, users.USER)


@pytest.fixture
def mortal(broker: Broker) -> Iterator[User]:
    """As `user`, for a test that kills them."""
    yield from _at_desk(broker, users.USER)


def _at_desk(broker: Broker, uid: int) -> Iterator[User]:
    with User(broker.home, uid) as made:
        made.sit_down(broker)
        yield made
