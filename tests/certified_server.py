"""The right engine of ``certified_engine.py``, with the routes of vLLM that ``certify`` asks.

certified_server.py MODEL LOAD_FORMAT PORT
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from certified_engine import Right
from checkpoint_engine.certify.engine import Start


class Handler(BaseHTTPRequestHandler):
    engine: Right

    def do_GET(self) -> None:
        self._answer({"version": "1"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        self._answer(getattr(self, self.path.strip("/").replace("/", "_"))(**body))

    def reset_prefix_cache(self) -> dict[str, Any]:
        return {}

    def collective_rpc(self, method: str, args: list[Any], timeout: float) -> dict[str, Any]:
        return {"results": self.engine.call(method, *args)}

    def v1_completions(self, prompt: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        assert options == {"temperature": 0, "ignore_eos": True, "logprobs": 0,
                           "return_token_ids": True, "prompt_logprobs": 0}  # fmt: skip
        (found,) = self.engine.generate([prompt], max_tokens)
        said = found.log_probabilities[: len(prompt) - 1]
        told = [{str(t): {"logprob": p}} for t, p in zip(prompt[1:], said, strict=True)]
        choice = {"token_ids": found.tokens, "prompt_logprobs": [None, *told]}
        choice["logprobs"] = {"token_logprobs": found.log_probabilities[len(said) :]}
        return {"choices": [choice]}

    def _answer(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


if __name__ == "__main__":
    model, load_format, port = sys.argv[1:]
    Handler.engine = Right(Start(Path(model), load_format == "dummy", 1, "", 60))
    HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
