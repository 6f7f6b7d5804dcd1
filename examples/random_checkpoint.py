"""Random checkpoints of a Qwen2-shaped model, in the layout of Hugging Face.

Written and read with numpy alone, so that what the engine holds can be checked against slices that
no code of the engine has touched.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Array = np.ndarray[Any, np.dtype[Any]]

SIZES = {
    "full": {"num_hidden_layers": 20, "hidden_size": 1536, "intermediate_size": 3840},
    "small": {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512},
}
GAIN = {"q_proj": 4.0, "k_proj": 4.0, "down_proj": 4.0}
"""Sharp attention and strong MLPs: without, greedy decoding of random weights runs in circles."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def model_config(size: str) -> dict[str, Any]:
    """The ``config.json`` of a model: ``full`` is 1.02 GB in 243 tensors, ``small`` is 8 MB."""
    hidden = SIZES[size]["hidden_size"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "vocab_size": 4096,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **SIZES[size],
    }


def tensor_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor, in the order of the layers."""
    hidden, inner, vocab = (config[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        layer[f"self_attn.{name}_proj.bias"] = (rows,)
    layer |= {
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int, files: int = 4) -> int:
    """Write config, index and ``files`` shards of random bfloat16 weights; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards = _split(tensor_shapes(config), files)
    paths = [folder / f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)]
    total = 2 * sum(math.prod(shape) for shard in shards for shape in shard.values())
    places = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    with ThreadPoolExecutor(2) as pool:
        seeds = [seed * files + i for i in range(files)]
        list(pool.map(_write_shard, paths, shards, seeds))
    return total


def _split(shapes: dict[str, Shape], files: int) -> list[dict[str, Shape]]:
    names = list(shapes)
    bounds = [len(names) * i // files for i in range(files + 1)]
    return [{name: shapes[name] for name in names[a:b]} for a, b in itertools.pairwise(bounds)]


def _write_shard(path: Path, shapes: dict[str, Shape], seed: int) -> None:
    """One safetensors file: the header's length, the header, the tensors one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    random = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            file.write(_random_bfloat16(random, name, shape).data)


def _random_bfloat16(random: np.random.Generator, name: str, shape: Shape) -> Array:
    """Bits of bfloat16 numbers, of the size that keeps activations near 1; norms are positive.

    Sign and mantissa are random, the exponent is fixed: numbers in +-[x, 2x), as good as normal
    ones here, and made at the speed of the generator.
    """
    words = random.integers(0, 1 << 64, -(-math.prod(shape) // 4), dtype=np.uint64)
    bits = words.view(np.uint16)[: math.prod(shape)].reshape(shape)
    module = name.split(".")[-2]
    is_norm = module.endswith("norm")
    scale = 1.0 if is_norm or module == "embed_tokens" else shape[-1] ** -0.5
    exponent = 127 + round(math.log2(scale * GAIN.get(module, 1.0) / 1.5))
    bits &= 0x007F if is_norm else 0x807F
    bits |= exponent << 7
    return bits


def expected_digests(folder: Path, tp: int) -> list[dict[str, str]]:
    """SHA-256 of what each of ``tp`` workers should hold, by parameter, sliced from the files."""
    tensors = dict(_map_tensors(folder))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: _rank_digests(tensors, rank, tp), range(tp)))


def _map_tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])
        del header["__metadata__"]
        for name, entry in header.items():
            start = 8 + header_size + entry["data_offsets"][0]
            count = math.prod(entry["shape"])
            yield name, np.frombuffer(data, np.uint16, count, start).reshape(entry["shape"])


def _rank_digests(tensors: dict[str, Array], rank: int, tp: int) -> dict[str, str]:
    digests = {}
    for parameter, names in _parameters(tensors).items():
        digest = hashlib.sha256()
        for name in names:
            digest.update(np.ascontiguousarray(_slice(name, tensors[name], rank, tp)).data)
        digests[parameter] = digest.hexdigest()
    return digests


def _parameters(tensors: dict[str, Array]) -> dict[str, list[str]]:
    """The engine's parameters and the tensors that each is stacked of."""
    first_parts = {parts[0]: (fused, parts) for fused, parts in FUSED.items()}
    later_parts = {part for parts in FUSED.values() for part in parts[1:]}
    parameters = {}
    for name in tensors:
        *path, module, kind = name.split(".")
        fused, parts = first_parts.get(module, (module, (module,)))
        if module not in later_parts:
            parameters[".".join([*path, fused, kind])] = [
                ".".join([*path, part, kind]) for part in parts
            ]
    return parameters


def _slice(name: str, tensor: Array, rank: int, tp: int) -> Array:
    module = name.split(".")[-2]
    if module.endswith("norm"):
        return tensor
    if module in ("o_proj", "down_proj"):
        columns = tensor.shape[1] // tp
        return tensor[:, rank * columns : (rank + 1) * columns]
    rows = tensor.shape[0] // tp
    return tensor[rank * rows : (rank + 1) * rows]
