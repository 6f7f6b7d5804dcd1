"""A Llama/Qwen2-like transformer with the tensor names of Hugging Face, split over ranks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from parallel_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    load_whole,
    loadable,
)

STACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Projections of a Hugging Face checkpoint, and the fused one of the model that holds them."""


@dataclass(frozen=True)
class ModelConfig:
    """What the model reads of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    qkv_bias: bool
    rms_norm_eps: float
    rope_theta: float
    dtype: torch.dtype

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json`` of a Llama or Qwen2 model."""
        raw = json.loads((folder / "config.json").read_text())
        raw["dtype"] = getattr(torch, raw["torch_dtype"])
        raw["qkv_bias"] = raw["model_type"] == "qwen2"
        return cls(**{field.name: raw[field.name] for field in fields(cls)})

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = loadable(load_whole, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, for one sequence, on one rank."""

    def __init__(self, storage: torch.Tensor) -> None:
        """``storage`` is ``[2, layers, capacity, heads, dim]``."""
        self.keys, self.values = storage
        self.length = 0

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new tokens; returns all of that layer, ``[tokens, heads, dim]``."""
        end = self.length + len(keys)
        self.keys[layer, self.length : end] = keys
        self.values[layer, self.length : end] = values
        return self.keys[layer, :end], self.values[layer, :end]


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[tokens, heads, dim]``, the halves paired as Llama does."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads; the heads are split over the ranks."""

    def __init__(self, tp: TensorParallel, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        tp.share(config.num_key_value_heads, "key/value heads")
        self.group = config.num_attention_heads // config.num_key_value_heads
        kv_size = config.num_key_value_heads * config.head_dim
        parts = {"q_proj": config.hidden_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = ColumnParallelLinear(tp, config.hidden_size, parts, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(tp, config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, cache: KVCache) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x))
        q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = cache.extend(self.layer, k, v)
        k, v = (part.repeat_interleave(self.group, dim=1) for part in (k, v))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        # Only the prompt comes as several tokens, and it comes first: the mask is square.
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(x[0].transpose(0, 1).flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, tp: TensorParallel, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = ColumnParallelLinear(tp, hidden, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = RowParallelLinear(tp, inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, tp: TensorParallel, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(tp, config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(tp, config)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, cache: KVCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, tp: TensorParallel, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(tp, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(tp, config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)

    def forward(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        positions = torch.arange(len(tokens), device=tokens.device) + cache.length
        angles = positions[:, None] * self.frequencies
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles, cache)
        cache.length += len(tokens)
        return self.norm(x)


class CausalLM(nn.Module):
    """The whole model, with the parameter names of Hugging Face but for the fused projections."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.model = Decoder(tp, config)
        self.lm_head = ColumnParallelLinear(tp, config.hidden_size, {"lm_head": config.vocab_size})

    def forward(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits of the token that follows, ``[vocab_size]`` in float32, the same on every rank."""
        (local,) = self.lm_head(self.model(tokens, cache)[-1])
        logits = local.new_zeros(self.config.vocab_size, dtype=torch.float32)
        self.tp.narrow(logits, 0, len(local)).copy_(local)
        self.tp.all_reduce(logits)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy this rank's slices of whole checkpoint tensors; any part of a checkpoint will do.

        Returns the names of the parameters written to.

        Raises:
            ValueError: a tensor is not of this model, or of another shape.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            target, shard_id = _destination(name)
            if target not in parameters:
                raise ValueError(f"the model has no place for the checkpoint's tensor {name!r}")
            param = parameters[target]
            try:
                param.weight_loader(param, tensor, shard_id)  # type: ignore[attr-defined]
            except ValueError as error:
                raise ValueError(f"cannot load {name!r} into {target!r}: {error}") from error
            loaded.add(target)
        return loaded

    def checkpoint_names(self) -> set[str]:
        """The names of the checkpoint tensors that together fill every parameter."""
        names = set()
        for name, _ in self.named_parameters():
            module = name.split(".")[-2]
            parts = [part for part, fused in STACKED.items() if fused == module] or [module]
            names |= {name.replace(f"{module}.", f"{part}.") for part in parts}
        return names

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The ``max_tokens`` most likely tokens after ``prompt``; called on every rank alike."""
        vocabulary = range(self.config.vocab_size)
        if not prompt or any(token not in vocabulary for token in prompt):
            raise ValueError(f"a prompt needs tokens, each in {vocabulary}: {prompt}")
        cache = self._empty_cache(len(prompt) + max_tokens)
        output: list[int] = []
        while len(output) < max_tokens:
            fresh = output[-1:] or prompt
            logits = self(torch.tensor(fresh, device=self.lm_head.weight.device), cache)
            output.append(int(logits.argmax()))
        return output

    def _empty_cache(self, capacity: int) -> KVCache:
        config = self.config
        heads = config.num_key_value_heads // self.tp.size
        shape = (2, config.num_hidden_layers, capacity, heads, config.head_dim)
        return KVCache(self.lm_head.weight.new_empty(shape))


def _destination(name: str) -> tuple[str, str]:
    """The parameter that a checkpoint tensor goes into, and which part of it that is."""
    *path, module, kind = name.split(".")
    return ".".join([*path, STACKED.get(module, module), kind]), module


_default_dtype_lock = threading.Lock()


def new_model(config: ModelConfig, tp: TensorParallel, device: torch.device) -> CausalLM:
    """A model with memory for its weights and nothing in it yet."""
    with _default_dtype_lock:  # it belongs to the whole process
        previous = torch.get_default_dtype()
        torch.set_default_dtype(config.dtype)
        try:
            with device:
                return CausalLM(config, tp)
        finally:
            torch.set_default_dtype(previous)
