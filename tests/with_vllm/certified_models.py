"""Tiny random models of many architectures, for ``make certify`` and the tests.

Transformers makes each model and writes its files, so names, shapes and configurations are those of
real checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 512
GROUP = 32
"""Inputs that share a scale in models of four bits."""

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **_TOKENS,
}
_GROUPED = {**_DENSE, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 32}
_MLA = {
    **_DENSE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the next one 576, which vLLM's kernel for CPUs is made for
    "qk_rope_head_dim": 64,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Tiny:
    """One model.

    Attributes:
        config: the class in transformers, which also says what the model is.
        options: of the configuration.
        quantise: makes (tensors, what the configuration says of it) of the tensors.
        tensor_parallel: whether it is certified at size 2 as well.
        model: the class in transformers, where its automatic choice is another one.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    quantise: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None = None
    tensor_parallel: bool = False
    model: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, 2) if self.tensor_parallel else (1,)


def write(name: str, folder: Path, seed: int = 1) -> Path:
    """Write model ``name`` of ``MODELS`` with the weights of ``seed`` into ``folder``."""
    import transformers

    tiny = MODELS[name]
    config = getattr(transformers, tiny.config)(**tiny.options)
    config.dtype = torch.bfloat16
    maker = transformers.AutoModelForCausalLM.from_config
    if tiny.model:
        maker = getattr(transformers, tiny.model)
    model = maker(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_((0.1 * noise).to(parameter.dtype))
    model.save_pretrained(folder)
    if tiny.quantise is not None:
        tensors = load_file(folder / "model.safetensors")
        described = tiny.quantise(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **described}))
    return folder


# Quantised weights


def _linear(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith("proj.weight")]


def _int8(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A scale for each output channel; inputs are quantised as they come."""
    for name in _linear(tensors):
        weight = tensors[f"{name}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    inputs = {**numbers, "strategy": "token", "dynamic": True}
    weights = {**numbers, "strategy": "channel", "dynamic": False}
    return _compressed("int-quantized", weights, inputs)


def _w4a16(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    for name in _linear(tensors):
        weight = tensors.pop(f"{name}.weight")
        numbers, scale = _four_bits(weight)
        tensors[f"{name}.weight_packed"] = _pack(numbers, 1)
        tensors[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    numbers = {"num_bits": 4, "type": "int", "symmetric": True}
    weights = {**numbers, "strategy": "group", "group_size": GROUP, "dynamic": False}
    return _compressed("pack-quantized", weights, None)


def _compressed(form: str, weights: dict[str, Any], inputs: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    described = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    described |= {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    return {"quantization_config": described}


def _gptq(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    for name in _linear(tensors):
        numbers, scale = _four_bits(tensors.pop(f"{name}.weight"))
        inputs, groups = numbers.shape[1], scale.shape[1]
        zeros = torch.full((groups, numbers.shape[0]), 7)  # GPTQ stores one less than the zero
        tensors[f"{name}.qweight"] = _pack(numbers.t(), 0)
        tensors[f"{name}.qzeros"] = _pack(zeros, 1)
        tensors[f"{name}.scales"] = scale.t().contiguous().to(torch.float16)
        tensors[f"{name}.g_idx"] = (torch.arange(inputs) // GROUP).to(torch.int32)
    described = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    return _half({"quantization_config": {**described, "sym": True, "lm_head": False}}, tensors)


def _awq(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which number lies where in the 32 bits
    for name in _linear(tensors):
        numbers, scale = _four_bits(tensors.pop(f"{name}.weight"))
        zeros = torch.full((scale.shape[1], numbers.shape[0]), 8)
        tensors[f"{name}.qweight"] = _pack(numbers.t(), 1, order)
        tensors[f"{name}.qzeros"] = _pack(zeros, 1, order)
        tensors[f"{name}.scales"] = scale.t().contiguous().to(torch.float16)
    described = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    return _half({"quantization_config": {**described, "version": "gemm"}}, tensors)


def _half(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """These formats are made for float16."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.dtype == torch.bfloat16 else tensor
    return {**described, "dtype": "float16"}


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from 0 to 15, and the scale of each group of inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2) / 7
    numbers = (groups / scale.unsqueeze(2)).round().clamp(-8, 7) + 8
    return numbers.flatten(1).to(torch.int64), scale


def _pack(numbers: torch.Tensor, dim: int, order: list[int] | None = None) -> torch.Tensor:
    """Eight numbers in 32 bits, along ``dim``."""
    eights = numbers.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    eights = eights[..., order or list(range(8))]
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).contiguous()


_GPT = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512}
_GPT |= {"bos_token_id": 0, "eos_token_id": 1}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

MODELS = {
    "llama": Tiny("LlamaConfig", _HEADS, tensor_parallel=True),
    "qwen2-tied": Tiny(
        "Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}, tensor_parallel=True
    ),
    "qwen3-moe": Tiny("Qwen3MoeConfig", {**_HEADS, **_EXPERTS}, tensor_parallel=True),
    "mixtral": Tiny("MixtralConfig", {**_HEADS, "num_local_experts": 4}, tensor_parallel=True),
    "olmoe": Tiny("OlmoeConfig", {**_GROUPED, "num_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss": Tiny(
        "GptOssConfig",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        tensor_parallel=True,
    ),
    "deepseek-v2": Tiny("DeepseekV2Config", {**_MLA, "topk_method": "group_limited_greedy"}),
    "deepseek-v3": Tiny("DeepseekV3Config", {**_MLA, "topk_method": "noaux_tc"}),
    "glm4-moe": Tiny(
        "Glm4MoeConfig",
        {
            **_HEADS,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        tensor_parallel=True,
    ),
    "llama4-text": Tiny(
        "Llama4TextConfig",
        {
            **_HEADS,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
        },
        model="Llama4ForCausalLM",
    ),
    "gemma2": Tiny("Gemma2Config", {**_HEADS, "query_pre_attn_scalar": 32}),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        {**_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 64},
        tensor_parallel=True,
    ),
    "phi3": Tiny("Phi3Config", _GROUPED),
    "gpt2": Tiny("GPT2Config", _GPT),
    "gpt-j": Tiny("GPTJConfig", {**_GPT, "rotary_dim": 16}),
    "gpt-neox": Tiny("GPTNeoXConfig", _DENSE),
    "opt": Tiny("OPTConfig", {**_DENSE, "ffn_dim": 256, "word_embed_proj_dim": 128}),
    "falcon": Tiny("FalconConfig", {**_DENSE, "new_decoder_architecture": False}),
    "bloom": Tiny(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 3, "n_head": 4, **_TOKENS},
    ),
    "starcoder2": Tiny("Starcoder2Config", _GROUPED),
    "granite-moe": Tiny(
        "GraniteMoeConfig", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "mamba2": Tiny(
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 32,
            "n_groups": 1,
            **_TOKENS,
        },
    ),
    "llama-int8": Tiny("LlamaConfig", _HEADS, _int8, tensor_parallel=True),
    "llama-w4a16": Tiny("LlamaConfig", _HEADS, _w4a16),
    "llama-gptq": Tiny("LlamaConfig", _HEADS, _gptq),
    "llama-awq": Tiny("LlamaConfig", _HEADS, _awq),
}

CI = (
    ("llama", 1),
    ("qwen2-tied", 2),
    ("qwen3-moe", 2),
    ("mixtral", 1),
    ("olmoe", 1),
    ("gpt-oss", 1),
    ("gpt-oss", 2),
    ("glm4-moe", 1),
    ("phi3", 1),
    ("llama-int8", 2),
)
"""What CI certifies: models, and their tensor-parallel sizes."""
