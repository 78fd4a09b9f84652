"""Where a virtual weight finds its value: integers below 2³¹, sums, products and remainders.

    V_ij = ξ(i, j) w_h(i, j)                  Chen et al. 2015 (arXiv:1504.04788), equations 3 to 8, i < R rows, j < C
    x_ij = a u_i u_(R + j) mod p              uniform on 1 … p - 1;   u_l = (1 + (l + s) mod (p - 1))⁵ mod p
    y_ij = b v_i v_(R + j) mod q              the same with q, b and t in place of p, a and s
    m_ij = (q x_ij + y_ij) mod 2K,   h = m_ij mod K,   ξ = 1 where m_ij < K, else -1:     V_ij = (w, -w)[m_ij]

Bucket and sign are the two parts of one number that is uniform on 0 … 2K - 1, so that they are independent. The primes
p > q are the largest whose products stay below 2³¹, so that runtimes that hold integers in 32 bits, or in doubles,
compute the same. Rows and columns are numbered on, l = 0 … R + C - 1; their fifth power permutes the numbers modulo p
and q (5 divides neither p - 1 nor q - 1) and leaves neighbours no multiples of a common step; it is taken per row and
per column, so that a position costs two products and three remainders.
"""

from __future__ import annotations

from hashlib import sha256
from math import prod

import torch
from torch import Tensor

VERSION = 2
"""Of the hash, the first of a layer's constants. Version 1 took one product modulo 2³¹ - 1, in 64 bits."""
P, Q = 46337, 46327
MOST_LINES = 2**30
"""Rows and columns together; u and v repeat after lcm(p - 1, q - 1) = 1.07e9 of them."""


def constants(seed: int, name: str) -> Tensor:
    """Version, p, q, a, b, s and t of a layer (7,), int32, from SHA-256 of seed and name: the same wherever drawn."""
    digest = sha256(f"{seed}:{name}".encode()).digest()
    a, b, s, t = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    drawn = [VERSION, P, Q, 1 + a % (P - 1), 1 + b % (Q - 1), s % (P - 1), t % (Q - 1)]
    return torch.tensor(drawn, dtype=torch.int32)


def lines(shape: tuple[int, ...]) -> int:
    """R + C of a weight: its first dimension, and all others together."""
    return shape[0] + prod(shape[1:])


def number_of_values(factor: float, size: int) -> int:
    """K for `size` weights; no multiple of q, for m would know y alone."""
    count = max(1, round(factor * size))
    return count - (count % Q == 0)


def places(constants: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """m (R·C,), int32, of a weight of this shape with `count` values K, 2K < p q."""
    of_both = constants[1:].view(3, 2, 1)
    primes, factors, starts = of_both[0], of_both[1], of_both[2]
    numbers = torch.arange(lines(shape), dtype=torch.int32, device=constants.device)
    u = fifth_power((numbers + starts) % (primes - 1) + 1, primes)  # (2, R + C)
    rows, columns = factors * u[:, : shape[0]] % primes, u[:, shape[0] :]
    xy = rows.unsqueeze(2) * columns.unsqueeze(1) % primes.unsqueeze(2)
    found: Tensor = (Q * xy[0] + xy[1]).flatten() % (2 * count)
    return found


def fifth_power(x: Tensor, prime: Tensor) -> Tensor:
    """x⁵ mod p of x in 0 … p - 1."""
    square = x * x % prime
    power: Tensor = square * square % prime * x % prime
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
