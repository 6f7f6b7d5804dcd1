"""Checkpoints made on the spot: real configurations, random weights, safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB, LAYERS = 128, 256, 512, 4
HEADS, KV_HEADS = 4, 2


def write_model(folder: Path, seed: int) -> Path:
    """A dense model with the weights of ``seed``; tensors in an order that no engine needs."""
    folder.mkdir(parents=True)
    tensors = _tensors(seed)
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
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def hash_of(name: str, seed: int) -> int:
    """A shuffle that is the same everywhere."""
    return sum((i + seed) * byte for i, byte in enumerate(name.encode(), 1)) % 97


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    widths = {"q": HIDDEN, "k": kv, "v": kv}
    layer |= {f"self_attn.{x}_proj.bias": (width,) for x, width in widths.items()}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(shape, generator=generator) * 0.3
            if len(shape) > 1
            else 1 + 0.1 * torch.randn(shape, generator=generator)
        ).to(torch.bfloat16)
        for name, shape in _shapes().items()
    }
