"""moesys as its own training runs it: decoder, fused linear cross entropy, balance loss, clip, master AdamW.

The router z-loss is left out because no peer pays for one. bf16 keeps fp32 masters. The variant ``unmetered`` gathers
no telemetry of its routers, to show what telemetry costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesys.config import ModelConfig, TrainingConfig
from moesys.data import Batch as TrainingBatch
from moesys.models import Decoder, initialize_weights
from moesys.moe import ExpertLoad, LoadMeter, Routing
from moesys.training.build import build_decoder_config
from moesys.training.optimizer import MasterAdamW
from moesys.training.step import Objective, TrainingStep
from peers import Arithmetic, Trainee
from peers.network import INIT_STD, NORM_EPSILON, ROPE_BASE
from peers.step import BALANCE_COEFFICIENT, BETAS, LARGEST_GRADIENT_NORM, LEARNING_RATE, WEIGHT_DECAY
from peers.workload import Batch, Shape

LOSS_CHUNK_TOKENS = 1024
"""The default of ``memory.loss_chunk_tokens``."""


class NoMeter(LoadMeter):
    def add(self, routings: Mapping[int, Routing]) -> None:
        pass


class MoesysTrainee:
    def __init__(self, shape: Shape, dtype: torch.dtype, meter: LoadMeter) -> None:
        config = ModelConfig(
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            expert_intermediate_size=shape.expert_size,
            rope_theta=ROPE_BASE,
            norm_epsilon=NORM_EPSILON,
        )
        model = Decoder(build_decoder_config(config, shape.vocab_size, shape.sequence_length))
        initialize_weights(model, seed=0, std=INIT_STD)
        settings = TrainingConfig(
            learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY
        )
        self._step = TrainingStep(
            model,
            MasterAdamW(model, settings, dtype),
            model.make_resident_execution(),
            Objective(BALANCE_COEFFICIENT, 0.0, LOSS_CHUNK_TOKENS),
            LARGEST_GRADIENT_NORM,
            meter,
        )
        self._load: ExpertLoad = meter.drain()

    def step(self, batch: Batch) -> float:
        ours = TrainingBatch(batch.tokens_BS, batch.targets_BS, batch.documents_BS, batch.positions_BS)
        result = self._step.run([ours], LEARNING_RATE)
        self._load = result.load
        return result.loss

    def count_dropped(self) -> float | None:
        num_assignments = sum(map(sum, self._load.expert_tokens))
        return self._load.dropped / num_assignments if num_assignments else None


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    meter = NoMeter() if variant == "unmetered" else LoadMeter()
    return MoesysTrainee(shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[arithmetic], meter)
