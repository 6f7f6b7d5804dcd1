"""Cold start: ``--load-format checkpoint_engine`` fills a starting engine out of the host memory of
a running world of parameter servers, by P2P. No weight file is read.

Where the world's metas are: ``PS_METAS_URL``, a server's ``/v1/metas``; or ``metas_file`` or
``metas_url`` in ``--model-loader-extra-config``. Without any, or where none can be had, the engine
loads its files, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from checkpoint_engine import settings

Weights = Iterator[tuple[str, torch.Tensor]]


class CheckpointEngineLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's own loader of files, which gets its tensors elsewhere. Every worker reads all of them
    and keeps its part, as from files."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        self._file = extra.pop("metas_file", "")
        self._url = extra.pop("metas_url", "") or settings.metas_url()
        files = replace(load_config, load_format="auto", model_loader_extra_config=extra)
        super().__init__(files)

    def download_model(self, model_config: Any) -> None:
        """Only what will be read: no files where there are metas."""
        if self._find_metas() is None:
            super().download_model(model_config)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        """Every tensor of the world's checkpoint; of a drafter with a checkpoint of its own, its
        files'."""
        self.counter_before_loading_weights = time.perf_counter()
        target = get_current_vllm_config().model_config.model
        metas = self._find_metas() if model_config.model == target else None
        if metas is None:
            return super().get_all_weights(model_config, model)
        from checkpoint_engine.integrations.vllm.source import read_weights

        return read_weights(metas)

    def _find_metas(self) -> Any:
        """By owner, see ``get_metas``; ``None``: the files are to be loaded."""
        import httpx

        from checkpoint_engine.client import fetch_metas
        from checkpoint_engine.world.metas_file import decode_metas

        where = self._file or self._url
        if not where:
            logger.warning("no metas to load from (PS_METAS_URL): loading the model's files")
            return None
        try:
            if self._file:
                return decode_metas(Path(self._file).read_bytes())
            return fetch_metas(self._url, token=settings.http_token() or None)
        except (OSError, ValueError, httpx.HTTPError) as error:
            logger.warning("no metas from {}: {}; loading the model's files", where, error)
            return None
