"""Every plan is word for word as in ``tests/unit/golden``; ``python -m tests.golden`` renews it."""

from __future__ import annotations

import pytest
from golden import CASES, FOLDER, render, verbs_of

from sandbox_provisioner.launcher.verbs import VERBS

RENEW = "python -m tests.golden writes it anew: look at the difference, and commit it with its why"


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_word_for_word_what_it_was(case):
    kept = (FOLDER / f"{case}.txt").read_text()
    assert render(case).splitlines() == kept.splitlines(), RENEW


def test_no_plan_is_kept_that_nobody_makes():
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)


def test_each_verb_is_in_one_of_them():
    """A step that no golden plan has could change unseen."""
    verbs = {verb for case in CASES for verb in verbs_of(case)}
    assert set(VERBS) - verbs == set()


def test_no_plan_depends_on_the_machine(monkeypatch):
    """Nothing of this process, nor of its user, is in any of them."""
    before = [render(case) for case in CASES]
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    monkeypatch.setattr("os.getegid", lambda: 4711)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.chdir("/")
    assert [render(case) for case in CASES] == before
