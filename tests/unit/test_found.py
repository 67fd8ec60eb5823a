"""By what a nursery or a spare is found."""

from __future__ import annotations

from dataclasses import replace

from golden import ASKERS

from sandbox_provisioner.warm.keys import spare_key_of


def test_a_spare_whose_files_tell_of_other_caps_is_not_found():
    """They were made with its box; its variables are set when it is bound."""
    request, site = ASKERS["root"]
    usual = spare_key_of(request, site, "key")
    fewer = replace(request, environment={**request.environment, "CPU_LIMIT": "0.5"})
    assert spare_key_of(request, site, "key") == usual
    assert spare_key_of(fewer, site, "key") != usual
