"""The contract kit: networks of every wiring, and the rules that any pass is held to. For the tests of plugin authors.

from surgery.testing import check_pass, contract_cases

@pytest.mark.parametrize(("step", "network"), contract_cases([MyPass(), MyPass(rank=4)]))
def test_my_pass_keeps_the_contract(step, network):
    check_pass(step, network)
"""

from __future__ import annotations

from .check import RULES, check_pass, contract_cases, edited_networks
from .network import Network
from .networks import NETWORKS, networks
from .seeding import randomise

__all__ = ["NETWORKS", "RULES", "Network", "check_pass", "contract_cases", "edited_networks", "networks", "randomise"]
