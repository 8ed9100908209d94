"""Whether there is room in the cache for one more request.

All of a request's known tokens must fit at once, or it would be admitted only to be
preempted; and a share of the blocks stays free for those who run already. Knows
nothing of the order of requests, of seats or of token budgets.
"""

from __future__ import annotations

from midspan.errors import SettingsError
from midspan.scheduling.block_manager import BlockManager, PrefixHit
from midspan.scheduling.request import Request


class AdmissionRoom:
    """Looks up cached beginnings and compares what is missing with what is free.

    The last refusal is remembered with the blocks that it wanted, so that a long prompt is
    not looked up again in every step.
    """

    __slots__ = ("_block_manager", "_refused", "_reserve", "_wanted")

    def __init__(self, block_manager: BlockManager, watermark: float) -> None:
        """Leave ``watermark``, a share of the blocks, free for those who run.

        Raises:
            SettingsError: the share is not from 0 to below 1.
        """
        if not 0.0 <= watermark < 1.0:
            raise SettingsError(f"The watermark is a share from 0 to below 1, not {watermark}.")
        self._block_manager = block_manager
        self._reserve = tuple(int(usage.total * watermark) for usage in block_manager.usage().values())
        self._refused: Request | None = None
        self._wanted: tuple[int, ...] = ()

    def is_refused_still(self, request: Request) -> bool:
        """Whether it was the last one refused, and the blocks that it wanted are not free yet."""
        return request is self._refused and not self._fits(self._wanted)

    def find(self, request: Request, *, alone: bool) -> PrefixHit | None:
        """The cached beginning of a waiting request, if the rest fits; None: it does not.

        Args:
            request: waits.
            alone: no request runs, so it fits in any case.
        """
        hit = self._block_manager.find_prefix(request)
        wanted = self._block_manager.needed_for(hit, len(request.token_ids))
        if alone or self._fits(wanted):
            self._refused = None
            return hit
        self._refused = request
        self._wanted = wanted
        return None

    def _fits(self, wanted: tuple[int, ...]) -> bool:
        available = self._block_manager.available()
        return all(free >= want + spare for free, want, spare in zip(available, wanted, self._reserve, strict=True))
