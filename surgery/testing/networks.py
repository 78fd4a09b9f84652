"""All networks by name. Together they have every kind of wiring a pass may meet."""

from __future__ import annotations

from .convolutional import CONVOLUTIONAL
from .network import Network
from .sequential import SEQUENTIAL

NETWORKS: dict[str, Network] = {network.name: network for network in (*CONVOLUTIONAL, *SEQUENTIAL)}


def networks(*names: str) -> list[Network]:
    """The networks of these names; all without one."""
    return [NETWORKS[name] for name in names or NETWORKS]
