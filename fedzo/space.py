"""The values that move on the one copy of the model: updated, copied, restored, compared.

A client is a displacement of the server's weights. Its local steps are made in place, on the same
memory, from one copy of exactly the values that move, which then come back bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zokernels.binding import Binding, BoundParameter
from zokernels.branches import Branches
from zokernels.noise import matrix_shape
from zokernels.subset import Snapshot, fp32

# Elements of scratch at a time where directions are written out (16 MiB).
_TILE = 1 << 22


@dataclass(frozen=True, slots=True)
class Terms:
    """``w <- w + sum_k coeffs[k] z(seeds[k])``, rounded to the weight's dtype where ``ends`` says.

    Attributes:
        seeds: K seeds.
        coeffs: K numbers, used as float32.
        ends: K flags; the last is True.
    """

    seeds: tuple[int, ...] = ()
    coeffs: tuple[float, ...] = ()
    ends: tuple[bool, ...] = ()

    @classmethod
    def one(cls, seeds: Sequence[int], coeffs: Sequence[float]) -> Terms:
        """Terms of one step: one rounding, after the last."""
        if len(seeds) != len(coeffs):
            raise ValueError(
                f"seeds and coeffs must have equal lengths; got {len(seeds)}, {len(coeffs)}"
            )
        ends = tuple(k == len(seeds) - 1 for k in range(len(seeds)))
        return cls(tuple(seeds), tuple(coeffs), ends)


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to the weights: terms for every group of parameters of a :class:`Space`."""

    groups: tuple[Terms, ...]

    @classmethod
    def one(cls, seeds: Sequence[int], coeffs: Sequence[float]) -> Update:
        """One step of all parameters, as one group."""
        return cls((Terms.one(seeds, coeffs),))

    @classmethod
    def path(cls, steps: Iterable[Update]) -> Update:
        """Steps one after another, each with its own rounding: a client's virtual path.

        A step whose coefficients are all 0 is left out, as :meth:`Space.apply_` leaves it out.
        """
        listed = list(steps)
        if not listed:
            return cls(())
        groups = []
        for steps_ in zip(*(step.groups for step in listed), strict=True):
            kept = [terms for terms in steps_ if any(terms.coeffs)]
            groups.append(
                Terms(
                    tuple(s for terms in kept for s in terms.seeds),
                    tuple(c for terms in kept for c in terms.coeffs),
                    tuple(e for terms in kept for e in terms.ends),
                )
            )
        return cls(tuple(groups))

    @classmethod
    def sum(cls, steps: Iterable[Update]) -> Update:
        """Steps added up and rounded once."""
        return cls(tuple(Terms.one(t.seeds, t.coeffs) for t in cls.path(steps).groups))


