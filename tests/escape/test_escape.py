"""Attempted escapes, each by its number: what a kernel tries, in every way to have a kernel.

All of a variant that leave their kernel whole are made in one cell; the first test that asks for an
answer pays for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import rooms  # noqa: F401
from frame import VARIANTS, Attempt, Variant, table
from stage import host_of, plain_answers, stage_for

# Whichever is the first of an ordinary user's tests runs all of them, a thousand: two minutes where
# three others want the CPU too, and each has a limit of its own there.
pytestmark = pytest.mark.timeout(900)
MARKS = {
    "root": (pytest.mark.requires("root"),),
    "user": (pytest.mark.ordinary_user, pytest.mark.requires("ordinary-user")),
    "landlock": (pytest.mark.ordinary_user, pytest.mark.requires("landlock", "ordinary-user")),
}


def cases(*, alone: bool, inside: bool):
    """A parameter set for each attempt in each variant."""
    for variant in VARIANTS:
        for attempt in table.values():
            if (attempt.alone, attempt.inside) != (alone, inside) or attempt.answer(
                variant
            ) is None:
                continue
            name = f"{attempt.number}-{attempt.title}-{variant.name}"
            marks = (*MARKS[variant.group], pytest.mark.requires(*attempt.needs))
            yield pytest.param(attempt, variant, id=name, marks=marks)


def answers_of(variant: Variant, options: Mapping[str, Any]) -> dict[int, str]:
    """What all attempts that share a kernel with *options* have answered."""
    found = _outcome_of(variant, json.dumps(options))
    if isinstance(found, Exception):
        raise found
    return found


@cache
def _outcome_of(variant: Variant, options_text: str) -> dict[int, str] | Exception:
    """They are made once, also if that fails."""
    options = json.loads(options_text)
    shared = [
        a
        for a in table.values()
        if a.inside and not a.alone and a.answer(variant) is not None and a.options == options
    ]
    try:
        with stage_for(variant) as stage:
            stage.fill()
            with stage.kernel(**options) as kernel:
                found = kernel.answers(shared, stage.facts_inside(kernel))
                # A sentence about what was refused may come meanwhile, and nothing else.
                said = filter(None, kernel.run("6 * 7").splitlines())
                assert [line for line in said if " was refused: " not in line] == ["42"]
            return found | {a.number: a.after(host_of(stage)) for a in shared if a.after}
    except Exception as error:
        return error


@pytest.mark.parametrize(("attempt", "variant"), [*cases(alone=False, inside=True)])
def test_an_attempt_fails(attempt: Attempt, variant: Variant):
    assert answers_of(variant, attempt.options)[attempt.number] in attempt.allowed(variant)


@pytest.mark.parametrize(("attempt", "variant"), [*cases(alone=True, inside=True)])
def test_an_attempt_in_a_kernel_of_its_own_fails(attempt: Attempt, variant: Variant):
    with stage_for(variant) as stage:
        stage.fill()
        with stage.kernel(**attempt.options) as kernel:
            answer = kernel.answers([attempt], stage.facts_inside(kernel))[attempt.number]
            if attempt.after:
                answer = attempt.after(host_of(stage))
            assert "42" in kernel.run("6 * 7")  # its history may have complained
    assert answer in attempt.allowed(variant)


@pytest.mark.parametrize(("attempt", "variant"), [*cases(alone=True, inside=False)])
def test_what_was_left_behind_leads_nowhere(attempt: Attempt, variant: Variant):
    with stage_for(variant) as stage:
        assert attempt.act(stage, *attempt.arguments) in attempt.allowed(variant)


CONTROLLED = [a for a in table.values() if a.inside and a.control and a.present]


OUTSIDE = [
    pytest.param(a, id=f"{a.number}-{a.title}", marks=pytest.mark.requires(*a.needs))
    for a in table.values()
    if not a.inside and a.without
]


@pytest.mark.requires("root")
@pytest.mark.parametrize("attempt", OUTSIDE)
def test_what_was_left_behind_works_without_the_box(attempt: Attempt):
    with stage_for(VARIANTS[0]) as stage:
        assert attempt.without
        assert attempt.without(stage, *attempt.arguments) in attempt.control.split("|")


@cache
def plain() -> dict[int, str]:
    """What the same attempts answer without a box."""
    with stage_for(VARIANTS[0]) as stage:
        stage.fill()
        return plain_answers(CONTROLLED, stage.facts)


@pytest.mark.requires("root")
@pytest.mark.parametrize("attempt", CONTROLLED, ids=lambda a: f"{a.number}-{a.title}")
def test_it_would_have_gone_well_without_the_box(attempt: Attempt):
    assert plain()[attempt.number] in attempt.control.split("|")
