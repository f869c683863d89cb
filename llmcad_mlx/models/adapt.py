"""Adaptations: what is added to modules of an mlx-lm model, whose own code stays as it is.

An adaptation is a class that goes before a module's own class: the module gets a subclass of both, so that the
adaptation's methods run first and reach the module's own with ``super()``. Several may lie on one module, the last
one outermost, and each can be taken away again whatever came after it. Parameters and their names do not change.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mlx.nn.layers.base import Module


class Adaptation(Module):
    """Base of all adaptations. What a subclass keeps in a module it names by annotations in its body."""

    in_float32: ClassVar[bool] = False
    """See `computes_in_float32`."""

    def forget_weights(self) -> None:
        """Drop whatever was derived from the weights, which are going to be others."""


def adapt(module: Module, kind: type[Adaptation], **state: Any) -> None:
    """Put `kind` outermost on `module`; where it is there already, anew. state: what it keeps in the module."""
    restore(module, kind)
    module.__class__ = adapted_class(kind, type(module))
    for name, value in state.items():
        object.__setattr__(module, name, value)  # in no case a parameter or a submodule


def restore(module: Module, kind: type[Adaptation]) -> None:
    """Take `kind`, and every adaptation derived from it, away from `module` with what they keep; others stay."""
    own, stack = _layers_of(type(module))
    for each in stack:
        if not issubclass(each, kind):
            own = adapted_class(each, own)
            continue
        for base in each.__mro__:
            if issubclass(base, Adaptation):
                for name in base.__annotations__:
                    vars(module).pop(name, None)
    module.__class__ = own


def adaptations(module: Module) -> list[type[Adaptation]]:
    """The adaptations of `module`, innermost first."""
    return _layers_of(type(module))[1]


def computes_in_float32(module: Module) -> bool:
    """Whether an adaptation of `module` computes in float32 whatever the weights are stored in."""
    return any(kind.in_float32 for kind in adaptations(module))


def own_class(module: Module) -> type[Module]:
    """The class that `module` has without its adaptations."""
    return _layers_of(type(module))[0]


def adapted_class(kind: type[Adaptation], own: type[Module]) -> type[Module]:
    """The class of an `own` module that is adapted with `kind`; the same one each time while it is in use."""
    for known in own.__subclasses__():
        if known.__bases__ == (kind, own):
            return known
    return type(own.__name__, (kind, own), {"__module__": own.__module__})


def forget_weights(model: Module) -> None:
    """Let every adaptation in `model` drop what it has derived from weights."""
    modules: Any = model.modules()
    for module in modules:
        if isinstance(module, Adaptation):
            module.forget_weights()


def _layers_of(adapted: type) -> tuple[type[Module], list[type[Adaptation]]]:
    """A module's own class and its adaptations, innermost first."""
    stack: list[type[Adaptation]] = []
    while len(adapted.__bases__) == 2 and issubclass(adapted.__bases__[0], Adaptation):
        kind, adapted = adapted.__bases__
        stack.insert(0, kind)
    return adapted, stack
