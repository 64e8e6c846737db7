"""Masks: which elements of which parameters move in a sparse zeroth-order run.

A mask is a sorted list of flat indices for each parameter. It is made once (by squared gradients on
calibration text, by magnitude, at random), saved, and used on any machine that holds the model::

    mask = zo.Mask.calibrate(model, batches, 1e-3)
    mask.save("mask.safetensors")
    opt = zo.MeZO(model, lr=1e-3, eps=1e-3, mask=zo.Mask.load("mask.safetensors"))

Noise is keyed by the position in the list (:mod:`zokernels.subset`), so a direction costs ``nnz``
normals. A direction under a mask is not the dense direction restricted to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as encode_safetensors
from torch import Tensor, nn

from zokernels._files import write_atomically
from zokernels.calibration import squared_gradients
from zokernels.noise import CONTRACT_VERSION, parameter_id, signed_seed
from zokernels.selection import Selection, selected, unwrap

SCOPES = ("global", "layer", "given")

_KIND = "zokernels.mask"
_FORMAT = 1
_MASK64 = (1 << 64) - 1


class MaskFileError(ValueError):
    """A file that is no mask, is damaged, or has a version this package does not know."""


class MaskMismatchError(ValueError):
    """The mask does not fit the model; the message names what differs."""


class Mask:
    """Sorted flat indices of the elements that move, by qualified parameter name.

    Args:
        indices: int64 vectors (any device; kept on the CPU), strictly increasing. A parameter that
            was a candidate and has no element that moves may have an empty one.
        shapes: shape of every parameter in ``indices``.
        scope: how the elements were ranked: ``"global"``, ``"layer"`` (per parameter), or
            ``"given"``.

    Raises:
        TypeError: indices that are not int64 vectors.
        ValueError: names differ, an index out of range or out of order, no index at all.
    """

    def __init__(
        self,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        *,
        scope: str = "given",
    ) -> None:
        if set(indices) != set(shapes):
            odd = sorted(set(indices) ^ set(shapes))
            raise ValueError(f"indices and shapes must have the same names; differing: {odd[:5]}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {list(SCOPES)}; got {scope!r}")
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(shapes[n]) for n in indices}
        self.indices: dict[str, Tensor] = {}
        self.scope = scope
        for name, given in indices.items():
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"indices[{name!r}] must be an int64 vector; got {type(given).__name__}"
                )
            if given.dtype != torch.int64 or given.dim() != 1:
                raise TypeError(
                    f"indices[{name!r}] must be an int64 vector; got {given.dtype} of shape "
                    f"{tuple(given.shape)}"
                )
            kept = given.detach().to("cpu", copy=True).contiguous()
            size = math.prod(self.shapes[name])
            if kept.numel() and (int(kept[0]) < 0 or int(kept[-1]) >= size):
                raise ValueError(
                    f"indices[{name!r}] must be in [0, {size}), sorted; got {int(kept[0])} first "
                    f"and {int(kept[-1])} last"
                )
            if not bool((kept[1:] > kept[:-1]).all()):
                raise ValueError(f"indices[{name!r}] must be strictly increasing")
            self.indices[name] = kept
        if self.nnz == 0:
            raise ValueError("a mask must have at least one element that moves; got none")
        self._digests = {
            name: hashlib.sha256(t.numpy().astype("<i8").tobytes()).hexdigest()
            for name, t in self.indices.items()
        }

    # --- what it is -------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Number of elements that move."""
        return sum(t.numel() for t in self.indices.values())

    @property
    def numel(self) -> int:
        """Number of elements of all candidate parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """``nnz / numel``."""
        return self.nnz / self.numel

    def touches(self, name: str) -> bool:
        """Whether an element of a parameter moves."""
        return name in self.indices and self.indices[name].numel() > 0

    def digest(self, name: str) -> str:
        """SHA-256 of one parameter's indices (little-endian int64), hexadecimal."""
        return self._digests[name]

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and indices, hexadecimal; order does not matter."""
        entries = sorted((n, self.shapes[n], self._digests[n]) for n in self.indices)
        return hashlib.sha256(repr((_KIND, entries)).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return (
            f"Mask({self.nnz:,} of {self.numel:,} elements in {len(self.indices)} parameters, "
            f"density {self.density:.4g}, scope={self.scope!r}, {self.fingerprint()[:12]})"
        )

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise when the mask does not fit named parameters.

        Raises:
            MaskMismatchError: the message names the parameters that are missing or have another
                shape.
        """
        missing = [n for n in self.shapes if n not in parameters]
        if missing:
            raise MaskMismatchError(
                f"the mask has {len(missing)} parameters that the model has not: {missing[:5]}"
            )
        differing = [
            f"{n!r} {shape} in the mask, {tuple(parameters[n].shape)} in the model"
            for n, shape in self.shapes.items()
            if tuple(parameters[n].shape) != shape
        ]
        if differing:
            raise MaskMismatchError(
                f"the mask has {len(differing)} parameters of other shapes: "
                f"{'; '.join(differing[:5])}"
            )

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: one int64 vector a parameter; what else there is as metadata.

        Raises:
            OSError: the file cannot be written; an existing one is then untouched.
        """
        metadata = {
            "kind": _KIND,
            "format": str(_FORMAT),
            "contract_version": str(CONTRACT_VERSION),
            "scope": self.scope,
            "shapes": json.dumps(list(self.shapes.items())),
            "fingerprint": self.fingerprint(),
        }
        write_atomically(path, encode_safetensors(dict(self.indices), metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read what :meth:`save` wrote.

        Raises:
            MaskFileError: no safetensors file, not a mask, truncated or changed, or of an unknown
                format or noise contract version.
            OSError: the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            tensors = parse_safetensors(data)
            # The header's length, then the header: metadata comes with no tensor.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = header.get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise MaskFileError(f"{path} is no whole safetensors file: {error}") from error
        if metadata.get("kind") != _KIND:
            raise MaskFileError(
                f"{path} is no mask: its metadata must have kind {_KIND!r}; got "
                f"{metadata.get('kind')!r}"
            )
        for key, known in (("format", _FORMAT), ("contract_version", CONTRACT_VERSION)):
            if metadata.get(key) != str(known):
                raise MaskFileError(f"{path}: {key} must be {known}; got {metadata.get(key)!r}")
        try:
            shapes = {
                name: tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"])
            }
            mask = cls({n: tensors[n] for n in shapes}, shapes, scope=metadata["scope"])
        except (KeyError, TypeError, ValueError) as error:
            raise MaskFileError(f"{path} is damaged: {error}") from error
        if set(tensors) != set(shapes) or mask.fingerprint() != metadata.get("fingerprint"):
            raise MaskFileError(f"{path} is damaged: its fingerprint does not fit its content")
        return mask

    # --- how it is made ---------------------------------------------------------------------------

    @classmethod
    def full(cls, model: nn.Module, *, params: Selection = None) -> Mask:
        """Every element of the selected parameters (8 bytes each: for small models and tests).

        Args:
            model: any module.
            params: as for the other constructors.
        """
        chosen = _candidates(model, params)
        return cls(
            {n: torch.arange(p.numel()) for n, p in chosen.items()}, _shapes(chosen), scope="given"
        )

    @classmethod
    def random(
        cls,
        model: nn.Module,
        density: float,
        *,
        seed: int,
        params: Selection = None,
        scope: str = "global",
    ) -> Mask:
        """``round(density * numel)`` distinct elements, uniformly; the same on every machine.

        Args:
            model: any module; only names and shapes matter.
            density: in (0, 1].
            seed: 64 bits.
            params: names or a predicate; None for the transformer's linear weights
                (:func:`linear_weights`).
            scope: ``"global"`` draws from all candidates at once, ``"layer"`` from each parameter
                its share.

        Raises:
            ValueError: an argument out of range, no candidate.
        """
        chosen = _candidates(model, params)
        shapes = _shapes(chosen)
        root = signed_seed(seed) & _MASK64
        if _scope(scope) == "layer":
            counts = _shares(shapes, density)
            return cls(
                {
                    n: torch.from_numpy(_sample(p.numel(), counts[n], root | parameter_id(n) << 64))
                    for n, p in chosen.items()
                },
                shapes,
                scope=scope,
            )
        total = sum(p.numel() for p in chosen.values())
        places = _sample(total, _count(density, total), root)
        return cls(_split(places, shapes), shapes, scope=scope)

    @classmethod
    def magnitude(
        cls,
        model: nn.Module,
        density: float,
        *,
        params: Selection = None,
        scope: str = "global",
    ) -> Mask:
        """The elements of largest ``|w|``; of equal ones the first. (Weight-Magnitude.)

        Args:
            model: any module; one parameter at a time is read.
            density: in (0, 1].
            params, scope: see :meth:`random`.

        Raises:
            ValueError: an argument out of range, no candidate, a weight that is NaN.
        """
        chosen = _candidates(model, params)
        return _ranked(
            ((n, p.detach().abs().float()) for n, p in chosen.items()),
            _shapes(chosen),
            density,
            scope,
        )

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        density: float,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        params: Selection = None,
        scope: str = "global",
        max_elements: int | None = None,
    ) -> Mask:
        """The elements of largest mean squared gradient over calibration batches.

        ``score_j = mean_b (dL(w; b) / dw_j)**2``; of equal scores the first element. A gradient
        lives from its creation in the backward pass to its squaring right there, one parameter at a
        time. The model's mode and gradients are left as they were; call ``model.eval()`` first to
        calibrate without dropout.

        Args:
            model: any module.
            batches: what ``loss_fn`` takes; without it mappings for ``model(**batch).loss``. Read
                once, or once a sweep when ``max_elements`` is given (then it must be a sequence).
            density: in (0, 1].
            loss_fn: ``loss_fn(model, batch) ->`` differentiable scalar.
            params, scope: see :meth:`random`.
            max_elements: how many float32 scores are held at once (but always one parameter's).
                None: those of all candidates, in one sweep over the batches. A limit costs one
                sweep for every such group of parameters: the memory of inference plus one group.

        Raises:
            ValueError: an argument out of range, no batch, no candidate, a gradient that is not
                finite, or none at all for a candidate.
            TypeError: batches that are no sequence, with ``max_elements``.

        Source: Meerkat (arXiv 2506.03337): the top u = 0.1% by squared gradient on pre-training
        text, fixed for the run. Ranking all linear weights together, rather than each, is our
        reading.
        """
        model = unwrap(model)
        chosen = _candidates(model, params)
        shapes = _shapes(chosen)
        _count(density, sum(map(math.prod, shapes.values())))
        _scope(scope)
        scores = squared_gradients(model, chosen, batches, loss_fn, max_elements)
        return _ranked(scores, shapes, density, scope)


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The transformer's linear weights: those of its projections, feed-forward layers and experts.

    Weights of ``nn.Linear`` and GPT-2's ``Conv1D``, and three-dimensional parameters (fused
    experts); not the embeddings, nor the output layer of a language model, nor anything tied to
    them.
    """
    excluded: set[int] = set()
    weights: set[int] = set()
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            excluded.update(map(id, own))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weights.add(id(module.weight))
        elif not isinstance(module, nn.modules.conv._ConvNd):
            weights.update(id(p) for p in own if p.dim() == 3)
        find: Any = getattr(module, "get_output_embeddings", None)
        if callable(find):
            with contextlib.suppress(NotImplementedError):
                excluded.update(id(p) for p in getattr(find(), "_parameters", {}).values())
    return {n: p for n, p in model.named_parameters() if id(p) in weights and id(p) not in excluded}


def _candidates(model: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = unwrap(model)
    if params is not None:
        return selected(model, params)
    found = linear_weights(model)
    if not found:
        raise ValueError("the model has no linear weight to put into a mask: give params")
    return found


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in parameters.items()}


def _scope(scope: str) -> str:
    if scope not in SCOPES[:2]:
        raise ValueError(f"scope must be one of {list(SCOPES[:2])}; got {scope!r}")
    return scope


def _count(density: float, numel: int) -> int:
    """How many elements: at least one."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]; got {density!r}")
    return max(1, math.floor(density * numel + 0.5))


def _shares(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
    """Every parameter's count: its share to the nearest, so possibly 0 for a small one."""
    _count(density, 1)
    return {n: math.floor(density * math.prod(shape) + 0.5) for n, shape in shapes.items()}


def _sample(numel: int, count: int, key: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``count`` distinct sorted numbers in [0, numel): the first ones of a Philox stream.

    Only the raw 64-bit words of the generator are used, which numpy keeps stable.
    """
    if 2 * count > numel:  # draw what is left out
        rest = _sample(numel, numel - count, key) if count < numel else np.empty(0, np.int64)
        return np.delete(np.arange(numel, dtype=np.int64), rest)
    bits = np.random.Philox(key=key)
    limit = (1 << 64) // numel * numel  # words from here on would favour small numbers
    found = np.empty(0, np.int64)
    while found.size < count:
        words = bits.random_raw(2 * (count - found.size) + 16)
        words = words if limit > _MASK64 else words[words < np.uint64(limit)]
        drawn = np.concatenate([found, (words % np.uint64(numel)).astype(np.int64)])
        first = np.sort(np.unique(drawn, return_index=True)[1])
        found = drawn[first][:count]
    return np.sort(found)


def _split(
    places: np.ndarray[Any, np.dtype[np.int64]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Sorted positions in the concatenation of all parameters, parameter by parameter."""
    indices, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        low, high = np.searchsorted(places, [start, stop])
        indices[name] = torch.from_numpy(places[low:high] - start)
        start = stop
    return indices


class _Top:
    """The largest scores of a stream, at most ``count``; of equal ones the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scores = torch.empty(0)
        self.places = torch.empty(0, dtype=torch.int64)

    def add(self, scores: Tensor, start: int) -> None:
        """Scores ``[n]`` of the positions from ``start`` on; later than all before."""
        full = self.scores.numel() == self.count
        if full:  # an equal score comes too late
            found = torch.nonzero(scores > self.scores.min()).flatten()
        else:
            found = torch.arange(scores.numel(), device=scores.device)
        self.scores = torch.cat([self.scores, scores[found].cpu()])
        self.places = torch.cat([self.places, found.cpu() + start])
        if self.scores.numel() > self.count:
            keep = _largest(self.scores, self.count)
            self.scores, self.places = self.scores[keep], self.places[keep]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Sorted positions of the ``count`` largest scores, the first ones of those that are equal."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    threshold = torch.kthvalue(scores, scores.numel() - count + 1).values
    above = scores > threshold
    equal = torch.nonzero(scores == threshold).flatten()[: count - int(above.sum())]
    above[equal] = True
    return torch.nonzero(above).flatten()


def _ranked(
    scores: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    scope: str,
) -> Mask:
    """The mask of the largest scores, which arrive parameter by parameter."""
    per_layer = _scope(scope) == "layer"
    total = sum(map(math.prod, shapes.values()))
    top = _Top(_count(density, total))
    counts = _shares(shapes, density)
    indices: dict[str, Tensor] = {}
    start = 0
    for name, values in scores:
        flat = values.reshape(-1)
        if bool(torch.isnan(flat).any()):
            raise ValueError(f"parameter {name!r} has scores that are NaN")
        if per_layer:
            indices[name] = _largest(flat.cpu(), counts[name])
        else:
            top.add(flat, start)
        start += flat.numel()
    if not per_layer:
        indices = _split(top.places.numpy(), shapes)
    return Mask({n: indices[n] for n in shapes}, shapes, scope=scope)
