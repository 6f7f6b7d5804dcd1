"""``python -m checkpoint_engine --uds PATH``: what ``checkpoint-engine serve`` does."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_engine.cli.serve import serve


def main(argv: Sequence[str] | None = None) -> None:
    """Serve this rank's ``ParameterServer`` over HTTP until SIGINT or SIGTERM."""
    serve.main(argv, prog_name="checkpoint-engine", help_option_names=["-h", "--help"])


if __name__ == "__main__":
    main()
