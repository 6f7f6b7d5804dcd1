"""Imports what an engine needs, once for all processes that are forked from this one.

vLLM collects garbage whenever an engine starts or ends, and so does what learns a loader: half a
second each, where everything is looked at that vLLM has imported. So all that is frozen, and stays
so when vLLM thaws its own.
"""

from __future__ import annotations

import gc
import importlib

MODULES = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.distributed.device_communicators.cpu_communicator",
    "vllm.model_executor.models",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "engine_worker",
]

for _name in MODULES:
    importlib.import_module(_name)
gc.collect()
gc.freeze()
gc.unfreeze = lambda: None
