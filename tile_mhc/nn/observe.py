"""To look at the mixes of a model while it trains."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tile_mhc import errors
from tile_mhc.nn.mixes import IdentityMixes, Mixes

# One of the two is what a model has; what takes both may be given both.
Observer = Callable[[str, Mixes], Any] | Callable[[str, IdentityMixes], Any]


class Observed:
    """A connection whose mixes can be looked at."""

    _MIXES: ClassVar[type[Mixes] | type[IdentityMixes]] = Mixes
    _observers: tuple[Callable[..., Any], ...] = ()

    def _observe(self, streams: Tensor, *mixes: Tensor) -> None:
        with torch.no_grad():
            parts: Any = (self, streams.detach(), *(mix.detach() for mix in mixes))
            seen = self._MIXES(*parts)
            for observer in self._observers:
                observer(seen)


@contextlib.contextmanager
def observe_mixes(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Show the mixes of every hyper-connection of a model to a function, for the log.

        def observer(name, mixes):
            _, _, comb = mixes.logits()
            seen = mixes.row_sums.amax(), mixes.column_sums.amax(), comb.abs().amax()
            log[name] = torch.stack(seen)  # on the device still

        with observe_mixes(model, observer):
            loss = model(batch)
        loss.backward()

    The observer is called once a connection and call, in the order of the forward, by the modules
    and by the stacks (`run_sublayers`, `run_delayed_sublayers`), whose boundaries stay one op. It
    runs without gradients, on detached tensors: the graph is not kept alive by what it keeps, nor
    do numbers and bits of the step change. A step that is not observed makes no call for this.

    What is run again in a backward inside of the context, as by `torch.utils.checkpoint`, is shown
    again. Who keeps the streams that he is shown keeps their memory, that of a recompute group too.
    Under `torch.compile` the observer is compiled with the model, which is compiled anew for it: it
    has to be something that torch can trace, and `.item()` breaks the graph as ever.

    Of an `IdentityHyperConnection`, which leaves the streams unmixed, the observer is given
    `IdentityMixes`: the post_mix, `logits()` and `gates()`, and nothing of a comb_mix. The gate of
    a `HyperHead` is not shown.

    Contexts may be nested; each has its own observer.

    Args:
        module: a model that holds a `HyperConnection`, `DelayedHyperConnection` or
            `IdentityHyperConnection`, or one itself.
        observer: is given the name of the connection, as of `module.named_modules()`, and its
            `Mixes` or `IdentityMixes`; what it returns is not looked at.

    Raises:
        ShapeError: module is no module with a connection, or the observer is not callable.
    """
    op = "observe_mixes"
    if not callable(observer):
        raise errors.ShapeError(f"{op}: observer must be callable; got {errors.describe(observer)}")
    modules = module.named_modules() if isinstance(module, nn.Module) else ()
    found = [(each, name) for name, each in modules if isinstance(each, Observed)]
    if not found:
        raise errors.ShapeError(
            f"{op}: module must hold a HyperConnection, DelayedHyperConnection or "
            f"IdentityHyperConnection; got {type(module).__name__}"
        )
    own = [(connection, partial(observer, name)) for connection, name in found]
    for connection, show in own:
        connection._observers = (*connection._observers, show)
    try:
        yield
    finally:
        for connection, show in own:
            connection._observers = tuple(
                each for each in connection._observers if each is not show
            )
