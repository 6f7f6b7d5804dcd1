"""Which weights a model holds, as its worker knows it. Imported in every inference worker."""

from __future__ import annotations


class WeightVersion:
    """The id of the update whose weights a model holds, and whether it holds them whole.

    States: ``initial`` (no update has touched it), ``updating``, ``complete``, ``failed`` (partly
    written; another update repairs it).
    """

    def __init__(self) -> None:
        self._version: str | None = None
        self._state = "initial"
        self._updating: str | None = None

    def begin(self, version: str | None) -> None:
        """The first byte of ``version`` is about to be written; ``None``: the server named none."""
        self._version, self._state, self._updating = None, "updating", version

    def complete(self) -> None:
        """All of it is loaded, the post hook included."""
        self._version, self._state, self._updating = self._updating, "complete", None

    def fail(self) -> None:
        """It will not be loaded whole. Changes nothing where nothing was written."""
        if self._state == "updating":
            self._state = "failed"

    def describe(self) -> dict[str, str | None]:
        """``version``: of the weights it holds; ``None`` unless they are whole and have one.
        ``updating``: what is, or was last, being written over them."""
        return {"version": self._version, "state": self._state, "updating": self._updating}
