"""Adaptations of modules: stacked, listed, and taken away in any order, with nothing left behind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from llmcad_mlx.models import positions
from llmcad_mlx.models.adapt import (
    Adaptation,
    adapt,
    adaptations,
    computes_in_float32,
    forget_weights,
    own_class,
    restore,
)
from llmcad_mlx.models.positions import PerNodeRope
from tests.support.architecture_configs import VOCAB, build


class Unchanged(Adaptation):
    pass


class Doubled(Adaptation):
    in_float32 = True

    _factor: int

    def __call__(self, x: mx.array) -> mx.array:
        return self._factor * super().__call__(x)


class Shifted(Adaptation):
    _shift: mx.array
    _forgotten: list[str]

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self._shift

    def forget_weights(self) -> None:
        self._forgotten.append("shifted")
        super().forget_weights()


class ShiftedTwice(Shifted):
    def forget_weights(self) -> None:
        self._forgotten.append("twice")
        super().forget_weights()


def all_three(module: nn.Module) -> list[str]:
    forgotten: list[str] = []
    adapt(module, Doubled, _factor=2)
    adapt(module, Shifted, _shift=mx.array(1.0), _forgotten=forgotten)
    adapt(module, Unchanged)
    return forgotten


def test_the_last_one_is_outermost_and_the_module_stays_what_it_was() -> None:
    module: Any = nn.Linear(4, 3)
    plain, before = module(mx.ones((1, 4))), dict(tree_flatten(module.parameters()))
    all_three(module)
    assert adaptations(module) == [Doubled, Shifted, Unchanged]
    assert mx.array_equal(module(mx.ones((1, 4))), 2 * plain + 1)
    assert isinstance(module, nn.Linear)
    assert (own_class(module), type(module).__name__) == (nn.Linear, "Linear")
    other = nn.Linear(4, 3)
    all_three(other)
    assert type(other) is type(module)  # not a class for each module
    after = dict(tree_flatten(module.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert computes_in_float32(module)
    assert not computes_in_float32(nn.Linear(4, 3))


@pytest.mark.parametrize("order", itertools.permutations([Doubled, Shifted, Unchanged]))
def test_they_go_in_any_order(order: tuple[type[Adaptation], ...]) -> None:
    module: Any = nn.Linear(4, 3)
    x = mx.ones((1, 4))
    plain, attributes = module(x), set(vars(module))
    all_three(module)
    left = [Doubled, Shifted, Unchanged]
    for kind in order:
        restore(module, kind)
        left.remove(kind)
        assert adaptations(module) == left
        doubled = 2 * plain if Doubled in left else plain
        assert mx.array_equal(module(x), doubled + 1 if Shifted in left else doubled)
    assert type(module) is nn.Linear
    assert set(vars(module)) == attributes


def test_once_each_and_by_their_base() -> None:
    module: Any = nn.Linear(4, 3)
    adapt(module, Doubled, _factor=2)
    adapt(module, Unchanged)
    adapt(module, Doubled, _factor=3)  # anew, and outermost
    assert adaptations(module) == [Unchanged, Doubled]
    assert mx.array_equal(module(mx.zeros((1, 4))), 3 * module.bias[None])
    adapt(module, ShiftedTwice, _shift=mx.array(1.0), _forgotten=[])
    restore(module, Shifted)
    assert adaptations(module) == [Unchanged, Doubled]
    assert not hasattr(module, "_shift")
    restore(module, Shifted)  # nothing to do
    restore(module, Adaptation)
    assert type(module) is nn.Linear


def test_all_of_them_forget_what_came_from_the_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    said = all_three(model.layers[0])
    adapt(model.layers[1], ShiftedTwice, _shift=mx.array(1.0), _forgotten=said)
    forget_weights(model)
    assert sorted(said) == ["shifted", "shifted", "twice"]


def test_mlx_lm_goes_on_using_an_adapted_model() -> None:
    untouched, adapted = build("llama"), build("llama")
    positions.install(adapted)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
    first, second = make_prompt_cache(untouched), make_prompt_cache(adapted)
    for part in (tokens[:, :6], tokens[:, 6:7], tokens[:, 7:8]):
        assert mx.array_equal(untouched(part, cache=first), adapted(part, cache=second))
    assert copy.deepcopy(adapted)(tokens).shape == (1, 10, VOCAB)
    found = [module for module in adapted.modules() if adaptations(module)]
    assert {id(module) for module in found} == {id(layer.self_attn.rope) for layer in adapted.layers}
    positions.install(adapted)  # twice is as once
    assert [adaptations(module) for module in found] == [[PerNodeRope]] * 2
    positions.uninstall(adapted)
    assert [type(module) for module in adapted.modules()] == [type(module) for module in untouched.modules()]
