"""A transformer cut in two between layers: ``y = f2(theta2; f1(theta1; x))``.

Nothing of the model is rewritten. Block 1 is a forward pass that stops after layer ``at - 1`` and
keeps what it returned; block 2 is a forward pass in which the layers before ``at`` return that in
place of computing. The embeddings in front of the skipped layers are looked up for nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from zokernels.binding import Binding, bind, unwrap
from zokernels.branches import Branches

Loss = Callable[[], Tensor]


class _Cut(BaseException):
    """Ends a forward pass after block 1 (past any ``except Exception`` of a model)."""


class SplitError(ValueError):
    """A model that cannot be cut, or not there."""


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of an encoder or decoder: the outermost list of modules with most parameters.

    Raises:
        SplitError: there is none with at least two layers, or the model has an encoder and a
            decoder.
    """
    config: Any = getattr(unwrap(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise SplitError("the model must be an encoder or a decoder; it is both")
    best, most = None, 0
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            inner.update(id(m) for m in module.modules())
            size = sum(p.numel() for p in module.parameters())
            if len(module) >= 2 and size > most:
                best, most = module, size
    if best is None:
        raise SplitError(f"{type(model).__name__} has no list of layers to cut")
    return best


def _head_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of ``linear_cross_entropy``: tokens, vocabulary and hidden size."""
    return 2 * math.prod(x) * weight[0]


def _attention_flop(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Of both products, ``[batch, heads, tokens, width]``; key heads may be fewer."""
    return 4 * math.prod(q) * k[-2]


# What torch's counter does not know.
_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.zokernels.linear_cross_entropy: _head_flop,
}


def flop_shares(model: nn.Module, loss: Loss) -> list[float]:
    """Share of a forward pass spent before layer ``i``, for ``i`` in 0..n.

    Matrix products and attention are counted; embeddings in front of the layers count as nothing.

    Args:
        model: with layers (:func:`layers_of`).
        loss: a forward pass.
    """
    layers = layers_of(model)
    counts = [0.0]
    with contextlib.ExitStack() as stack, torch.no_grad():
        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)

        def note(*_: Any) -> None:
            counts.append(float(counter.get_total_flops()))

        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        with counter:
            loss()
        total = float(counter.get_total_flops())
    if total == 0 or len(counts) != len(layers) + 1:
        raise SplitError("the forward pass does not run through every layer once")
    return [count / total for count in counts]


