"""Who it is for whom something is started: what the system's databases tell."""

from __future__ import annotations

import os
import pwd

import pytest

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.policy.person import Person, group_name


def test_a_person_is_found_by_number_and_by_name():
    entry = pwd.getpwuid(os.getuid())
    by_number, by_name = Person.find(entry.pw_uid), Person.find(entry.pw_name)
    assert by_number == by_name
    assert (by_name.name, by_name.uid) == (entry.pw_name, entry.pw_uid)


def test_a_persons_groups_are_those_that_the_system_tells_with_the_primary_one_first():
    for entry in pwd.getpwall()[:20]:
        person = Person.find(entry.pw_name)
        gids = os.getgrouplist(entry.pw_name, entry.pw_gid)
        assert person.groups[0] == group_name(entry.pw_gid)
        assert sorted(person.groups) == sorted({group_name(gid) for gid in gids})


@pytest.mark.parametrize("who", ["nobody-of-that-name", "a\0b", "", 4294967294, 1 << 80, -7])
def test_who_is_not_there_is_an_error_that_names_him(who):
    with pytest.raises(HostError, match="no such user") as caught:
        Person.find(who)
    assert "getent passwd" in caught.value.remedy
