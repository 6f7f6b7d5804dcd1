"""The tensors of large models by name, dtype and shape: what a plan needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoint_engine.data_types import ParameterMeta

_BLOCK = 128
"""Rows and columns of an fp8 weight that share a scale."""


@dataclass(frozen=True)
class MixtureOfExperts:
    """The shape of a model, after its ``config.json``. ``latent``: ranks of MLA's projections."""

    name: str
    layers: int
    dense_layers: int
    experts: int
    hidden: int
    expert_width: int
    dense_width: int
    vocabulary: int
    heads: int
    head: int
    kv_heads: int = 0
    latent: tuple[int, int] | None = None
    shared_experts: int = 0
    fp8: bool = False

    def tensors(self) -> list[ParameterMeta]:
        return list(self._all())

    def _all(self) -> Iterator[ParameterMeta]:
        yield self._plain("model.embed_tokens.weight", self.vocabulary, self.hidden)
        yield self._plain("lm_head.weight", self.vocabulary, self.hidden)
        for layer in range(self.layers):
            yield from self._layer(f"model.layers.{layer}", layer < self.dense_layers)

    def _layer(self, prefix: str, dense: bool) -> Iterator[ParameterMeta]:
        yield self._plain(f"{prefix}.input_layernorm.weight", self.hidden)
        yield self._plain(f"{prefix}.post_attention_layernorm.weight", self.hidden)
        yield from self._attention(f"{prefix}.self_attn")
        if dense:
            yield from self._mlp(f"{prefix}.mlp", self.dense_width)
            return
        yield self._plain(f"{prefix}.mlp.gate.weight", self.experts, self.hidden)
        for expert in range(self.experts):
            yield from self._mlp(f"{prefix}.mlp.experts.{expert}", self.expert_width)
        if self.shared_experts:
            width = self.expert_width * self.shared_experts
            yield from self._mlp(f"{prefix}.mlp.shared_experts", width)

    def _attention(self, prefix: str) -> Iterator[ParameterMeta]:
        wide = self.heads * self.head
        if self.latent is None:
            narrow = self.kv_heads * self.head
            shapes = {"q_proj": (wide, self.hidden), "k_proj": (narrow, self.hidden)}
            shapes |= {"v_proj": (narrow, self.hidden), "o_proj": (self.hidden, wide)}
        else:
            query, key_value = self.latent
            shapes = {"q_a_proj": (query, self.hidden), "q_b_proj": (wide * 3 // 2, query)}
            shapes |= {"kv_a_proj_with_mqa": (key_value + 64, self.hidden)}
            shapes |= {"kv_b_proj": (wide * 2, key_value), "o_proj": (self.hidden, wide)}
        for name, (rows, columns) in shapes.items():
            yield from self._linear(f"{prefix}.{name}", rows, columns)

    def _mlp(self, prefix: str, width: int) -> Iterator[ParameterMeta]:
        yield from self._linear(f"{prefix}.gate_proj", width, self.hidden)
        yield from self._linear(f"{prefix}.up_proj", width, self.hidden)
        yield from self._linear(f"{prefix}.down_proj", self.hidden, width)

    def _linear(self, prefix: str, rows: int, columns: int) -> Iterator[ParameterMeta]:
        if not self.fp8:
            yield self._plain(f"{prefix}.weight", rows, columns)
            return
        scales = torch.Size([-(-rows // _BLOCK), -(-columns // _BLOCK)])
        yield ParameterMeta(
            name=f"{prefix}.weight",
            dtype=torch.float8_e4m3fn,
            shape=torch.Size([rows, columns]),
        )
        yield ParameterMeta(name=f"{prefix}.weight_scale_inv", dtype=torch.float32, shape=scales)

    @staticmethod
    def _plain(name: str, *shape: int) -> ParameterMeta:
        return ParameterMeta(name=name, dtype=torch.bfloat16, shape=torch.Size(shape))


GLM_45_AIR = MixtureOfExperts(
    "GLM-4.5-Air bf16", 47, 1, 128, 4096, 1408, 10944, 151552, 96, 128, kv_heads=8, shared_experts=1
)
QWEN3_235B = MixtureOfExperts(
    "Qwen3-235B-A22B bf16", 94, 0, 128, 4096, 1536, 0, 151936, 64, 128, kv_heads=4
)
DEEPSEEK_V31 = MixtureOfExperts(
    "DeepSeek-V3.1 fp8", 62, 3, 256, 7168, 2048, 18432, 129280, 128, 128,
    latent=(1536, 512), shared_experts=1, fp8=True,
)  # fmt: skip
KIMI_K2 = MixtureOfExperts(
    "Kimi-K2 fp8", 61, 1, 384, 7168, 2048, 18432, 163840, 64, 128,
    latent=(1536, 512), shared_experts=1, fp8=True,
)  # fmt: skip
