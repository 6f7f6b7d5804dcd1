"""Checkpoints made on the spot: real configurations, random weights, safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB, LAYERS = 128, 256, 512, 4
HEADS, KV_HEADS = 4, 2
EXPERTS, EXPERT_INNER = 8, 64

KINDS = ("dense", "tied", "moe", "int8", "gptoss")


def write_model(kind: str, folder: Path, seed: int) -> Path:
    """A model of ``kind`` with the weights of ``seed``; tensors in an order that no engine
    needs."""
    folder.mkdir(parents=True)
    tensors = _tensors(kind, seed)
    if kind == "int8":
        tensors = _quantised(tensors)
    names = sorted(tensors, key=lambda name: (hash_of(name, seed), name))
    half = len(names) // 2
    parts = {"model-00001-of-00002": names[:half], "model-00002-of-00002": names[half:]}
    for part, of_part in parts.items():
        save_file({name: tensors[name] for name in of_part}, folder / f"{part}.safetensors")
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {n: f"{part}.safetensors" for part, names in parts.items() for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(kind), indent=2))
    return folder


def hash_of(name: str, seed: int) -> int:
    """A shuffle that is the same everywhere."""
    return sum((i + seed) * byte for i, byte in enumerate(name.encode(), 1)) % 97


def _config(kind: str) -> dict[str, Any]:
    common = {
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_INNER if kind == "gptoss" else INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": kind == "tied",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "moe":
        return common | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": EXPERT_INNER,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if kind == "gptoss":  # its loader writes into the parameters of experts and sinks itself
        return common | {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            "attention_bias": True,
            "swiglu_limit": 7.0,
        }
    config = common | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    if kind == "int8":
        config["quantization_config"] = _int8_config()
    return config


def _int8_config() -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights | {"dynamic": False},
                "input_activations": inputs | {"dynamic": True},
            }
        },
    }


def _shapes(kind: str) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    }
    if kind == "moe":
        layer |= {f"self_attn.{x}_norm.weight": (HIDDEN // HEADS,) for x in "qk"}
        layer["mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            layer |= _mlp(f"mlp.experts.{expert}", EXPERT_INNER)
    elif kind == "gptoss":
        widths = {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}
        layer |= {f"self_attn.{x}_proj.bias": (width,) for x, width in widths.items()}
        layer |= {
            "self_attn.sinks": (HEADS,),
            "mlp.router.weight": (EXPERTS, HIDDEN),
            "mlp.router.bias": (EXPERTS,),
            "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * EXPERT_INNER),
            "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * EXPERT_INNER),
            "mlp.experts.down_proj": (EXPERTS, EXPERT_INNER, HIDDEN),
            "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        }
    else:
        widths = {"q": HIDDEN, "k": kv, "v": kv}
        layer |= {f"self_attn.{x}_proj.bias": (width,) for x, width in widths.items()}
        layer |= _mlp("mlp", INNER)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if kind != "tied":
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def _mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, HIDDEN),
        f"{prefix}.up_proj.weight": (inner, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, inner),
    }


def _tensors(kind: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(shape, generator=generator) * 0.3
            if len(shape) > 1
            else 1 + 0.1 * torch.randn(shape, generator=generator)
        ).to(torch.bfloat16)
        for name, shape in _shapes(kind).items()
    }


def _quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    quantised = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            quantised[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        quantised[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
        quantised[f"{name}_scale"] = scale.to(torch.bfloat16)
    return quantised