class BlockSplit:
    """Two consecutive blocks of a model and how to evaluate them at branches.

    A parameter that both blocks use (a tied embedding) belongs to block 1: it moves along block 1's
    directions, in block 2 too.

    Args:
        model: a transformers encoder or decoder.
        at: block 2 begins with this layer, in [1, number of layers).
        loss: a forward pass, to see which modules run before the cut.
        params: which parameters move, as for :func:`zokernels.bind`.
        distribution: of the directions.

    Attributes:
        first, second: bindings of the parameters of the blocks, without one in common.

    Raises:
        SplitError: ``at`` is out of range, or a block has no parameter that moves.
    """

    def __init__(
        self,
        model: nn.Module,
        at: int,
        loss: Loss,
        *,
        params: Sequence[str] | None = None,
        distribution: str = "gaussian",
    ) -> None:
        self.model = unwrap(model)
        self.layers = layers_of(self.model)
        if not 1 <= at < len(self.layers):
            raise SplitError(f"at must be in [1, {len(self.layers)}); got {at}")
        self.at, self.distribution = at, distribution
        self._kept: Any = None
        before, after = self._run(loss)
        names: tuple[list[str], list[str], list[str]] = ([], [], [])  # block 1, tied, block 2
        for p in bind(self.model, params).params:
            owners = {id(holder) for holder, _ in p.places}
            early, late = bool(owners & before), bool(owners - before or owners & after)
            names[(1 if late else 0) if early else 2].append(p.name)
        own, self.tied, rest = names
        if not (own or self.tied) or not rest:
            raise SplitError(f"a block has no parameter that moves when block 2 begins at {at}")
        self.first: Binding = bind(self.model, own + self.tied)
        self.second: Binding = bind(self.model, rest)
        self._late: Binding = bind(self.model, self.tied + rest) if self.tied else self.second

    # --- evaluation -------------------------------------------------------------------------------

    def activations(
        self, loss: Loss, seeds: Sequence[int], coeffs: Sequence[Sequence[float]]
    ) -> Any:
        """``f1`` at every branch: what layer ``at - 1`` returned, tensors stacked to ``[G, ...]``.

        Args:
            loss: a forward pass.
            seeds: of block 1's directions, K.
            coeffs: ``[G][K]``.
        """
        view = Branches(self.first, list(seeds), coeffs, distribution=self.distribution)
        return view(lambda: self._until_cut(loss))

    def losses(
        self,
        loss: Loss,
        activations: Any,
        rows: Sequence[int],
        seeds: Sequence[int],
        coeffs: Sequence[Sequence[float]],
        *,
        early_seeds: Sequence[int] = (),
        early_coeffs: Sequence[Sequence[float]] = (),
    ) -> tuple[float, ...]:
        """``L(f2)`` at every branch, all in one stacked forward.

        Args:
            loss: the same forward pass.
            activations: from :meth:`activations`.
            rows: which activation each branch gets, ``[G]``.
            seeds: of block 2's directions, K.
            coeffs: ``[G][K]``.
            early_seeds, early_coeffs: where each branch is in block 1, K' and ``[G][K']``; used for
                the parameters both blocks share.
        """
        leaves, spec = tree_flatten(activations)
        index = torch.tensor(rows, device=self.first.device)
        given = [leaf.index_select(0, index) for leaf in leaves if isinstance(leaf, Tensor)]
        keys, table = list(seeds), [list(row) for row in coeffs]
        scale: dict[str, tuple[float, ...]] = {}
        if self.tied:
            keys = [*early_seeds, *seeds]
            table = [[*a, *b] for a, b in zip(early_coeffs, coeffs, strict=True)]
            early = (1.0,) * len(early_seeds) + (0.0,) * len(seeds)
            late = (0.0,) * len(early_seeds) + (1.0,) * len(seeds)
            shared = set(self.tied)
            scale = {p.name: early if p.name in shared else late for p in self._late.params}

        def from_cut(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            kept = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._after_cut(loss, tree_unflatten(kept, spec))

        view = Branches(self._late, keys, table, scale=scale, distribution=self.distribution)
        return tuple(view(from_cut, *given).double().tolist())

    def check(self, loss: Loss, seed: int, eps: float) -> None:
        """Compare both blocks in a row with the whole model, displaced along one seed.

        Raises:
            SplitError: more than the layers' outputs carries block 1's parameters past the cut.
        """
        both = [[eps], [-eps]]
        names = [p.name for p in (*self.first.params, *self.second.params)]
        whole = Branches(bind(self.model, names), [seed], both, distribution=self.distribution)
        expected = whole(loss).double()
        kept = self.activations(loss, [seed], both)
        found = self.losses(loss, kept, [0, 1], [seed], both, early_seeds=[seed], early_coeffs=both)
        low = any(p.dtype != torch.float32 for p in self.model.parameters())
        gap = max(abs(a - b) for a, b in zip(expected.tolist(), found, strict=True))
        spread = abs(float(expected[0] - expected[1]))
        limit = (5e-2 if low else 1e-4) * max(float(expected.abs().max()), 1e-6)
        if not gap <= limit or (not low and gap > 0.1 * spread + limit * 1e-1):
            raise SplitError(
                f"the blocks give losses {list(found)} where the model gives {expected.tolist()}: "
                f"something besides the layers' outputs passes the cut at layer {self.at}"
            )

    # --- passes -----------------------------------------------------------------------------------

    def _until_cut(self, loss: Loss) -> Any:
        def stop(_: nn.Module, args: Any, output: Any) -> None:
            self._kept = output
            raise _Cut

        handle = self.layers[self.at - 1].register_forward_hook(stop)
        try:
            loss()
        except _Cut:
            return self._kept
        finally:
            handle.remove()
            self._kept = None
        raise SplitError(f"the forward pass does not reach layer {self.at - 1}")

    def _after_cut(self, loss: Loss, kept: Any) -> Tensor:
        with self._skipping(lambda *args, **kwargs: kept):
            return loss()

    @contextlib.contextmanager
    def _skipping(self, forward: Callable[..., Any]) -> Iterator[None]:
        skipped = list(self.layers)[: self.at]
        found = [layer.__dict__.get("forward") for layer in skipped]
        try:
            for layer in skipped:
                layer.__dict__["forward"] = forward
            yield
        finally:
            for layer, original in zip(skipped, found, strict=True):
                if original is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = original

    def _run(self, loss: Loss) -> tuple[set[int], set[int]]:
        """Which modules' parameter tables were used before the cut and after it."""
        seen: tuple[set[int], set[int]] = (set(), set())
        late = False

        def note(module: nn.Module, *_: Any) -> None:
            seen[late].add(id(module._parameters))

        def cross(*_: Any) -> None:
            nonlocal late
            late = True

        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.callback(self.layers[self.at - 1].register_forward_hook(cross).remove)
            for module in self.model.modules():
                stack.callback(module.register_forward_pre_hook(note).remove)
            loss()
        # Layers count by where they are, also where they do not run (layer drop, experts).
        for i, layer in enumerate(self.layers):
            for module in layer.modules():
                seen[i >= self.at].add(id(module._parameters))
        return seen
