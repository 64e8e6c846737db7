"""Seed-space algebra: a vector as large as the model, written as a few (seed, coefficient) pairs.

A displacement is ``sum_k c_k z(s_k)``. Probes, updates, momentum, a client's local run and a
fine-tuned model are all displacements of the base weights. They add, scale and travel as 12 bytes a
term, and are never materialised: :meth:`Displacement.apply_` draws ``z`` inside the fused update.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from zokernels import _targets
from zokernels._targets import Target, fp32
from zokernels.masks import Mask
from zokernels.noise import CONTRACT_VERSION, DISTRIBUTIONS, ROUNDINGS, signed_seed

_MAGIC = b"ZOdp"
_FORMAT = 1
# Magic, format version, distribution code, contract version, number of terms.
_HEADER = struct.Struct("<4sBBHI")
_DISTRIBUTION_CODES = {"gaussian": 0, "rademacher": 1}
_BYTES_PER_TERM = 12


class EncodingError(ValueError):
    """Bytes or a file that cannot be read as what they should be."""


class TruncatedError(EncodingError):
    """Fewer bytes than announced."""


class TrailingBytesError(EncodingError):
    """More bytes than announced."""


class UnknownVersionError(EncodingError):
    """A format or noise contract version this package does not know."""


class NonFiniteError(EncodingError):
    """A NaN or infinite coefficient."""


def check_distribution(distribution: str) -> str:
    """Return ``distribution`` or raise ValueError."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {list(DISTRIBUTIONS)}; got {distribution!r}")
    return distribution


