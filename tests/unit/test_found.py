"""By what a nursery or a spare is found."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden import ASKERS

from sandbox_provisioner.contract import Warmth
from sandbox_provisioner.orders import compile_fork
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.warm import found, make_spare
from sandbox_provisioner.warm.keys import key_of, made_of, spare_key_of
from sandbox_provisioner.warm.why_cold import why_no_nursery, why_no_spare

WHOSE = found.Whose(1000, "")


def _for(request: LaunchRequest, site: Site, uid: int) -> str:
    caller = replace(site.facts.caller, uid=uid)
    return made_of(request, replace(site, facts=replace(site.facts, caller=caller)), ())


def test_a_nursery_is_made_of_a_user_a_box_and_what_a_policy_leaves() -> None:
    request, site = ASKERS["root"]
    terms = Terms(person=Person("ann", 1000, ()))
    ruled = replace(request, terms=terms)
    limits = replace(request.spec.limits, memory_bytes=64 << 20)
    narrower = replace(ruled, spec=replace(ruled.spec, limits=limits))
    keys = [_for(request, site, 1000), _for(request, site, 1001), _for(ruled, site, 1000)]
    keys += [_for(replace(request, box="0" * 12), site, 1000), _for(narrower, site, 1000)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == _for(request, site, 1000)


def test_no_path_of_whoever_asks_is_looked_at_to_find_a_nursery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker does so on its loop, and a file system of theirs may never answer."""
    request, site = ASKERS["root"]
    caller = replace(site.facts.caller, home="/theirs/home")
    files = replace(site.files, program="/theirs/bin/python", readonly=("/theirs",))
    site = replace(site, facts=replace(site.facts, caller=caller), files=files)
    looks: list[str] = []
    for name in ("open", "stat", "lstat", "readlink"):
        look = getattr(os, name)

        def noted(path: object, *more: Any, _look: Any = look, **how: Any) -> Any:
            looks.append(str(path))
            return _look(path, *more, **how)

        monkeypatch.setattr(os, name, noted)
    made = made_of(request, site, ())
    spare_key_of(request, site, key_of(made))
    assert not why_no_nursery(request, site) and not why_no_spare(request, site)
    compile_fork(request, site)
    monkeypatch.undo()
    assert not [path for path in looks if "theirs" in path]
    newer = replace(site, files=replace(files, freshness=(1.0, 2.0, 3.0)))
    behind = replace(site, files=replace(files, behind="/theirs/bin/python3.12"))
    assert len({made, made_of(request, newer, ()), made_of(request, behind, ())}) == 3


@pytest.mark.parametrize(
    ("uid", "box", "is_found"),
    [(1000, "", True), (1001, "", False), (1000, "0123456789ab", False)],
)
def test_what_a_name_leads_to_is_used_only_for_whom_its_record_names(
    tmp_path: Path, uid: int, box: str, is_found: bool
) -> None:
    """Where a link has the key of one user, and leads to what is another's."""
    record = Record(sandbox_id="0123456789ab", uid=uid, box=box, kind="nursery")
    folder, _ = RecordFolder.create(tmp_path, record, ids=False)
    key = key_of("made of this", "")
    with contextlib.ExitStack() as stack:
        stack.callback(folder.remove)
        for name, link in (
            (found.SOCKET, found.link_of(tmp_path, key)),
            (found.CLAIMS, found.spare_link(tmp_path, key, folder.path.name)),
        ):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(str(folder.path / name))
            listener.listen(1)
            link.symlink_to(f"{folder.path.name}/{name}")
        for got in (found.find(tmp_path, key, WHOSE), found.claim(tmp_path, key, WHOSE)):
            assert (got is not None) == is_found
            if got:
                got.channel.close()


@pytest.mark.parametrize("is_of_broker", [True, False])
def test_of_one_user_a_broker_makes_few_spares_whatever_they_differ_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_of_broker: bool
) -> None:
    request, site = ASKERS["root"]
    caller = replace(site.facts.caller, uid=1000, opened={} if is_of_broker else None)
    site = replace(site, facts=replace(site.facts, caller=caller))
    launcher: Any = SimpleNamespace(survey_closed=lambda _: (site, None), runtime=lambda: tmp_path)
    monkeypatch.setattr(make_spare, "find", lambda *_: "a nursery")
    for name in ("why_no_nursery", "why_no_spare"):
        monkeypatch.setattr(make_spare, name, lambda *_: "")
    whose = [*[(1000, "")] * 7, (1001, ""), (1000, "b" * 12), (1000, "")]
    are_made = []
    with contextlib.ExitStack() as stack:
        for number, (uid, box) in enumerate(whose):
            are_made.append(
                make_spare._nursery_for(launcher, request, Warmth(spares=4)) is not None
            )
            record = Record(sandbox_id=f"{number:012}", uid=uid, box=box, kind="spare")
            stack.callback(RecordFolder.create(tmp_path, record, ids=False)[0].remove)
        are_made.append(make_spare._nursery_for(launcher, request, Warmth(spares=4)) is not None)
    assert are_made == [True] * 10 + [not is_of_broker]


def test_a_spare_whose_files_tell_of_other_caps_is_not_found():
    """They were made with its box; its variables are set when it is bound."""
    request, site = ASKERS["root"]
    usual = spare_key_of(request, site, "key")
    fewer = replace(request, environment={**request.environment, "CPU_LIMIT": "0.5"})
    assert spare_key_of(request, site, "key") == usual
    assert spare_key_of(fewer, site, "key") != usual


def test_a_spare_with_another_device_of_the_same_name_is_not_found():
    request, site = ASKERS["root"]
    usual = spare_key_of(request, site, "key")
    for change in ({"minor": 1}, {"access": "r"}, {"path": "/dev/other"}):
        node = replace(site.devices.nodes[0], **change)
        other = replace(site, devices=replace(site.devices, nodes=(node,)))
        assert spare_key_of(request, other, "key") != usual
