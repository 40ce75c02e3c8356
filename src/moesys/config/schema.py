"""What a run can be told: five frozen sections, each field with its meaning, unit and limits.

Defaults describe the simplest case; real sizes live in ``examples/``. Nothing here knows how a setting is
carried out, and nothing here imports torch.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The shape of the decoder. The vocabulary comes from the tokenizer (``data.vocab_size``)."""

    init: str | None = None
    """A model folder in Hugging Face layout, or ``org/model[@revision]`` on the hub, from which shape, weights and
    tokenizer are taken; then the other keys of this section, but for ``balance_bias_rate``, have no effect."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 4
    """Number of blocks."""
    num_heads: PositiveInt = 4
    """Query heads per attention layer."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention); must divide num_heads. Default: num_heads."""
    head_dim: PositiveInt | None = None
    """Width of one head; even, for the rotary embedding. Default: hidden_size / num_heads."""
    intermediate_size: PositiveInt = 1024
    """Inner width of the SwiGLU in dense layers."""
    num_experts: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] = 8
    """Experts per layer; 0 makes a layer dense. A list is a pattern repeated over the layers:
    ``[0, 16]`` is every other layer, ``[8, 8, 16, 16]`` a pyramid of four layers."""
    top_k: PositiveInt = 2
    """Experts that compute each token."""
    expert_intermediate_size: PositiveInt = 512
    """Inner width of one expert."""
    expert_activation: Literal["swiglu", "clamped_swiglu", "gelu", "relu"] = "swiglu"
    """What an expert does between its two products: ``swiglu`` and ``clamped_swiglu`` (gpt-oss) have a gate, ``gelu``
    (exact) and ``relu`` have none."""
    expert_limit: Annotated[float, Field(gt=0)] = 7.0
    """Where ``clamped_swiglu`` clamps: the gate from above, the other half from both sides."""
    expert_alpha: Annotated[float, Field(gt=0)] = 1.702
    """Factor of the gate inside the sigmoid of ``clamped_swiglu``."""
    expert_bias: bool = False
    """Whether both products of an expert have biases."""
    shared_expert_intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Inner width of an expert that every token passes; 0 means none."""
    normalize_top_k: bool | Literal["before"] = True
    """Whether the weights of a token's chosen experts are scaled to sum to one; must be false where top_k is 1.
    ``before`` takes the softmax of the chosen experts' logits instead of dividing their scores by the sum (gpt-oss);
    with softmax scores that gives the same numbers as true."""
    top_k_scale: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies the weights of a token's chosen experts (DeepSeek's routed scaling factor)."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: experts compete, or each is judged alone (DeepSeek-V3)."""
    router_min_score: float | None = None
    """Score that an expert needs to compute a token, the token's best one excepted; top_k is then the most that do.
    Default: always top_k experts."""
    expert_groups: PositiveInt = 1
    """Groups of experts, of which a token uses the top_k_groups best (DeepSeek-V3); must divide num_experts."""
    top_k_groups: PositiveInt = 1
    """Groups that a token may use."""
    balance_bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step by which a bias per expert, which enters the choice and not the weights, moves against the load after each
    optimizer step (loss-free balance); DeepSeek-V3 uses 0.001. 0 means no bias."""
    capacity_factor: float | None = None
    """Most assignments of an expert in a forward pass, as a multiple of its even share; what exceeds it is dropped and
    counted. Of 0 or less as Tutel means it: 0 drops nothing, -f is the largest need, at most what f gives. Default:
    nothing is dropped."""
    capacity_formula: Literal["deepspeed", "tutel"] = "deepspeed"
    """Whose rounding and weights: ``deepspeed`` is ceil(tokens / experts * factor * top_k), survivors' weights are
    normalised again; ``tutel`` is top_k * int(factor * ceil(tokens / experts)), survivors' weights stay."""
    min_capacity: Annotated[int, Field(ge=0)] | None = None
    """Assignments that an expert takes at least, whatever the factor. Default: the formula's own, 4 for DeepSpeed's and
    0 for Tutel's."""
    drop_by: Literal["position", "probability", "confidence"] = "position"
    """What an expert over capacity keeps: earlier choices and tokens, its highest scores, or the surest tokens."""
    shared_expert_gate: bool = False
    """Whether the shared expert is multiplied by a sigmoid of the token (Qwen2-MoE)."""
    residual_expert: bool = False
    """Whether a dense layer of the experts' shape stands beside the experts, mixed with them per token (PR-MoE)."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normalised per head before the rotary embedding."""
    attention_bias: bool = False
    """Whether the query, key, value and output projections have biases."""
    sliding_window: PositiveInt | None = None
    """How many tokens back attention sees, the token itself included. Default: all."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary embedding's wavelengths."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding table."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream are scaled down
    by sqrt(2 x num_layers)."""

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            divisors = [n for n in range(1, 65) if self.hidden_size % n == 0]
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_heads ({self.num_heads}); "
                f"try num_heads = {', '.join(map(str, divisors))}, or set head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"head_dim ({self.resolved_head_dim}) must be even for the rotary embedding; "
                "change num_heads or set head_dim"
            )
        if self.num_heads % self.resolved_num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be divisible by num_kv_heads "
                f"({self.resolved_num_kv_heads}); try num_kv_heads = 1 or {self.num_heads}"
            )
        pattern = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        if not pattern or self.num_layers % len(pattern):
            raise ValueError(
                f"the num_experts pattern has {len(pattern)} entries, which do not divide num_layers "
                f"({self.num_layers}); give one number, or a list whose length divides num_layers"
            )
        smallest = min((n for n in pattern if n), default=None)
        if smallest is not None and self.top_k > smallest:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed num_experts ({smallest}); "
                f"set model.top_k to at most {smallest} or model.num_experts to at least {self.top_k}"
            )
        self._check_groups()
        self._check_capacity()
        self._check_residual_expert()
        if self.router_min_score is not None and (self.expert_groups > 1 or self.capacity_factor is not None):
            raise ValueError(
                f"router_min_score ({self.router_min_score}) gives tokens different numbers of experts, for which "
                f"expert_groups ({self.expert_groups}) and capacity_factor ({self.capacity_factor}) are not defined; "
                "drop the one or the others"
            )
        return self

    def _check_groups(self) -> None:
        if self.top_k_groups > self.expert_groups:
            raise ValueError(
                f"top_k_groups ({self.top_k_groups}) must not exceed expert_groups ({self.expert_groups})"
            )
        for num_experts in filter(None, self.experts_per_layer):
            if num_experts % self.expert_groups:
                divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
                raise ValueError(
                    f"num_experts ({num_experts}) must be divisible by expert_groups ({self.expert_groups}); "
                    f"try {', '.join(map(str, divisors))}"
                )
            reachable = num_experts // self.expert_groups * self.top_k_groups
            if self.top_k > reachable:
                raise ValueError(
                    f"top_k ({self.top_k}) must not exceed the {reachable} experts of {self.top_k_groups} of "
                    f"{self.expert_groups} groups; lower top_k or raise top_k_groups"
                )

    def _check_capacity(self) -> None:
        if self.capacity_factor is None or self.capacity_factor > 0:
            return
        if self.capacity_formula != "tutel":
            raise ValueError(
                f"capacity_factor ({self.capacity_factor}) of 0 or less has a meaning in Tutel's formula only; set "
                "model.capacity_formula=tutel, or a factor above 0"
            )

    def _check_residual_expert(self) -> None:
        has_dense_form = self.expert_activation in ("gelu", "relu") or (
            self.expert_activation == "swiglu" and not self.expert_bias
        )
        if self.residual_expert and not has_dense_form:
            raise ValueError(
                f"residual_expert (true) needs a dense layer of the experts' form, and there is none for "
                f"expert_activation ({self.expert_activation}) with expert_bias ({str(self.expert_bias).lower()}); use "
                "gelu or relu, or swiglu without biases"
            )

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """The number of experts of each layer, 0 for a dense one."""
        pattern = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        return tuple(pattern) * (self.num_layers // len(pattern))

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def resolved_num_kv_heads(self) -> int:
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads


class DataConfig(Section):
    """Where text comes from and how it becomes sequences of tokens."""

    source: str = "stdlib"
    """``stdlib`` (source and documentation text of the running Python's standard library, no download), a
    file, a folder, or ``hf:NAME`` or ``hf:NAME:CONFIG`` for a Hugging Face dataset (extra ``data``)."""
    format: Literal["auto", "text", "jsonl", "parquet", "chat"] = "auto"
    """How files are read; ``auto`` goes by the file name's ending. ``chat``: JSONL of conversations, of which the
    assistant's answers are learned."""
    text_field: str = "text"
    """The field that holds the text, for JSONL, Parquet and Hugging Face datasets."""
    chat_template: str | None = None
    """A file with a Jinja2 chat template. Default: the one of the model or tokenizer folder."""
    chat_answers: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned; ``last`` for templates that write an answer otherwise once others
    follow it, such as those that then leave out its reasoning."""
    chat_date: str | None = None
    """What a chat template takes for today, as YYYY-MM-DD. Default: the day on which the run begins."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What becomes of conversations longer than ``sequence_length``; ``drop`` and ``truncate`` lose text and count
    it."""
    tokenizer: str | None = None
    """A ``tokenizer.json`` or a folder that holds one. Default: a byte-level BPE is trained on the corpus."""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Vocabulary of the tokenizer that is trained on the corpus: 256 bytes, one end-of-text token, merges."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per training sequence."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents kept away from training, chosen by content hash; of a single document, its tail."""
    attend_across_documents: bool = False
    """Whether tokens may attend to earlier documents packed into the same sequence."""
    seed: int = 0
    """Seed of the shuffle."""

    @field_validator("chat_date", mode="before")
    @classmethod
    def _check_date(cls, value: object) -> str | None:
        """Takes TOML's own dates and texts alike."""
        if value is None:
            return None
        try:
            return date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(
                f"chat_date ({value!r}) must be a day as YYYY-MM-DD, such as 2025-05-01"
            ) from None


class TrainingConfig(Section):
    """The loop: how long, how fast, how often."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_sequences: PositiveInt = 8
    """Sequences per optimizer step, over all micro-batches."""
    micro_batch_sequences: PositiveInt | None = None
    """Sequences per forward pass; must divide batch_sequences. Default: batch_sequences."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    final_learning_rate_ratio: Fraction = 0.1
    """Learning rate at the last step as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """``cosine``: warm-up, then half a cosine. ``wsd``: warm-up, stable, then a linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up."""
    decay_fraction: Fraction = 0.2
    """Share of the steps that the decay of ``wsd`` takes, at least one step; 0 stays at the peak to the end."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; applies to matrices by role, never to norms, biases or embeddings."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term in the denominator."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 never clips."""
    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    """Coefficient of the expert load-balance loss, averaged over MoE layers."""
    balance_scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """Over which tokens the balance loss wants experts evenly used: all of a forward pass, or each sequence."""
    router_z_loss: Annotated[float, Field(ge=0)] = 0.001
    """Coefficient of the router z-loss, averaged over MoE layers."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; bf16 keeps fp32 master weights. ``auto`` measures which
    GEMM is faster on this machine and prints its choice."""
    seed: int = 0
    """Seed of the initial weights."""
    log_every: PositiveInt = 10
    """Steps between lines of the metrics file."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations. Default: only after the last step."""
    evaluate_tokens: PositiveInt = 65536
    """Held-out tokens per evaluation during the run."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints. Default: only at the end and on interruption."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; older ones are deleted after a new one was verified."""
    max_skipped_steps: PositiveInt = 5
    """Steps in a row with NaN or Inf in loss or gradients after which the run stops."""

    @model_validator(mode="after")
    def _check_training(self) -> TrainingConfig:
        if self.dtype == "fp16":
            raise ValueError(
                "dtype fp16 is refused: its range overflows in router logits and gradients without loss scaling; "
                "use bf16 (fp32 master weights are kept) or fp32"
            )
        if self.batch_sequences % self.resolved_micro_batch:
            divisors = [n for n in range(1, self.batch_sequences + 1) if self.batch_sequences % n == 0]
            raise ValueError(
                f"batch_sequences ({self.batch_sequences}) must be divisible by micro_batch_sequences "
                f"({self.micro_batch_sequences}); try {', '.join(map(str, divisors))}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps}); "
                f"try warmup_steps = {self.steps // 10}"
            )
        if self.schedule == "wsd" and self.warmup_steps + self.num_decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and the decay of wsd ({self.num_decay_steps} steps, "
                f"decay_fraction {self.decay_fraction}) overlap in {self.steps} steps; "
                f"try decay_fraction = {(self.steps - self.warmup_steps) / self.steps:.2g} or fewer warmup_steps"
            )
        return self

    @property
    def num_decay_steps(self) -> int:
        """Steps of the decay of ``wsd``."""
        return max(1, round(self.decay_fraction * self.steps)) if self.decay_fraction > 0 else 0

    @property
    def resolved_micro_batch(self) -> int:
        return self.micro_batch_sequences or self.batch_sequences


class MemoryConfig(Section):
    """What is kept, recomputed or cut into pieces to save memory."""

    activation_checkpointing: bool = False
    """Whether each block is recomputed in the backward pass; routing is replayed, not decided again."""
    loss_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time while the loss is computed."""


class RuntimeConfig(Section):
    """The machine: device, threads, kernels, trackers."""

    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    threads: PositiveInt | None = None
    """Threads for CPU arithmetic. Default: torch's own choice."""
    kernel: Literal["auto", "reference", "torch", "native"] = "auto"
    """Implementation of every operator that has several; ``native`` computes no gradients and is for running models."""
    tensorboard: bool = False
    """Whether metrics are also written for TensorBoard (extra ``train``)."""

    @model_validator(mode="after")
    def _check_kernel(self) -> RuntimeConfig:
        if self.kernel == "native":
            raise ValueError(
                "kernel (native) computes no gradients, so nothing can be trained with it; use auto, which takes the "
                "fastest that has gradients, or torch or reference"
            )
        return self


class Config(Section):
    """Everything a run can be told."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """The shape of the decoder."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Where text comes from."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """The loop."""
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    """What is kept and what is recomputed."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    """The machine."""
