"""descriptors.py: in a server of which we know nothing."""

from __future__ import annotations

import fcntl
import os
import resource

import pytest

from sandbox_provisioner.descriptors import is_readable

FD_SETSIZE = 1024


@pytest.fixture
def many_descriptors():
    """The right to have more than select(2) can name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= FD_SETSIZE + 2:
        pytest.fail(f"this machine allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FD_SETSIZE + 2), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_descriptor_of_any_number_can_be_asked_whether_it_is_readable():
    low, write_end = os.pipe()
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, FD_SETSIZE + 1)
    assert not is_readable(high)
    os.close(write_end)
    assert is_readable(high, 10)
    os.close(low)
    os.close(high)