class Space:
    """The moving values of a model: one group of parameters, or several with terms of their own.

    Args:
        groups: bindings of one model without a parameter in common.
        distribution: ``"gaussian"`` or ``"rademacher"``.
        rounding: of bfloat16 and float16 weights, ``"stochastic"`` or ``"nearest"``.

    Raises:
        ValueError: no group, or groups that overlap or belong to several models.
    """

    def __init__(
        self,
        *groups: Binding,
        distribution: str = "gaussian",
        rounding: str = "stochastic",
    ) -> None:
        if not groups or any(g.model is not groups[0].model for g in groups):
            raise ValueError(f"groups must be bindings of one model; got {len(groups)}")
        names = [p.name for g in groups for p in g.params]
        if len(set(names)) != len(names):
            raise ValueError("groups must not have a parameter in common")
        self.groups = groups
        self.distribution, self.rounding = distribution, rounding
        self._held: tuple[Snapshot, ...] | None = None
        self._fresh = False  # the copy holds what the server has now
        self._moved = False  # the weights are a client's

    @property
    def model(self) -> nn.Module:
        """The one copy."""
        return self.groups[0].model

    @property
    def params(self) -> tuple[BoundParameter, ...]:
        """Every parameter that moves."""
        return tuple(p for g in self.groups for p in g.params)

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""
        return self.groups[0].device

    @property
    def numel(self) -> int:
        """Number of values that move."""
        return sum(g.numel for g in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that move."""
        return sum(v.numel() * v.element_size() for v in self.shapes().values())

    @property
    def fingerprint(self) -> int:
        """64 bits: same names, shapes, dtypes, masks, noise; same meaning of seeds and scalars."""
        digest = hashlib.sha256(f"{self.distribution} {self.rounding}".encode())
        for group in self.groups:
            digest.update(group.fingerprint().encode())
        return int.from_bytes(digest.digest()[:8], "little")

    # --- evaluation -------------------------------------------------------------------------------

    def losses(
        self,
        loss: Callable[[], Tensor],
        seeds: Sequence[int],
        coeffs: Sequence[Sequence[float]],
    ) -> tuple[float, ...]:
        """The loss at every branch, ``L(w + sum_k coeffs[g][k] z(seeds[k]))``.

        Args:
            loss: a function without arguments; gives a 0-d tensor.
            seeds: K seeds.
            coeffs: ``[G][K]``.

        Raises:
            ValueError: the space has several groups.
        """
        if len(self.groups) != 1:
            raise ValueError("losses is for a space with one group of parameters")
        view = Branches(self.groups[0], list(seeds), coeffs, distribution=self.distribution)
        return tuple(view(loss).double().tolist())

    # --- updates ----------------------------------------------------------------------------------

    def apply_(self, update: Update) -> None:
        """Add an update in one fused pass a group; one without a coefficient changes nothing.

        Raises:
            ValueError: the number of groups differs, or a coefficient is not finite in float32.
        """
        if update.groups and len(update.groups) != len(self.groups):
            raise ValueError(
                f"an update must have {len(self.groups)} groups; got {len(update.groups)}"
            )
        for terms in update.groups:
            for coeff in fp32(terms.coeffs):
                if not math.isfinite(coeff):
                    raise ValueError(f"coefficients must be finite in float32; got {coeff!r}")
        for group, terms in zip(self.groups, update.groups, strict=False):
            if any(terms.coeffs):
                group.apply_(
                    terms.seeds,
                    terms.coeffs,
                    ends=terms.ends,
                    distribution=self.distribution,
                    rounding=self.rounding,
                )
        self._fresh = False

    def move_(self, update: Update) -> None:
        """Add an update that :meth:`restore_` takes back."""
        self.leave()
        self.apply_(update)
        self._fresh = True  # the copy is still the server's

    def leave(self) -> None:
        """From here on the weights are a client's: the values that move are copied first."""
        if not self._fresh:
            self._hold()
        self._moved = True

    def renew(self) -> None:
        """The weights are whatever they are now: the copy is taken again before they move."""
        self._fresh = False

    def restore_(self) -> None:
        """The server's weights again, bit for bit."""
        if self._moved and self._held is not None:
            for group, snapshot in zip(self.groups, self._held, strict=True):
                group.restore_(snapshot)
        self._moved = False

    def _hold(self) -> None:
        if self._held is None:
            self._held = self.snapshot()
        else:  # into the same memory
            for group, snapshot in zip(self.groups, self._held, strict=True):
                for p in group.params:
                    live = p.tensor.detach() if p.masked is None else p.values()
                    snapshot.values[p.name].copy_(live)
        self._fresh = True

    # --- values -----------------------------------------------------------------------------------

    def snapshot(self) -> tuple[Snapshot, ...]:
        """A copy of the values that move, group by group."""
        return tuple(group.snapshot() for group in self.groups)

    def values(self) -> dict[str, Tensor]:
        """The values that move by parameter name: live tensors where a parameter moves whole."""
        return {p.name: p.tensor.detach() if p.masked is None else p.values() for p in self.params}

    def load_(self, values: Mapping[str, Tensor]) -> None:
        """Set the values that move.

        Raises:
            ValueError: a name, shape or dtype differs. Nothing is changed.
        """
        mine = {p.name: p for p in self.params}
        if set(values) != set(mine):
            odd = sorted(set(values) ^ set(mine))
            raise ValueError(f"values must be of the parameters that move; differing: {odd[:5]}")
        for name, p in mine.items():
            shape = tuple(p.shape) if p.masked is None else (p.moving,)
            dtype = p.dtype if p.masked is None else torch.float32
            got = values[name]
            if tuple(got.shape) != shape or got.dtype != dtype:
                raise ValueError(
                    f"values[{name!r}] must be {shape} {dtype}; got {tuple(got.shape)} {got.dtype}"
                )
        for group in self.groups:
            own = {p.name: values[p.name] for p in group.params}
            group.restore_(Snapshot(group.fingerprint(), own))
        self._fresh = self._moved = False

    def to_bytes(self) -> bytes:
        """The values that move, as they lie in memory, one parameter after another."""
        return b"".join(
            v.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
            for v in self.values().values()
        )

    def from_bytes(self, data: bytes | memoryview) -> dict[str, Tensor]:
        """Read what :meth:`to_bytes` wrote; nothing is changed.

        Raises:
            ValueError: another number of bytes.
        """
        if len(data) != self.nbytes:
            raise ValueError(f"the moving values are {self.nbytes} bytes; got {len(data)}")
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values: dict[str, Tensor] = {}
        at = 0
        for name, like in self.shapes().items():
            stop = at + like.numel() * like.element_size()
            values[name] = (
                flat[at:stop].clone().view(like.dtype).reshape(like.shape).to(self.device)
            )
            at = stop
        return values

    def shapes(self) -> dict[str, Tensor]:
        """What :meth:`values` gives, without data (on the meta device)."""
        return {
            p.name: torch.empty(p.shape, dtype=p.dtype, device="meta")
            if p.masked is None
            else torch.empty(p.moving, device="meta")
            for p in self.params
        }

    # --- geometry ---------------------------------------------------------------------------------

    def project(self, vectors: Mapping[str, Tensor], seeds: Sequence[int]) -> tuple[float, ...]:
        """Inner products ``<v, z(s)>`` over the values that move.

        Args:
            vectors: by parameter name.
            seeds: K seeds.
        """
        totals = torch.zeros(len(seeds), dtype=torch.float64)
        for group in self.groups:
            own = {p.name: vectors[p.name] for p in group.params if p.name in vectors}
            if own:
                found = group.project(own, list(seeds), distribution=self.distribution)
                totals += found.cpu().double()
        return tuple(totals.tolist())

    def deviations(self, paths: Sequence[Update]) -> tuple[float, ...]:
        """How far every client's displacement is from the mean: ``sum_p ||D_k - mean_j D_j||_2``.

        The sum is over the parameters, ``D_k`` is client ``k``'s whole path. Directions are drawn
        once for all clients, tile by tile, in float32; roundings to a lower precision are left out.

        Args:
            paths: one per client.

        Source: FedMeZO (arXiv 2402.05926), model-difference learning rate.
        """
        totals = [0.0] * len(paths)
        for g, group in enumerate(self.groups):
            parts = [path.groups[g] for path in paths]
            seeds = list(dict.fromkeys(s for part in parts for s in part.seeds))
            column = {seed: k for k, seed in enumerate(seeds)}
            table = torch.zeros(len(paths), len(seeds), dtype=torch.float64)
            for row, part in zip(table, parts, strict=True):
                for seed, coeff in zip(part.seeds, part.coeffs, strict=True):
                    row[column[seed]] += coeff
            coeffs = (table - table.mean(0)).float()
            if not seeds:
                continue
            for p in group.params:
                squares = self._squared_norms(p, seeds, coeffs)
                totals = [t + math.sqrt(s) for t, s in zip(totals, squares.tolist(), strict=True)]
        return tuple(totals)

    def _squared_norms(self, p: BoundParameter, seeds: list[int], coeffs: Tensor) -> Tensor:
        """``||sum_k coeffs[g, k] z_p(seeds[k])||^2``: float64 ``[G]``."""
        rows, cols = p.matrix if p.masked is None else matrix_shape(torch.Size((p.moving,)))
        keys = torch.tensor(seeds, dtype=torch.int64, device=p.device)
        coeffs = coeffs.to(p.device)
        # A row is the smallest tile of a matrix; a vector may be cut anywhere at a multiple of 512.
        height = max(1, _TILE // max(1, cols * len(coeffs)))
        width = cols if rows > 1 else max(512, _TILE // len(coeffs) // 512 * 512)
        total = torch.zeros(len(coeffs), dtype=torch.float64, device=p.device)
        for row in range(0, rows, height):
            for col in range(0, cols, width):
                zeros = torch.zeros(1, 1, device=p.device).expand(
                    min(height, rows - row), min(width, cols - col)
                )
                tile: Tensor = torch.ops.zokernels.displace(
                    zeros, keys, coeffs, p.id, row, col, self.distribution, "nearest", None
                )
                total += tile.double().square().sum(dim=(1, 2))
        return total.cpu()
