"""Orthogonal matrices that spread outliers: randomized Hadamard rotations of any size, applied without being formed.

A rotation is ``Q = diag(signs) · blockdiag(H, ..., H)`` with H an orthogonal Hadamard matrix (entries ``± 1 / sqrt(block)``) that
is itself a Kronecker product of small factors, so that ``x Q`` costs the sum of the factors' sizes a value and not `size`.
Random signs make ``x Q`` of any fixed x close to Gaussian, with a largest magnitude near ``sqrt(2 log n)`` times its root mean
square (QuIP#, arXiv 2402.04396, section 3; QuaRot, arXiv 2404.00456, section 3).

Which H: Sylvester's for a power of two; otherwise a Kronecker product with one of Paley's two (order q + 1 for a prime
q = 3 mod 4, order 2 (q + 1) for a prime q = 1 mod 4), e.g. 12, 20, 28, 36, 44: 768 = 12 · 64 and 1408 = 44 · 32 are one block.
Where neither exists within the size, as for 2 · odd, blocks of the largest power of two that divides it; of an odd size
that is 1, and the rotation only changes signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

ONLINE_LIMIT = 128
"""Largest block of the transform that is computed while the model runs."""

_MAX_PALEY = 512
_SYLVESTER = 64
"""Powers of two are split into factors up to here: few passes over the data, each a small matrix product."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [size, size], in the convention of row vectors: a vector x becomes ``x Q``.

    Attributes:
        size: n.
        factors: float64 matrices with entries ± 1 whose Kronecker product is sqrt(block) · H.
        signs: float64 [size] of ± 1, or None for all ones.
    """

    size: int
    factors: tuple[torch.Tensor, ...]
    signs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % self.block:
            raise ValueError(f"blocks of {self.block} in a rotation of size {self.size}")
        if self.signs is not None and tuple(self.signs.shape) != (self.size,):
            raise ValueError(f"signs {list(self.signs.shape)} of a rotation of size {self.size}")

    @property
    def block(self) -> int:
        """Size of the diagonal blocks; channels of different blocks do not mix."""
        return math.prod(len(factor) for factor in self.factors)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` along the last axis, in x's dtype: [..., size] to [..., size]."""
        self._check(x)
        signed = x if self.signs is None else x * self.signs.to(x)
        return _times(signed, [factor.t() for factor in self.factors])

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q^T`` along the last axis, in x's dtype; undoes :meth:`apply`."""
        self._check(x)
        out = _times(x, list(self.factors))
        return out if self.signs is None else out * self.signs.to(x)

    def matrix(self) -> torch.Tensor:
        """Q, float64 [size, size]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def repeated(self, times: int) -> Rotation:
        """The block-diagonal rotation of size ``times · size`` with this one in every block (one for each attention head)."""
        return Rotation(self.size * times, self.factors, None if self.signs is None else self.signs.repeat(times))

    def _check(self, x: torch.Tensor) -> None:
        if not x.ndim or x.shape[-1] != self.size:
            raise ValueError(f"a rotation of size {self.size} on {list(x.shape)}")


def randomized_hadamard(size: int, seed: int) -> Rotation:
    """A Hadamard matrix behind random signs, the same for the same size and seed; blocks as the module's text says.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a rotation of size {size}")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return Rotation(size, _factors(size), signs)


def block_hadamard(size: int, limit: int = ONLINE_LIMIT) -> Rotation:
    """Sylvester blocks of the largest power of two that divides `size` and is at most `limit`, without signs; its own inverse.

    This is the one that runs in the model, before a projection's int8 quantization (QuaRot's online Hadamard, arXiv 2404.00456,
    section 4, on blocks).

    Raises:
        ValueError: a size or a limit below 1.
    """
    return Rotation(size, _powers_of_two(online_block(size, limit)))


def online_block(size: int, limit: int = ONLINE_LIMIT) -> int:
    """The block of :func:`block_hadamard`; 1 where there is nothing to mix."""
    if size < 1 or limit < 1:
        raise ValueError(f"blocks of at most {limit} in a size of {size}")
    return min(size & -size, 1 << (limit.bit_length() - 1))


def _times(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    """Multiply the last axis, seen as blocks of the factors' Kronecker product, by that product over sqrt(block)."""
    lead, block = x.shape, math.prod(len(factor) for factor in factors)
    if block == 1:
        return x
    right = block
    for factor in factors:
        right //= len(factor)
        # This factor's axis in the middle: everything left of it is batch, everything right of it moves along.
        rows = x.reshape(-1, len(factor), right)
        x = rows.squeeze(-1) @ factor.to(x).t() if right == 1 else factor.to(x) @ rows
    return (x * block**-0.5).reshape(lead)


@lru_cache(maxsize=64)
def _factors(size: int) -> tuple[torch.Tensor, ...]:
    power = size & -size
    odd = size // power
    if odd == 1:
        return _powers_of_two(size)
    order = 4 * odd
    while order <= min(size, _MAX_PALEY):
        if size % order == 0:
            paley = _paley(order)
            if paley is not None:
                return (*_powers_of_two(size // order), paley)
        order *= 2
    return _powers_of_two(power)


@lru_cache(maxsize=64)
def _powers_of_two(size: int) -> tuple[torch.Tensor, ...]:
    """Sylvester's matrix of a power of two as factors of 64 and less."""
    factors = []
    while size > _SYLVESTER:
        factors.append(_sylvester(_SYLVESTER))
        size //= _SYLVESTER
    return (*factors, _sylvester(size))


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _paley(order: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix of this order, or None where his constructions over prime fields give none."""
    if _is_prime(order - 1) and order % 4 == 0:
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, skew=True)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _conference(order // 2 - 1, skew=False)
        eye = torch.eye(order // 2, dtype=torch.float64)
        return torch.cat((torch.cat((conference + eye, conference - eye), 1), torch.cat((conference - eye, -conference - eye), 1)))
    return None


def _conference(prime: int, skew: bool) -> torch.Tensor:
    """Paley's conference matrix [prime + 1, prime + 1]: zero diagonal, ± 1 elsewhere, C C^T = prime · I."""
    index = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[index**2 % prime] = 1.0
    character[0] = 0.0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = -1.0 if skew else 1.0
    matrix[1:, 1:] = character[(index.unsqueeze(1) - index) % prime]
    return matrix


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % factor for factor in range(2, math.isqrt(value) + 1))
