"""failures.py - whoever launches: what a step that failed means, and what to do about it.

The remedy of a step stands beside it in its facility's plan. What no step can know is who of this
machine forbade it: that is looked for here, after the refusal.
"""

from __future__ import annotations

import errno

from sandbox_provisioner.errors import HostError, InternalError, LaunchError, SandboxError
from sandbox_provisioner.facilities.ids import tell as ids
from sandbox_provisioner.facilities.namespaces import tell as namespaces
from sandbox_provisioner.facilities.namespaces.facts import Surroundings
from sandbox_provisioner.facilities.process import tell as process
from sandbox_provisioner.facilities.workdir import tell as workdir
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import Plan, Site, Step
from sandbox_provisioner.report import Failure
from sandbox_provisioner.told import Cause

_ATTEMPT = "start the sandbox"


def check(performer: Performer, plan: Plan, site: Site) -> None:
    """Raise what *performer* reports of *plan*, or that it has ended without a word."""
    if performer.report.failure or performer.pidfd < 0:
        raise told_by(performer, plan, site)


def told_by(performer: Performer, plan: Plan, site: Site) -> SandboxError:
    """What *performer* reports of *plan*, which has failed, or that it has ended without a word."""
    if performer.report.failure:
        return failure_told_by(performer.report.failure, plan, site)
    return without_a_word(performer.status)


def without_a_word(status: int | None) -> LaunchError:
    """The error for a process that has ended, with *status* if that is known, before its plan was
    performed, and has not said why."""
    if status is not None and status < 0:
        return LaunchError(
            attempt=_ATTEMPT,
            answer=f"its launcher was killed by signal {-status}",
            remedy="Look for who did that: the machine's log tells of memory that was short.",
            step="spawn-launcher",
        )
    how = "" if status is None else f" with status {status}"
    return LaunchError(
        attempt=_ATTEMPT,
        answer=f"its launcher ended{how} and did not say why",
        remedy="A cap may be too small for it; raise mem_limit or pids_limit.",
        step="spawn-launcher",
    )


def _failed_step(failure: Failure, plan: Plan) -> Step:
    """The very step that *failure* tells of. Whoever ran modules before may tell anything."""
    if 0 < failure.step <= len(plan.steps):
        step = plan.steps[failure.step - 1]
        if step.verb == failure.verb:
            return step
    return Step(failure.verb)


def failure_told_by(failure: Failure, plan: Plan, site: Site) -> SandboxError:
    """What *failure* of *plan* means to a person."""
    step = _failed_step(failure, plan)
    places = places_of(step, site)
    if failure.is_ours:
        where = f"{step.verb} {places}" if places else step.verb
        return InternalError(attempt=_ATTEMPT, answer=f"[{where}] {failure.text}")
    return failure_of(step, failure.errno, failure.text, site, places)


def places_of(step: Step, site: Site) -> str:
    """What *step* was about to touch, as a person knows it; the first few of many."""
    words = [word for word in step.words if isinstance(word, str)]
    if step.verb in workdir.PLACES:
        found = words[workdir.PLACES[step.verb]]
    else:
        found = [word for word in words if word.startswith("/")]
    shown, more = found[:_MOST_PLACES], len(found) - _MOST_PLACES
    for target, place in site.places:
        if shown[:1] == [target] and place.path != target:
            shown.append(f"(from {place.path})")
    return " ".join(shown) + (f" and {more} more" if more > 0 else "")


_MOST_PLACES = 3
_REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSPC, errno.ENOSYS, errno.EINVAL}


def failure_of(step: Step, number: int, text: str, site: Site, places: str = "") -> SandboxError:
    """The error for a failed step of the launcher: what it was about to touch, its own words, and
    what to do about it."""
    cause = _cause_of(step.verb, number, text, site.facts) if number in _REFUSALS else None
    if cause:
        return HostError(
            attempt="make namespaces for a sandbox",
            answer=f"[{step.verb}{places and ' '}{places}] {text}: {cause.found}",
            remedy=cause.steps,
        )
    if step.verb == "execute" and number in process.MISSING:
        return process.not_executed(site.files.program, text)
    return LaunchError(
        attempt=_ATTEMPT,
        answer=text,
        remedy=step.remedy or "See: jupyter sandbox doctor",
        step=step.verb,
        places=places,
    )


def _cause_of(verb: str, number: int, text: str, facts: HostFacts) -> Cause | None:
    """Who of this machine forbade a step, None if it was not of those that somebody forbids."""
    return ids.forbidden_by(verb, text) or namespaces.forbidden_by(
        verb, number, text, look=Surroundings.probe, privileged=facts.privileged
    )
