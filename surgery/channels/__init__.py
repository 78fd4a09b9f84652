"""Channel dependencies: which channels of which layers live or die together, found by running the graph on numbers.

    found = find_channels(model)             every position along a dimension that may shrink has a number
    found.groups, found.frozen              units that can go, and what has to stay and why
    found.remove([marks of group 0, …])     slices every parameter and adapts the sizes in the graph

Reading order: positions · values · call · movement, arithmetic, layers (what rules say) · trial · shrinking · rules ·
shuffling · walk · groups · carriers · removal · analysis · masking.
"""

from __future__ import annotations

from .analysis import Channels, find_channels
from .call import Call
from .carriers import Carrier
from .groups import Frozen, Group, Member
from .masking import masking_bytes, remove_and_compare
from .rules import ChannelRule
from .shrinking import Shrinking
from .values import Axis, Value

__all__ = [
    "Axis",
    "Call",
    "Carrier",
    "ChannelRule",
    "Channels",
    "Frozen",
    "Group",
    "Member",
    "Shrinking",
    "Value",
    "find_channels",
    "masking_bytes",
    "remove_and_compare",
]
