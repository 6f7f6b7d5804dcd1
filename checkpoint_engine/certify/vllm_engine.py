"""vLLM in this process, or in those that it starts by itself."""

from __future__ import annotations

import contextlib
import gc
import shlex
from typing import Any

from checkpoint_engine import settings
from checkpoint_engine.certify.engine import EXTENSION, OrderError, Output, Start


class VllmEngine:
    """``vllm.LLM``. ``--engine-args`` are the options of ``vllm serve``."""

    def __init__(self, start: Start) -> None:
        settings.set_unless_set("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError as error:
            raise OrderError(
                f"vLLM cannot be imported ({error}): install it, or choose another --engine"
            ) from error
        self._timeout = start.timeout
        self._llm: Any = LLM.from_engine_args(_engine_args(start))

    def describe(self) -> dict[str, str]:
        import vllm

        return {"engine": "vllm", "version": str(vllm.__version__)}

    def call(self, method: str, *args: Any) -> list[Any]:
        results: list[Any] = self._llm.collective_rpc(method, self._timeout, args)
        return results

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._llm.reset_prefix_cache()
        found = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(
                temperature=0,
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                prompt_logprobs=0,
            ),
            use_tqdm=False,
        )
        return [_output(one) for one in found]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def _engine_args(start: Start) -> Any:
    """What the user gave, and what ``certify`` needs. Raises ``OrderError`` if vLLM does not know
    an option."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    try:
        options = parser.parse_args([*shlex.split(start.arguments), f"--model={start.model}"])
    except SystemExit as error:  # argparse has written the reason to stderr
        raise OrderError(f"vLLM does not take --engine-args {start.arguments!r}") from error
    given = EngineArgs.from_cli_args(options)
    given.tensor_parallel_size = start.workers
    given.load_format = start.load_format
    given.worker_extension_cls = given.worker_extension_cls or EXTENSION
    given.skip_tokenizer_init = given.disable_log_stats = True
    return given


def _output(found: Any) -> Output:
    """Of vLLM's ``RequestOutput``."""
    tokens = list(found.outputs[0].token_ids)
    prompt = [*(found.prompt_logprobs or [])][1:]  # nothing comes before the first
    said = zip(found.prompt_token_ids[1:], prompt, strict=False)
    told = [probabilities[token].logprob for token, probabilities in said]
    with contextlib.suppress(TypeError):  # none were told
        told += [one[t].logprob for t, one in zip(tokens, found.outputs[0].logprobs, strict=True)]
    return Output(tokens, told)