def check_rounding(rounding: str) -> str:
    """Return ``rounding`` or raise ValueError."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {list(ROUNDINGS)}; got {rounding!r}")
    return rounding


class Displacement:
    """An immutable list of (seed, coefficient): the vector ``sum_k coeffs[k] z(seeds[k])``.

    Order matters where the terms are applied to weights (float32 sums are done in this order), so
    two displacements are equal when their terms are equal one by one; :meth:`merged` gives a form
    in which every seed stands once.

    Args:
        seeds: K integers in [-2**63, 2**64).
        coeffs: K finite numbers, rounded to float32.
        distribution: ``"gaussian"`` or ``"rademacher"``: what the seeds stand for.
        version: noise contract version.

    Raises:
        ValueError: lengths differ, a seed does not fit in 64 bits, a coefficient is not finite in
            float32, an unknown distribution.
        UnknownVersionError: a contract version this package does not know.
    """

    __slots__ = ("_coeffs", "_distribution", "_seeds", "_version")

    _seeds: tuple[int, ...]
    _coeffs: tuple[float, ...]
    _distribution: str
    _version: int

    def __init__(
        self,
        seeds: Iterable[int] = (),
        coeffs: Iterable[float] = (),
        *,
        distribution: str = "gaussian",
        version: int = CONTRACT_VERSION,
    ) -> None:
        keys = tuple(signed_seed(int(s)) for s in seeds)
        raw = tuple(float(c) for c in coeffs)
        if len(keys) != len(raw):
            raise ValueError(
                f"seeds and coeffs must have equal lengths; got {len(keys)}, {len(raw)}"
            )
        values = fp32(raw)
        for k, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"coeffs[{k}] must be finite in float32; got {raw[k]!r}")
        check_distribution(distribution)
        if version != CONTRACT_VERSION:
            raise UnknownVersionError(
                f"noise contract version must be {CONTRACT_VERSION}; got {version}"
            )
        object.__setattr__(self, "_seeds", keys)
        object.__setattr__(self, "_coeffs", values)
        object.__setattr__(self, "_distribution", distribution)
        object.__setattr__(self, "_version", version)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Displacement is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple[object, ...]:
        return Displacement.decode, (self.encode(),)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds as signed 64-bit integers."""
        return self._seeds

    @property
    def coeffs(self) -> tuple[float, ...]:
        """The coefficients: float32 values held as Python floats."""
        return self._coeffs

    @property
    def distribution(self) -> str:
        """What the seeds stand for."""
        return self._distribution

    @property
    def version(self) -> int:
        """The noise contract version."""
        return self._version

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self._seeds, self._coeffs, strict=True))

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> Displacement: ...
    def __getitem__(self, index: int | slice) -> tuple[int, float] | Displacement:
        """Term ``index``, or the displacement of a slice of the terms."""
        if isinstance(index, slice):
            return self._like(self._seeds[index], self._coeffs[index])
        return self._seeds[index], self._coeffs[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Displacement):
            return NotImplemented
        return (self._seeds, self._coeffs, self._distribution, self._version) == (
            other._seeds,
            other._coeffs,
            other._distribution,
            other._version,
        )

    def __hash__(self) -> int:
        return hash((self._seeds, self._coeffs, self._distribution, self._version))

    def __repr__(self) -> str:
        terms = ", ".join(f"({s}, {c:.6g})" for s, c in self[:3])
        more = f", ... {len(self) - 3} more" if len(self) > 3 else ""
        return f"Displacement([{terms}{more}], distribution={self._distribution!r})"

    def _like(self, seeds: Iterable[int], coeffs: Iterable[float]) -> Displacement:
        return Displacement(seeds, coeffs, distribution=self._distribution, version=self._version)

    def _same_kind(self, other: Displacement) -> None:
        if other._distribution != self._distribution:
            raise ValueError(
                f"displacements must have one distribution; got {self._distribution!r} and "
                f"{other._distribution!r}"
            )

    def __add__(self, other: Displacement) -> Displacement:
        """The sum: the terms of both, one list after the other."""
        if not isinstance(other, Displacement):
            return NotImplemented
        self._same_kind(other)
        return self._like(self._seeds + other._seeds, self._coeffs + other._coeffs)

    def __sub__(self, other: Displacement) -> Displacement:
        if not isinstance(other, Displacement):
            return NotImplemented
        return self + -other

    def __neg__(self) -> Displacement:
        return self._like(self._seeds, (-c for c in self._coeffs))

    def __mul__(self, factor: float) -> Displacement:
        """Every coefficient times ``factor``, the product rounded to float32."""
        if isinstance(factor, Displacement) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite; got {factor!r}")
        return self._like(self._seeds, (c * factor for c in self._coeffs))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Displacement:
        if isinstance(divisor, Displacement) or not isinstance(divisor, (int, float)):
            return NotImplemented
        if divisor == 0 or not math.isfinite(divisor):
            raise ValueError(f"divisor must be finite and not 0; got {divisor!r}")
        return self._like(self._seeds, (c / divisor for c in self._coeffs))

    def scale(self, factor: float) -> Displacement:
        """The displacement times a number; the same as ``self * factor``."""
        return self * factor

    @classmethod
    def concatenate(
        cls, parts: Iterable[Displacement], *, distribution: str | None = None
    ) -> Displacement:
        """The sum of several displacements as one list, linear in the number of terms.

        Args:
            parts: displacements of one distribution.
            distribution: of the result when ``parts`` is empty (default ``"gaussian"``).

        Raises:
            ValueError: the distributions differ.
        """
        listed = list(parts)
        kind = distribution or (listed[0]._distribution if listed else "gaussian")
        seeds: list[int] = []
        coeffs: list[float] = []
        total = cls(distribution=kind)
        for part in listed:
            total._same_kind(part)
            seeds += part._seeds
            coeffs += part._coeffs
        return cls(seeds, coeffs, distribution=kind)

    def merged(self, *, drop_zeros: bool = False) -> Displacement:
        """Every seed once, with its coefficients summed exactly and rounded to float32 once.

        Merging changes rounding: applied to weights, the merged form agrees with the original to
        float32 accuracy, not bit for bit. Seeds stay in the order of their first occurrence.

        Args:
            drop_zeros: leave out seeds whose coefficients sum to 0.

        Raises:
            ValueError: a sum is beyond float32.
        """
        sums: dict[int, list[float]] = {}
        for seed, coeff in self:
            sums.setdefault(seed, []).append(coeff)
        terms = [(s, math.fsum(cs)) for s, cs in sums.items()]
        if drop_zeros:
            terms = [(s, c) for s, c in terms if c != 0.0]
        return self._like((s for s, _ in terms), (c for _, c in terms))

    def norm_estimate(self, numel: int) -> float:
        """Expected Euclidean length over ``numel`` elements: ``sqrt(numel * sum_s c_s**2)``.

        Directions of different seeds are independent with unit variance, so after merging equal
        seeds the expected squared length is exact; the relative deviation of one draw is about
        ``sqrt(1 / (2 numel))``.

        Args:
            numel: number of elements displaced, at least 0.

        Raises:
            ValueError: ``numel`` is negative.
        """
        if numel < 0:
            raise ValueError(f"numel must not be negative; got {numel}")
        sums: dict[int, list[float]] = {}
        for seed, coeff in self:
            sums.setdefault(seed, []).append(coeff)
        return math.sqrt(numel) * math.hypot(*(math.fsum(cs) for cs in sums.values()))

    def tensors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """``(seeds, coeffs)``: int64 ``[K]`` and float32 ``[K]``."""
        return (
            torch.tensor(self._seeds, dtype=torch.int64, device=device),
            torch.tensor(self._coeffs, dtype=torch.float32, device=device),
        )

    @classmethod
    def from_tensors(
        cls, seeds: Tensor, coeffs: Tensor, *, distribution: str = "gaussian"
    ) -> Displacement:
        """The displacement of seed and coefficient vectors.

        Args:
            seeds: int64 ``[K]``.
            coeffs: floating point ``[K]``; rounded to float32.
            distribution: what the seeds stand for.

        Raises:
            TypeError: another dtype or shape.
            ValueError: lengths differ, or a coefficient is not finite.
        """
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(
                f"seeds must be an int64 vector; got {seeds.dtype} of shape {tuple(seeds.shape)}"
            )
        if not coeffs.is_floating_point() or coeffs.dim() != 1:
            raise TypeError(
                f"coeffs must be a floating-point vector; got {coeffs.dtype} of shape "
                f"{tuple(coeffs.shape)}"
            )
        return cls(seeds.tolist(), coeffs.tolist(), distribution=distribution)

    def encode(self) -> bytes:
        """The displacement as bytes: a 12-byte header, then K seeds and K coefficients.

        All little-endian. Header: magic ``ZOdp``, format version (uint8), distribution (uint8,
        0 gaussian, 1 rademacher), noise contract version (uint16), K (uint32). Then K int64 seeds
        and K float32 coefficients: 12 bytes a term.
        """
        header = _HEADER.pack(
            _MAGIC,
            _FORMAT,
            _DISTRIBUTION_CODES[self._distribution],
            self._version,
            len(self._seeds),
        )
        return header + _pack("q", self._seeds) + _pack("f", self._coeffs)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Displacement:
        """Read what :meth:`encode` wrote.

        Raises:
            EncodingError: the bytes do not start like a displacement, or name an unknown
                distribution.
            UnknownVersionError: a format or contract version this package does not know.
            TruncatedError, TrailingBytesError: fewer or more bytes than the header announces.
            NonFiniteError: a coefficient is NaN or infinite.
        """
        view = memoryview(data).cast("B")
        if bytes(view[:4]) != _MAGIC[: len(view)] or not len(view):
            raise EncodingError(
                f"data is no encoded displacement: it must start with {_MAGIC!r}; got "
                f"{bytes(view[:4])!r}"
            )
        if len(view) < _HEADER.size:
            raise TruncatedError(f"header needs {_HEADER.size} bytes; got {len(view)}")
        _, form, code, version, count = _HEADER.unpack_from(view)
        if form != _FORMAT:
            raise UnknownVersionError(f"displacement format must be {_FORMAT}; got {form}")
        if version != CONTRACT_VERSION:
            raise UnknownVersionError(
                f"noise contract version must be {CONTRACT_VERSION}; got {version}"
            )
        names = {c: name for name, c in _DISTRIBUTION_CODES.items()}
        if code not in names:
            raise EncodingError(f"distribution code must be one of {sorted(names)}; got {code}")
        size = _HEADER.size + count * _BYTES_PER_TERM
        if len(view) < size:
            raise TruncatedError(f"{count} terms need {size} bytes; got {len(view)}")
        if len(view) > size:
            raise TrailingBytesError(
                f"{count} terms need {size} bytes; got {len(view) - size} more after them"
            )
        split = _HEADER.size + 8 * count
        seeds = tuple(_native("q", view[_HEADER.size : split]))
        coeffs = tuple(_native("f", view[split:]))
        for k, value in enumerate(coeffs):
            if not math.isfinite(value):
                raise NonFiniteError(f"coefficient {k} must be finite; got {value!r}")
        return cls(seeds, coeffs, distribution=names[code], version=version)

    def apply_(
        self,
        model: Target,
        *,
        rounding: str = "stochastic",
        scale: Mapping[str, float] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """Add the displacement to weights in one fused pass, with one rounding at the end.

        ``w <- round(w + sum_k c_k z(s_k))``, accumulated in float32 in the order of the terms.

        Args:
            model: module (its parameters with ``requires_grad``), Binding, or mapping of names to
                tensors such as a state dict.
            rounding: ``"stochastic"`` (bits from the last term's seed) or ``"nearest"``; without
                effect on float32 weights.
            scale: factors on the coefficients of single parameters, by name; 1 for the others.
            mask: only its elements move; for a Binding None, it has its own.

        Raises:
            ValueError: unknown rounding, a scale that is not finite, names no parameter or takes a
                coefficient beyond float32.
            TypeError: ``model`` cannot hold weights.
            ModelChangedError: a given binding no longer fits its model.
        """
        check_rounding(rounding)
        bound = _targets.resolve(model, mask)
        factors = _check_scale(scale, bound)
        coeffs = {f: (self * f)._coeffs for f in {1.0, *factors.values()}}
        ends = [k == len(self) - 1 for k in range(len(self))]
        for factor, values in coeffs.items():
            members = [p for p in bound.params if factors.get(p.name, 1.0) == factor]
            if members and not _targets.idle(values, None):
                _targets.update_(
                    members, self._seeds, values, None, ends, self._distribution, rounding
                )


def _check_scale(scale: Mapping[str, float] | None, bound: _targets.Bound) -> dict[str, float]:
    factors = {name: float(f) for name, f in (scale or {}).items()}
    for name, factor in factors.items():
        if name not in bound.by_name:
            raise ValueError(f"scale names {name!r}, which is no parameter of the model")
        if not math.isfinite(factor):
            raise ValueError(f"scale[{name!r}] must be finite; got {factor!r}")
    return factors


def _pack(code: str, values: Sequence[float] | Sequence[int]) -> bytes:
    packed = array(code, values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _native(code: str, data: memoryview) -> Sequence[Any]:
    """Little-endian data as a sequence of Python numbers."""
    unpacked: array[Any] = array(code)
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
