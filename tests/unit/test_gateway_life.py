"""What the server says of a kernel to its gateway is what that one knows."""

from __future__ import annotations

import json
from dataclasses import fields, replace

from golden import REQUEST, ROOT, site_of

from sandbox_provisioner.gateway.settings import Settings, read_settings
from sandbox_provisioner.gateway_life import _rules_of
from sandbox_provisioner.spec import Network, NetworkWish


def test_the_gateway_knows_all_that_it_is_told_of_a_kernel():
    wish = NetworkWish(mode=Network.GATEWAY, allow=("example.org",), up_bits=1 << 20, audit=True)
    request = replace(REQUEST, spec=replace(REQUEST.spec, network=wish))
    told = _rules_of(request, replace(site_of(ROOT), network_allow=("data.example.org:443",)))
    settings = read_settings(json.dumps(told | {"id": "abc"}))
    assert (settings.allow, settings.up_bits, settings.audit) == (
        ("data.example.org:443",), 1 << 20, True,
    )  # fmt: skip
    of_machine = {"id", "own_addresses"}
    assert set(told) | of_machine == {field.name for field in fields(Settings)}
