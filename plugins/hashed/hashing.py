"""Where a virtual weight finds its value: integers below 2⁶³, sums, products and remainders.

    V_ij = ξ(i, j) w_h(i, j)                  Chen et al. 2015 (arXiv:1504.04788), equations 3 to 8, i < R rows, j < C
    c_ij = a u_i u_(R + j) mod p              a code of the position, uniform on 1 … p - 1;   u_l = (l + s)⁵ mod p
    m_ij = c_ij mod 2K,   h = m_ij mod K,   ξ = 1 where m_ij < K, else -1:     V_ij = (w, -w)[m_ij]

Bucket and sign are the two parts of one number that is uniform on 0 … 2K - 1, so that they are independent. Rows and
columns are numbered on, l = 0 … R + C - 1, and s is such that no l + s is 0 modulo p = 2³¹ - 1. Their fifth power
permutes the numbers modulo p (5 does not divide p - 1) and leaves neighbours no multiples of a common step; it is taken
per row and per column, so that a position costs one product and two remainders.
"""

from __future__ import annotations

from hashlib import sha256
from math import prod

import torch
from torch import Tensor

PRIME = 2**31 - 1


def constants(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """a and s of a layer (2,), int64, from SHA-256 of seed and name: the same wherever and whenever they are drawn."""
    digest = sha256(f"{seed}:{name}".encode()).digest()
    a, s = (int.from_bytes(part, "big") for part in (digest[:8], digest[8:16]))
    return torch.tensor([1 + a % (PRIME - 1), 1 + s % (PRIME - lines(shape))])


def lines(shape: tuple[int, ...]) -> int:
    """R + C of a weight: its first dimension, and all others together. Below p."""
    return shape[0] + prod(shape[1:])


def places(constants: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """m (R·C,), int32, of a weight of this shape with `count` values K, 2K ≤ p."""
    a, s = constants[0], constants[1]
    u = fifth_power(torch.arange(lines(shape), device=constants.device) + s)
    codes = (a * u[: shape[0]] % PRIME).unsqueeze(1) * u[shape[0] :] % PRIME
    found: Tensor = codes.to(torch.int32).flatten() % (2 * count)
    return found


def fifth_power(x: Tensor) -> Tensor:
    """x⁵ mod p of x in 0 … p - 1."""
    square = x * x % PRIME
    power: Tensor = square * square % PRIME * x % PRIME
    return power


def looked_up(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """V of `shape` from w (K,) and m (R·C,)."""
    return torch.cat([values, -values]).index_select(0, places).view(shape)


def summed(weight: Tensor, places: Tensor, count: int) -> Tensor:
    """Σ ξ V over every bucket (K,) of V (R·C,): the transpose of `looked_up`, as in the gradient (equation 12)."""
    both = weight.new_zeros(2 * count).index_add_(0, places, weight)
    return both[:count] - both[count:]


def sizes(places: Tensor, count: int) -> Tensor:
    """Positions per bucket (K,), int64."""
    both = torch.bincount(places, minlength=2 * count)
    return both[:count] + both[count:]
