"""The trained subset: the values that move, and what can be done with them.

A parameter moves whole, or only at the elements of a mask (:mod:`zokernels.masks`). The masked
elements are a parameter of their own as far as noise goes: a vector of ``n`` elements in the order
of their flat indices, under the id of the parameter. They are trained in float32: a low-precision
weight holds their rounding to nearest, and a *shadow* of ``n`` float32 numbers holds the values.
The shadow of an element counts as long as its rounding is what the weight holds; where something
else wrote the weight, the weight counts.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zokernels.deferred import placed
from zokernels.noise import CONTRACT_VERSION, DISTRIBUTIONS, ROUNDINGS, matrix_shape, signed_seed
from zokernels.reference import scatter_


class ModelChangedError(RuntimeError):
    """A bound model's parameters were replaced, resized, moved or converted."""


class SnapshotError(ValueError):
    """A snapshot of another trained subset."""


@dataclass(frozen=True, eq=False)
class Masked:
    """The elements of a parameter that move.

    Attributes:
        indices: int64 ``[n]``, sorted flat indices, on the parameter's device.
        shadow: float32 ``[n]``, see the module's text.
        digest: of the indices, hexadecimal.
    """

    indices: Tensor
    shadow: Tensor
    digest: str
    _parts: dict[tuple[int, int], tuple[int, Masked]] = field(default_factory=dict, repr=False)

    def part(self, start: int, stop: int) -> tuple[int, Masked]:
        """The elements ``start`` to ``stop - 1`` of the parameter, counted from ``start``.

        Where they begin in the list is read back to the host once and kept, so that a step over
        views of a parameter (fused experts) does not wait for the device.

        Returns:
            The position in this list of the first of them, and their own list, with a view of the
            shadow.
        """
        found = self._parts.get((start, stop))
        if found is None:
            ends = torch.tensor([start, stop], device=self.indices.device)
            low, high = torch.searchsorted(self.indices, ends).tolist()
            inside = Masked(self.indices[low:high] - start, self.shadow[low:high], self.digest)
            found = self._parts[start, stop] = low, inside
        return found


@dataclass(frozen=True)
class BoundParameter:
    """One trainable parameter and where the module tree holds it."""

    name: str
    id: int
    tensor: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    places: tuple[tuple[dict[str, nn.Parameter | None], str], ...]
    masked: Masked | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns in the noise contract, of the whole parameter."""
        return matrix_shape(self.shape)

    @property
    def moving(self) -> int:
        """Number of elements that move."""
        return self.shape.numel() if self.masked is None else self.masked.indices.numel()

    def values(self) -> Tensor:
        """A copy of what moves: the parameter, or float32 ``[n]``."""
        if self.masked is None:
            return self.tensor.detach().clone()
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        values: Tensor = torch.ops.zokernels.sparse_displace(
            self.tensor.detach(),
            self.masked.indices,
            self.masked.shadow,
            nothing,
            torch.empty((1, 0), dtype=torch.float32, device=self.device),
            self.id,
            0,
            "gaussian",
        )
        return values[0]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of what moves.

    Attributes:
        fingerprint: of the trained subset it was taken from.
        values: by parameter name, of the parameter's shape and dtype, or float32 ``[n]``.
    """

    fingerprint: str
    values: Mapping[str, Tensor]


def fp32(values: Iterable[float]) -> tuple[float, ...]:
    """Round numbers to float32 (nearest, overflow to infinity), as Python floats."""
    return tuple(array("f", [float(v) for v in values]))


