"""One lazy parameter for every distinct parameter of a binding."""

from __future__ import annotations

from zokernels.binding import Binding, BoundParameter
from zokernels.lazy.masked import masked_parameter
from zokernels.lazy.parameter import LazyParameter, State


def lazy_parameter(state: State, bound: BoundParameter) -> LazyParameter:
    """The lazy stand-in of a bound parameter."""
    if bound.masked is not None:
        return masked_parameter(state, bound)
    source = bound.tensor.detach()
    return LazyParameter(state, bound.name, bound.id, source, source.reshape(bound.matrix))


class Lazy:
    """The state of a binding and one lazy parameter per distinct parameter."""

    def __init__(self, binding: Binding) -> None:
        self.state = State()
        self.params: dict[str, LazyParameter] = {}
        self._layouts: dict[str, tuple[int, tuple[int, ...]] | None] = {}
        self.follow(binding)

    @property
    def copied(self) -> list[str]:
        """Names of the parameters whose matrix is a copy."""
        return [name for name, layout in self._layouts.items() if layout is None]

    def follow(self, binding: Binding) -> None:
        """Renew the stand-ins of parameters that changed storage or layout (``p.data = ...``).

        A parameter that cannot be viewed as its matrix (a channels-last convolution) is copied, so
        its stand-in is renewed every time.
        """
        renewed = False
        for p in binding.params:
            layout = (p.tensor.data_ptr(), p.tensor.stride())
            if self._layouts.get(p.name) != layout:
                lazy = self.params[p.name] = lazy_parameter(self.state, p)
                shares = lazy.matrix.data_ptr() == layout[0]
                lazy.whole_matrix = shares and p.tensor.dim() == 2
                self._layouts[p.name] = layout if shares else None
                renewed = True
        if renewed:
            self._collect_vectors()

    def _collect_vectors(self) -> None:
        """Tell the state which parameters it may form together."""
        self.state.vectors = []
        for lazy in self.params.values():
            if type(lazy) is LazyParameter and len(lazy.stored_shape) == 1 and lazy.small():
                lazy.whole_vector = True
                self.state.vectors.append((lazy, lazy.matrix[0]))
