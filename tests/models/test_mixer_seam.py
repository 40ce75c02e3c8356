"""The seam of token mixers: two kinds that the library has never heard of run, learn, decode and are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar

import pytest
import torch
from small_models import DENSE, MOE, VOCAB, make_config, make_positions, make_tokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moesys.errors import ModelFormatError
from moesys.inference import Engine, SequenceStep
from moesys.models import (
    Decoder,
    DecoderConfig,
    DocumentAttend,
    NormConfig,
    Role,
    SoftmaxRule,
    StoredTensor,
    choose_family,
    classify_parameters,
    initialize_weights,
)
from moesys.models.attend import Attend, Recurrence, State
from moesys.models.layout import Layout, MoELayout, StackedExperts
from moesys.models.mixer import CachedTensor, Mixer
from moesys.models.mixer_layout import MIXER_LAYOUTS
from moesys.models.rotary import Rotation
from moesys.moe import Linear

HIDDEN = 12
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])


@dataclass(frozen=True)
class FadingSumConfig:
    """What a token passes on fades by a learned factor per element: a recurrence with a state and no cache."""

    size: int

    kind = "a fading sum"
    rope = None
    sliding_window = None
    cached = ()

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def make(self, hidden_size: int, norm: NormConfig, layer_id: int) -> FadingSum:
        return FadingSum(hidden_size, self.size, layer_id)

    def count_weights(self, hidden_size: int) -> int:
        return 2 * hidden_size * self.size

    def count_products(self, context: int) -> float:
        return self.size

    def count_cached_products(self, context: int) -> float:
        return self.count_products(context)

    def count_step_elements(self, num_tokens: int, num_positions: int) -> int:
        return 2 * num_tokens * self.size


class FadingSum(Mixer):
    roles: ClassVar[Mapping[str, Role]] = MappingProxyType({"fading_D": Role.BIAS})

    def __init__(self, hidden_size: int, size: int, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.in_proj = Linear(hidden_size, size, bias=False)
        self.o_proj = Linear(size, hidden_size, bias=False)
        self.fading_D = nn.Parameter(torch.zeros(size))

    def forward(self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        assert rotation is None
        return self.o_proj(attend.scan(self.layer_id, self.in_proj(x_BSD), self._fade))

    def _fade(self, x_SW: Tensor, state: State | None) -> tuple[Tensor, State]:
        total = torch.zeros_like(x_SW[0]) if state is None else state[0]
        outputs = []
        for x_W in x_SW:
            total = self.fading_D.sigmoid() * total + x_W
            outputs.append(total)
        return torch.stack(outputs), (total,)


@dataclass(frozen=True)
class RunningMeanConfig:
    """Every token gets the mean of all earlier ones: one cached tensor that is keys and values, and no rope."""

    size: int

    rope = None
    sliding_window = None
    kind = "a running mean"
    state_shapes = ()

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        return (CachedTensor(1, self.size + 2),)

    def make(self, hidden_size: int, norm: NormConfig, layer_id: int) -> RunningMean:
        return RunningMean(hidden_size, self.size, layer_id)

    def count_weights(self, hidden_size: int) -> int:
        return hidden_size * (2 * self.size + 2)

    def count_products(self, context: int) -> float:
        return self.size * (context + 1) / 2

    def count_cached_products(self, context: int) -> float:
        return self.count_products(context)

    def count_step_elements(self, num_tokens: int, num_positions: int) -> int:
        return num_tokens * (3 * self.size + 2) + num_positions * (self.size + 2)


class RunningMean(Mixer):
    def __init__(self, hidden_size: int, size: int, layer_id: int) -> None:
        super().__init__()
        self.layer_id, self.size = layer_id, size
        self.in_proj = Linear(hidden_size, size + 2, bias=False)
        self.o_proj = Linear(size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        assert rotation is None
        k = self.in_proj(x_BSD).unsqueeze(2)
        y = attend(self.layer_id, torch.zeros_like(k), k, None, SoftmaxRule(1.0, value_size=self.size))
        return self.o_proj(y.flatten(-2))


@dataclass(frozen=True)
class FadingSumLayout:
    prefix: str = "linear_attn"

    def list_tensors(self, mixer: FadingSum) -> Iterator[StoredTensor]:
        for name, parameter in mixer.named_parameters():
            yield StoredTensor(name, tuple(parameter.shape), parameter)


class RememberingAttend(DocumentAttend):
    """What an engine would do for one sequence: it keeps the state of every layer from pass to pass."""

    def __init__(self) -> None:
        super().__init__(None)
        self.states: dict[int, State] = {}

    def scan(self, layer_id: int, x: Tensor, recurrence: Recurrence) -> Tensor:
        y_SW, self.states[layer_id] = recurrence(x[0], self.states.get(layer_id))
        return y_SW[None]


FADING, MEAN = FadingSumConfig(5), RunningMeanConfig(4)
ATTENTION = make_config().mixers[0]


def make_decoder(*mixers: object, dtype: torch.dtype = torch.float64) -> Decoder:
    config = DecoderConfig(VOCAB, HIDDEN, tuple(mixers), (MOE, DENSE, MOE)[: len(mixers)])
    model = Decoder(config)
    initialize_weights(model, seed=0, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("fading_D"):
            parameter.data.copy_(torch.linspace(-1, 1, len(parameter)))
    return model.to(dtype)


def run(model: Decoder, tokens: Tensor, attend: Attend, positions: Tensor | None = None) -> Tensor:
    positions = make_positions(*tokens.shape) if positions is None else positions
    return model.compute_logits(model(tokens, positions, attend).hidden_BSD)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_each_kind_computes_its_formula() -> None:
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    fading, mean = (block.mixer for block in make_decoder(FADING, MEAN).blocks)
    assert isinstance(fading, FadingSum)
    assert isinstance(mean, RunningMean)
    values = x @ fading.in_proj.weight.T
    powers = (torch.arange(7)[:, None] - torch.arange(7)).clamp_min(0)[..., None]
    factors = (fading.fading_D.sigmoid() ** powers) * torch.ones(7, 7).tril()[..., None]
    expected = torch.einsum("stw,btw->bsw", factors, values) @ fading.o_proj.weight.T
    close(fading(x, None, DocumentAttend(None)), expected)
    values = (x @ mean.in_proj.weight.T)[..., :4]
    expected = values.cumsum(1) / torch.arange(1, 8)[:, None] @ mean.o_proj.weight.T
    close(mean(x, None, DocumentAttend(None)), expected)


@pytest.mark.parametrize("mixers", [(FADING, ATTENTION), (ATTENTION, MEAN), (MEAN, FADING, ATTENTION)])
def test_packed_documents_equal_each_alone(mixers: tuple[object, ...]) -> None:
    model = make_decoder(*mixers)
    tokens = make_tokens(2, 8)
    packed = run(model, tokens, DocumentAttend(DOCUMENTS))
    positions = make_positions(2, 8)
    for row in range(2):
        edges = [0, *(DOCUMENTS[row].diff().nonzero().squeeze(1) + 1).tolist(), 8]
        for start, end in pairwise(edges):
            alone = (tokens[row : row + 1, start:end], DocumentAttend(None), positions[:1, start:end])
            close(packed[row : row + 1, start:end], run(model, *alone))


def test_a_batch_is_learnt() -> None:
    model = make_decoder(FADING, MEAN, ATTENTION)
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokens = make_tokens(2, 9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for recompute in [False, True] * 15:
        execution = model.make_resident_execution(recompute=recompute)
        output = model(tokens[:, :-1], make_positions(2, 8), DocumentAttend(DOCUMENTS), execution)
        loss = cross_entropy(model.compute_logits(output.hidden_BSD).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "mixer" in n)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@torch.no_grad()
def test_a_state_is_taken_along_from_pass_to_pass() -> None:
    model, tokens = make_decoder(FADING, FADING), make_tokens(1, 9)
    attend = RememberingAttend()
    edges = [0, 4, 5, 6, 9]
    parts = [
        run(model, tokens[:, start:end], attend, make_positions(1, 9)[:, start:end])
        for start, end in pairwise(edges)
    ]
    close(torch.cat(parts, dim=1), run(model, tokens, DocumentAttend(None)))
    shapes = [tuple(tensor.shape) for state in attend.states.values() for tensor in state]
    assert shapes == [shape for mixer in model.config.mixers for shape in mixer.state_shapes]


@pytest.mark.parametrize("mixers", [(MEAN, ATTENTION, MEAN), (FADING, ATTENTION, MEAN), (FADING, FADING)])
@torch.no_grad()
def test_what_a_kind_keeps_the_engine_keeps(mixers: tuple[object, ...]) -> None:
    model = make_decoder(*mixers, dtype=torch.float32).eval()
    tokens = make_tokens(1, 14)
    engine = Engine(model)
    sequence = engine.open_sequence(14)
    edges = [0, 3, 12, 13, 14]
    found = [
        engine.step([SequenceStep(sequence, start, tokens[0, start:end].tolist())])[0]
        for start, end in pairwise(edges)
    ]
    expected = run(model, tokens, DocumentAttend(None))[0]
    assert (torch.cat(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_layout_entry_stores_it() -> None:
    model = make_decoder(FADING, ATTENTION)
    layout = Layout(
        (MoELayout("mlp", StackedExperts()),), mixers={**MIXER_LAYOUTS, FadingSum: FadingSumLayout()}
    )
    stored = {entry.name: entry for entry in layout.list_tensors(model)}
    assert sum(entry.view.numel() for entry in stored.values()) == model.count_parameters()
    fading = model.blocks[0].mixer
    assert isinstance(fading, FadingSum)
    own = {name.removeprefix("model.layers.0.linear_attn."): entry for name, entry in stored.items()}
    assert torch.equal(own["fading_D"].collect(), fading.fading_D)
    assert torch.equal(own["in_proj.weight"].collect(), fading.in_proj.weight)
    assert "model.layers.1.self_attn.q_proj.weight" in stored
    with pytest.raises(KeyError):
        list(Layout().list_tensors(model))


def test_parameters_that_a_mixer_holds_itself_have_the_role_it_says() -> None:
    model = make_decoder(FADING, MEAN)
    roles = classify_parameters(model)
    assert roles["blocks.0.mixer.fading_D"] is Role.BIAS
    assert roles["blocks.0.mixer.in_proj.weight"] is Role.PROJECTION
    model.blocks[0].mixer.other = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="'other' of FadingSum has no role"):
        classify_parameters(model)


def test_what_is_counted_is_what_it_says() -> None:
    plain, mixed = make_decoder(ATTENTION, ATTENTION).config, make_decoder(ATTENTION, FADING).config
    weights = 2 * HIDDEN * 5 - ATTENTION.count_weights(HIDDEN)
    assert mixed.num_matmul_parameters_per_token == plain.num_matmul_parameters_per_token + weights
    products = 5 - ATTENTION.count_products(9)
    found = mixed.compute_training_flops_per_token(9) - plain.compute_training_flops_per_token(9)
    assert found == pytest.approx(6 * (weights + products))
    assert mixed.position_limit == plain.position_limit


def test_a_family_says_what_it_cannot_hold() -> None:
    with pytest.raises(ModelFormatError, match="the model's have a fading sum"):
        choose_family(make_decoder(FADING, ATTENTION).config)
    with pytest.raises(ModelFormatError, match="the model's is a running mean"):
        choose_family(make_decoder(ATTENTION, MEAN).config)
