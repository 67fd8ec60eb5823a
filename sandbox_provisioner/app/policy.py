"""app/policy.py - a command of its own: `jupyter sandbox policy`."""

from __future__ import annotations

from collections.abc import Iterator

from traitlets import Unicode

from sandbox_provisioner.app.command import COMMON_FLAGS, SandboxCommand
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.policy.current import who_asks
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.policy import Policy
from sandbox_provisioner.policy.read import POLICY_FILE, read_policy
from sandbox_provisioner.policy.terms import Term, Terms

_ALIASES = {"user": "PolicyApp.user", "file": "PolicyApp.file", "config": "JupyterApp.config_file"}
_HEAD = ("option", "is", "value", "from")
_WORDS = ("check", "show")


class PolicyApp(SandboxCommand):
    """Checks the policy, or shows what it gives to somebody."""

    usage = "jupyter sandbox policy check [FILE] | policy show [--user NAME]"
    description = (
        f"check reads the policy, {POLICY_FILE} or a draft of it, and tells what is wrong with it "
        "and on which line. show tells what a user would get by it, and from which line that "
        "comes. docs/policy.md tells what can stand in it."
    )
    examples = """
    jupyter sandbox policy check draft.toml
    jupyter sandbox policy show --user alice
    """
    user = Unicode("", help="The user to show it for. Default: you.").tag(config=True)
    file = Unicode("", help=f"A draft to show. Default: {POLICY_FILE}.").tag(config=True)
    aliases = _ALIASES
    flags = COMMON_FLAGS

    def start(self) -> None:
        """Called once by `main`; PolicyError where the file cannot be relied on."""
        word, *more = self.extra_args or [""]
        if word not in _WORDS or len(more) > (word == "check"):
            raise self.wrong("write check, with a file or without one, or show")
        draft = more[0] if more else self.file
        policy = _read(draft)
        if word == "check":
            print(_in_order(policy))
        else:
            person = Person.find(self.user) if self.user else who_asks()
            print("\n".join(_shown(policy.for_person(person))))


def _read(draft: str) -> Policy:
    """The policy of the machine, or a draft, which need not be root's yet."""
    policy = read_policy(draft, owner_uid=None) if draft else read_policy()
    if policy is None:
        raise SpecError(
            attempt=f"read the policy {draft or POLICY_FILE}",
            answer="there is no such file, so nobody decides what kernels may have but their users",
            remedy=("For an example see docs/policy.md; to look at a draft of it:",
                    f"{COMMAND}jupyter sandbox policy check FILE"),
        )  # fmt: skip
    return policy


def _in_order(policy: Policy) -> str:
    named = {"group": policy.groups, "user": policy.users}
    counts = (
        f"{len(found)} {word}{'' if len(found) == 1 else 's'}" for word, found in named.items()
    )
    hub = f" A hub runs as {policy.hub.account}." if policy.hub else ""
    return f"{policy.file} is in order: it speaks of everyone, of {' and '.join(counts)}.{hub}"


def _shown(terms: Terms) -> Iterator[str]:
    person = terms.person
    yield f"{one_line(person.name)}, of the groups {', '.join(map(one_line, person.groups))}:\n"
    rows = sorted(_rows(terms))
    yield table([_HEAD, *rows], widest=(24, 12, 60, 60)) if rows else "The policy says nothing."
    yield f"\nMore than that is {'narrowed' if terms.on_excess == 'narrow' else 'refused'}."


def _rows(terms: Terms) -> Iterator[tuple[str, str, str, str]]:
    kinds = (
        ("by default", terms.defaults),
        ("at most", terms.ceilings),
        ("always", terms.forced),
        ("in all", terms.sums),
    )
    for kind, found in kinds:
        yield from (_row(term.option, kind, term) for term in found.values())
    counts = (("kernels", "in all", terms.kernels), ("kernels", "of the host", terms.host_kernels),
              ("mem_limit", "of the host", terms.host_memory))  # fmt: skip
    yield from (_row(option, kind, term) for option, kind, term in counts if term)


def _row(option: str, kind: str, term: Term) -> tuple[str, str, str, str]:
    return option, kind, term.shown, f"[{term.section}], line {term.line}"
