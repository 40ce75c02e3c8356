"""The layer with dispatchers and sources of other making: it depends on nothing but the two seams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_seams import Delivery, DeliverySource, ExpertCutDispatcher, TokenCutDispatcher
from layer_cases import CONFIGS, LAYER, assert_all_close, make_layer, make_x, run
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe import (
    Dispatcher,
    Execution,
    ExpertBank,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    Part,
    ResidentSource,
    Routing,
)

DELIVERIES = (
    Delivery([3, None, 1], delay=2),
    Delivery([None, 5, 0, 0, None], delay=0),
    Delivery([4, 2], delay=1),
)
DISPATCHERS: dict[str, Dispatcher] = {
    "local": LocalDispatcher(),
    "tokens": TokenCutDispatcher(5),
    "experts": ExpertCutDispatcher([[5, 1], [], [0, 2, 3, 4]]),
}


def get_bank(layer: MoELayer) -> ExpertBank:
    assert isinstance(layer.experts, ExpertBank)
    return layer.experts


@pytest.mark.parametrize("dispatcher", DISPATCHERS.values(), ids=DISPATCHERS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sparse_shuffled_and_repeated_slots_in_several_parts(
    config: MoEConfig, dispatcher: Dispatcher
) -> None:
    layer = make_layer(config)
    source = DeliverySource(get_bank(layer), DELIVERIES)
    assert_all_close(run(layer, Execution(dispatcher, source)), run(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_order_of_arrival_changes_no_bit_of_the_output(config: MoEConfig, dtype: torch.dtype) -> None:
    layer = make_layer(config, dtype)
    x = make_x(dtype=dtype)
    with torch.no_grad():
        resident, _ = layer(x)
        for delays in itertools.permutations(range(3)):
            deliveries = [Delivery(d.slots, delay) for d, delay in zip(DELIVERIES, delays, strict=True)]
            execution = Execution(LocalDispatcher(), DeliverySource(get_bank(layer), deliveries))
            assert torch.equal(layer(x, execution)[0], resident)


def test_the_layer_calls_the_source_in_order_and_tells_it_the_demand() -> None:
    layer = make_layer(CONFIGS["top-3"])
    source = DeliverySource(get_bank(layer), DELIVERIES)
    _, routing = layer(make_x(), Execution(TokenCutDispatcher(5), source))
    assert source.calls == [f"hint {LAYER}", *[f"lend {LAYER}", f"release {LAYER}"] * 6]
    totals = [sum(counts) for counts in zip(*source.demands, strict=True)]
    assert totals == [0, *routing.compute_expert_counts().cumsum(0).tolist()]


def test_an_expert_in_no_view_is_an_error() -> None:
    layer = make_layer(CONFIGS["every expert"])
    source = DeliverySource(get_bank(layer), [Delivery([3, 1]), Delivery([0, 5])])
    with pytest.raises(
        ShapeError, match=r"for layer 7 experts \[2, 4\] were in none and experts \[\] in several"
    ):
        layer(make_x(), Execution(LocalDispatcher(), source))


def test_an_expert_in_two_views_is_an_error() -> None:
    layer = make_layer(CONFIGS["every expert"])
    source = DeliverySource(get_bank(layer), [Delivery([3, 1, 2]), Delivery([0, 5, 1, 4])])
    with pytest.raises(ShapeError, match=r"experts \[\] were in none and experts \[1\] in several"):
        layer(make_x(), Execution(LocalDispatcher(), source))


def test_experts_without_rows_need_no_view() -> None:
    layer, x = make_layer(CONFIGS["switch"]), make_x(1)
    y, routing = layer(x)
    source = DeliverySource(get_bank(layer), [Delivery([None, int(routing.expert_ids[0])])])
    torch.testing.assert_close(layer(x, Execution(LocalDispatcher(), source))[0], y)


class _Forgetful:
    """Yields the first parts of another dispatcher, the last of them twice if asked."""

    def __init__(self, dispatcher: Dispatcher, num_parts: int, *, repeats: bool = False) -> None:
        self._dispatcher = dispatcher
        self._num_parts = num_parts
        self._repeats = repeats

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
        parts = list(self._dispatcher.dispatch(x_TD, routing))[: self._num_parts]
        yield from [*parts, *parts[-1:]] if self._repeats else parts

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        return self._dispatcher.combine(y_RD, handle)


@pytest.mark.parametrize(
    ("dispatcher", "served"),
    [
        (_Forgetful(LocalDispatcher(), 0), "0 of 26"),
        (_Forgetful(TokenCutDispatcher(5), 1), "10 of 26"),
        (_Forgetful(LocalDispatcher(), 1, repeats=True), "52 of 26"),
    ],
    ids=["no part", "one of two", "a part twice"],
)
def test_assignments_that_no_part_or_two_parts_serve_are_an_error(
    dispatcher: Dispatcher, served: str
) -> None:
    layer = make_layer(CONFIGS["deepseek"])
    execution = Execution(dispatcher, ResidentSource({LAYER: layer.experts}))
    with pytest.raises(ShapeError, match=f"not dropped once; for layer 7 they served {served}"):
        layer(make_x(), execution)


def test_dropped_assignments_need_no_part() -> None:
    layer, x = make_layer(CONFIGS["capacity"]), make_x()
    source = ResidentSource({LAYER: layer.experts})
    num_dropped = layer(x)[1].count_dropped()
    assert num_dropped > 0
    with pytest.raises(ShapeError, match=f"served 0 of {26 - num_dropped}"):
        layer(x, Execution(_Forgetful(LocalDispatcher(), 0), source))


def test_no_tokens_and_no_parts() -> None:
    layer = make_layer(CONFIGS["top-3"])
    y, _ = layer(
        make_x(0), Execution(_Forgetful(LocalDispatcher(), 0), ResidentSource({LAYER: layer.experts}))
    )
    assert y.shape == (0, 8)


def test_a_part_says_whose_assignments_it_serves_and_not_only_how_many_rows_it_holds() -> None:
    """As where rows of other ranks are computed here: more rows than this Routing has assignments."""

    class Guests:
        def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
            (own,) = LocalDispatcher().dispatch(x_TD, routing)
            yield own
            yield replace(own, num_served=0, handle="elsewhere")

        def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
            return y_RD if handle is None else torch.zeros_like(y_RD)

    layer, x = make_layer(CONFIGS["top-3"]), make_x()
    guests = Execution(Guests(), ResidentSource({LAYER: layer.experts}))
    torch.testing.assert_close(layer(x, guests)[0], layer(x)[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_tokens_and_no_views(config: MoEConfig) -> None:
    layer = make_layer(config)
    y, routing = layer(make_x(0), Execution(LocalDispatcher(), DeliverySource(get_bank(layer), [])))
    assert y.shape == (0, 8)
    assert routing.num_assignments == 0
