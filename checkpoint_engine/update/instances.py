"""Updates that go on without the engine instances that fail.

A rank whose engine failed sends it nothing more, but still feeds the other ranks. An instance is
updated on all of its ranks, or failed on all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from checkpoint_engine.errors import CollectiveError, EngineError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.report import InstanceFailure
from checkpoint_engine.handover.link import WorkerLink
from checkpoint_engine.update.order import check_request
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.world.call import Call

_LOOK_SECONDS = 0.05  # between two looks at what other ranks of the instance wrote


class Instance(WorkerSession):
    """This rank's engine where updates go on without those that fail: its failure is noted, not
    raised.

    What this rank itself or another one fails in is raised.
    """

    def __init__(
        self,
        link: WorkerLink,
        request: Future[Any],
        call: Call,
        instances: Sequence[str],
        version: str,
    ) -> None:
        """``instances``: the name of each member's instance."""
        self._instances = dict(zip(call.members, instances, strict=True))
        self._name = self._instances[call.rank]
        self._key = f"engine/{self._name}"
        self._is_shared = instances.count(self._name) > 1
        self._request = request
        self._failure: InstanceFailure | None = None
        self._patience: Deadline | None = None
        self._looked = 0.0
        super().__init__(link, call, version)
        self.failed: list[InstanceFailure] = []

    @property
    def worker_checks_sums(self) -> bool:
        """A failed engine loads nothing that would have to be checked."""
        return self._failure is not None or super().worker_checks_sums

    def has_answered(self) -> bool:
        return self._failure is not None or super().has_answered()

    @property
    def reads_needs(self) -> bool:
        """A failed engine reads nothing at all."""
        return self._failure is not None or super().reads_needs

    def ask_held(self, tensors: str, hashes: bytes) -> None:
        super().ask_held(tensors, hashes)
        self._forget_held()

    def leave_out(self, bits: bytes, is_settled: bool) -> None:
        super().leave_out(bits, is_settled)
        self._forget_held()

    def _forget_held(self) -> None:
        """A failed engine is no reason to send anything."""
        if self._failure is not None:
            self.held = None

    def check(self) -> None:
        """A guard of the call: notes that this rank's engine is gone."""
        if self._failure is None:
            try:
                self._check_engine()
                super().check()
            except EngineError as error:
                self._fail(error)

    def announce_end(self, planned: Sequence[str | None], go_on: bool = True) -> None:
        """The post hook has to wait for the other ranks of this instance."""
        super().announce_end(planned, go_on=False)

    def finish(self, request: Future[Any]) -> None:
        """Have the post hook run, unless another rank of this instance failed.

        Raises:
            CollectiveError: none is updated.
        """
        self._settle("loaded")
        super().finish(request)
        self._settle("finished")

    def _settle(self, what: str) -> None:
        """The ranks agree which instances have failed."""
        mine = b"" if self._failure is None else self._failure.model_dump_json().encode()
        told = self._call.all_gather(what, mine)
        first = {failure.instance: failure for failure in self.failed}
        for failure in (InstanceFailure.model_validate_json(blob) for blob in told if blob):
            first.setdefault(failure.instance, failure)
        self.failed = list(first.values())
        if first.keys() == set(self._instances.values()):
            cause = self.failed[0]
            text = f"no engine could be updated; the first: {cause.error}"
            raise CollectiveError(text, "no_engine_left", rank=cause.rank)
        if self._name in first and self._failure is None:
            self._fail(EngineError(f"rank {first[self._name].rank} of this instance failed"))

    def attempt(self, action: Callable[[], None]) -> None:
        if self._failure is not None:
            self._call.check()
            return
        # Half of the time that is left: other instances need some, too.
        self._patience = Deadline(max(self._call.deadline.remaining() / 2, 1e-3))
        try:
            action()
        except EngineError as error:
            self._fail(error)
        finally:
            self._patience = None

    def _check(self) -> None:
        super()._check()
        self._check_engine()

    def _check_engine(self) -> None:
        """Raise if this rank's engine cannot be updated any more."""
        check_request(self._request)
        if self._patience is not None and self._patience.remaining() == 0.0:
            raise EngineError(
                f"the engine took more than {self._patience.seconds:.3g} s, half of the time that "
                "was left"
            )
        now = time.monotonic()
        if self._is_shared and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._call.store.check([self._key]):
                raise EngineError("another rank of this instance failed")

    def _fail(self, error: Exception) -> None:
        if self._failure is not None:  # the guard has noted it
            return
        self._failure = InstanceFailure(
            instance=self._name,
            ranks=[rank for rank, name in self._instances.items() if name == self._name],
            rank=self._call.rank,
            phase=self.phase,
            error=str(error),
        )
        self._call.tell(self._key, json.dumps(str(error)).encode())
        self._link.abort(str(error) or type(error).__name__)