def on(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device."""
    held = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return placed(held, device)


def update_(
    params: Iterable[BoundParameter],
    seeds: Sequence[int] | Tensor,
    coeffs: Sequence[float] | Tensor,
    decay: Sequence[float] | Tensor | None,
    ends: Sequence[bool] | Tensor | None,
    distribution: str,
    rounding: str,
) -> None:
    """One fused update of every parameter, one op call a device and kind.

    Args:
        params: parameters that get the same terms.
        seeds: K signed 64-bit seeds.
        coeffs: K coefficients, rounded to float32.
        decay: K factors applied to the weight before each term, or None for 1.
        ends: K flags: round to the parameter's dtype after this term. The last must be True. None:
            after every term. Of no consequence for masked parameters, which are trained in float32.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        rounding: ``"nearest"`` or ``"stochastic"``; of no consequence for masked parameters.

    Seeds, coefficients, decay and ends may be tensors on the device, so that nothing waits for it.
    """
    alike: dict[tuple[torch.device, bool], list[BoundParameter]] = {}
    for p in params:
        alike.setdefault((p.tensor.device, p.masked is not None), []).append(p)
    with torch.no_grad():
        for (device, sparse), members in alike.items():
            tensors = [p.tensor for p in members]
            ids = [p.id for p in members]
            keys = on(seeds, torch.int64, device)
            values = on(coeffs, torch.float32, device)
            factors = None if decay is None else on(decay, torch.float32, device)
            if sparse:
                masked = [p.masked for p in members if p.masked is not None]
                torch.ops.zokernels.sparse_update_(
                    tensors,
                    [m.indices for m in masked],
                    [m.shadow for m in masked],
                    keys,
                    values,
                    factors,
                    ids,
                    distribution,
                )
                continue
            torch.ops.zokernels.update_(
                tensors,
                keys,
                values,
                factors,
                None if ends is None else on(ends, torch.bool, device),
                ids,
                [],
                [],
                distribution,
                rounding,
            )


class Subset:
    """Bound parameters as one vector: update, inner products, copy and restore of what moves."""

    params: tuple[BoundParameter, ...]

    def check(self) -> None:
        """Raise :class:`ModelChangedError` when the parameters are no longer those bound."""
        raise NotImplementedError

    @property
    def numel(self) -> int:
        """Number of elements that move."""
        return sum(p.moving for p in self.params)

    def fingerprint(self) -> str:
        """Hexadecimal digest of names, shapes, dtypes, masks and the noise contract's version.

        Equal fingerprints: the same seeds and numbers mean the same updates.
        """
        digest = hashlib.sha256(f"zokernels subset {CONTRACT_VERSION}".encode())
        for p in self.params:
            mask = "" if p.masked is None else p.masked.digest
            digest.update(repr((p.name, tuple(p.shape), str(p.dtype), mask)).encode())
        return digest.hexdigest()

    def apply_(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        *,
        decay: Sequence[float] | None = None,
        ends: Sequence[bool] | None = None,
        distribution: str = "gaussian",
        rounding: str = "stochastic",
    ) -> None:
        """Fused update: ``w = round(w decay_k + coeffs[k] z(seeds[k]))`` for every k in order.

        One pass over the weights, bit for bit what K separate calls would give.

        Args:
            seeds: K integers in [-2**63, 2**64).
            coeffs: K numbers, finite in float32.
            decay: K numbers, finite in float32, or None for 1.
            ends: K flags: round to the parameter's dtype after this term; the last must be True.
                None: after every term. Masked parameters are float32 underneath and need none.
            distribution: ``"gaussian"`` or ``"rademacher"``.
            rounding: of bfloat16 and float16 parameters that move whole: ``"stochastic"`` or
                ``"nearest"``.

        Raises:
            ValueError: lengths differ, a number is not finite, an unknown name. Nothing is changed.
            ModelChangedError: the parameters are not those that were bound.
        """
        keys = [signed_seed(int(s)) for s in seeds]
        count = len(keys)
        flags = [True] * count if ends is None else [bool(e) for e in ends]
        rows = {"coeffs": fp32(coeffs), "decay": None if decay is None else fp32(decay)}
        for label, row in (*rows.items(), ("ends", flags)):
            if row is not None and len(row) != count:
                raise ValueError(f"{label} must have {count} entries, one a seed; got {len(row)}")
        for label, values in rows.items():
            for k, value in enumerate(values or ()):
                if not math.isfinite(value):
                    raise ValueError(f"{label}[{k}] must be finite in float32; got {value}")
        if flags and not flags[-1]:
            raise ValueError("ends[-1] must be True: the last term ends in a rounding")
        _choice("distribution", distribution, DISTRIBUTIONS)
        _choice("rounding", rounding, ROUNDINGS)
        self.check()
        if keys:
            update_(
                self.params,
                keys,
                rows["coeffs"] or (),
                rows["decay"],
                flags,
                distribution,
                rounding,
            )

    def project(
        self,
        vectors: Mapping[str, Tensor],
        seeds: Sequence[int] | Tensor,
        *,
        distribution: str = "gaussian",
    ) -> Tensor:
        """Inner products ``<v, z(seeds[k])>`` over what moves, all seeds in one pass.

        Args:
            vectors: by parameter name, floating point: of the parameter's shape (of a masked one
                the masked elements count) or, for a masked one, ``[n]``. Parameters left out count
                as zero.
            seeds: K integers, or int64 ``[K]``.
            distribution: ``"gaussian"`` or ``"rademacher"``.

        Returns:
            float32 ``[K]``, summed in float64, on the first parameter's device.

        Raises:
            ValueError: a name is no parameter that moves, or a shape fits neither form.
        """
        known = {p.name: p for p in self.params}
        unknown = [name for name in vectors if name not in known]
        if unknown:
            raise ValueError(f"vectors must name parameters that move; unknown: {unknown[:5]}")
        _choice("distribution", distribution, DISTRIBUTIONS)
        self.check()
        home = self.params[0].device
        keys = (
            seeds.to(home)
            if isinstance(seeds, Tensor)
            else torch.tensor([signed_seed(int(s)) for s in seeds], dtype=torch.int64, device=home)
        )
        total = torch.zeros(keys.shape, dtype=torch.float32, device=home)
        by_device: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for name, vector in vectors.items():
            p = known[name]
            by_device.setdefault(p.device, []).append((_compact(p, vector), p.id))
        for device, members in by_device.items():
            sums: Tensor = torch.ops.zokernels.project(
                [v for v, _ in members],
                keys.to(device),
                [i for _, i in members],
                [],
                [],
                distribution,
            )
            total = sums.to(home) if len(by_device) == 1 else total + sums.to(home)
        return total

    def snapshot(self) -> Snapshot:
        """A copy of exactly the values that move (the masked ones only, under a mask).

        Raises:
            ModelChangedError: the parameters are not those that were bound.
        """
        self.check()
        return Snapshot(self.fingerprint(), {p.name: p.values() for p in self.params})

    def restore_(self, snapshot: Snapshot) -> None:
        """Put the values of a snapshot back, bit for bit.

        Raises:
            SnapshotError: it was taken from another trained subset. Nothing is changed.
            ModelChangedError: the parameters are not those that were bound.
        """
        self.check()
        if snapshot.fingerprint != self.fingerprint():
            raise SnapshotError(
                f"the snapshot is of the trained subset {snapshot.fingerprint[:12]}; this one is "
                f"{self.fingerprint()[:12]} (names, shapes, dtypes or masks differ)"
            )
        with torch.no_grad():
            for p in self.params:
                values = snapshot.values[p.name]
                if p.masked is None:
                    p.tensor.copy_(values)
                else:
                    p.masked.shadow.copy_(values)
                    scatter_(p.tensor, p.masked.indices, p.masked.shadow)


def _compact(p: BoundParameter, vector: Tensor) -> Tensor:
    """A vector over what moves of a parameter."""
    if not vector.is_floating_point():
        raise ValueError(f"vectors[{p.name!r}] must be floating point; got {vector.dtype}")
    vector = vector.detach().to(p.device)
    if vector.dtype == torch.float64:
        vector = vector.float()
    if p.masked is not None and tuple(vector.shape) == (p.moving,) and vector.shape != p.shape:
        return vector
    if vector.shape != p.shape:
        also = f" or {(p.moving,)}" if p.masked is not None else ""
        raise ValueError(
            f"vectors[{p.name!r}] must have shape {tuple(p.shape)}{also}; got {tuple(vector.shape)}"
        )
    return vector if p.masked is None else torch.take(vector, p.masked.indices)


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}; got {value!r}")
