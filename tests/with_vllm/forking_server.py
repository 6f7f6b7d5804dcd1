"""vLLM's API server, whose processes are forked, as they are on GPUs. On CPUs vLLM spawns them: the
engine and each of its workers import vLLM anew."""

from __future__ import annotations

import multiprocessing
import runpy

import frozen_imports  # noqa: F401
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor

if __name__ == "__main__":
    for module in (utils, multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
