"""What each owner may use of the service, and uses.

Tokens are counted where they enter (prompts, training data) and where they are drawn. They are
let in while the owner's allowance is above zero, and may bring it below: then nothing more enters
until time has refilled it. So no request is too large for an allowance, none is let in twice, and
over any time the average is the quota's (a token bucket with debt; it holds one minute's worth).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from ..primitives.errors import Busy, InvalidInput, OutOfCapacity

MINUTE_S = 60.0


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an owner may use; None: as much as there is.

    Attributes:
        runs: training runs open at once.
        tokens_per_minute: trained on, read as prompts, and sampled, together.
        resident_bytes: of the open runs' adapters, gradients and optimizer states.
    """

    runs: int | None = None
    tokens_per_minute: int | None = None
    resident_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, limit in msgspec.structs.asdict(self).items():
            if limit is not None and limit < 1:
                raise InvalidInput(f"a quota's {name} must be at least 1, got {limit}")

    def check_runs(self, count: int) -> None:
        """
        Raises:
            OutOfCapacity: with `count` runs open there can be no more.
        """
        if self.runs is not None and count >= self.runs:
            raise OutOfCapacity(
                f"{count} training runs are open, and your key allows {self.runs}: let one go "
                "first (unload it, or finish its client)"
            )

    def check_bytes(self, new: int, others: int) -> None:
        """
        Raises:
            OutOfCapacity: a new run's bytes do not fit beside those of the others.
        """
        limit = self.resident_bytes
        if limit is not None and new + others > limit:
            raise OutOfCapacity(
                f"the run's adapter, gradients and optimizer need {new:,} bytes, your other open "
                f"runs have {others:,}, and your key allows {limit:,}: take a smaller rank or "
                "fewer targets, or let a run go first"
            )

    def __str__(self) -> str:
        limits = (
            f"{limit:,} {name.replace('_', ' ')}"
            for name, limit in msgspec.structs.asdict(self).items()
            if limit is not None
        )
        return ", ".join(limits) or "no limit"


@dataclass
class _Allowance:
    """`left` tokens at `stamp`, of the clock's seconds, and `rate` more a minute."""

    left: float
    stamp: float
    rate: int

    def refill(self, now: float, rate: int) -> None:
        self.left = min(self.left + (now - self.stamp) * rate / MINUTE_S, rate)
        self.stamp, self.rate = now, rate


class TokenRates:
    """How many tokens owners may still use now. Samples are counted in the threads that bring them.

    Args:
        quota: of an owner, as it is at the moment.
        clock: seconds that only go up.
    """

    def __init__(
        self, quota: Callable[[str], Quota], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quota, self._clock = quota, clock
        self._allowances: dict[str, _Allowance] = {}
        self._lock = threading.Lock()

    def check(self, owner: str) -> None:
        """
        Raises:
            Busy: the owner has used up the allowance; says when there is some again.
        """
        allowance = self._after(owner, 0)
        if allowance is not None and allowance.left < 1:
            wait = (1 - allowance.left) * MINUTE_S / allowance.rate
            raise Busy(
                f"your key's {allowance.rate:,} tokens per minute are used up; "
                f"more are let in {wait:.1f} s from now",
                wait,
            )

    def left(self, owner: str) -> float | None:
        """Tokens that the owner may use now; None: as many as it likes."""
        allowance = self._after(owner, 0)
        return None if allowance is None else allowance.left

    def take(self, owner: str, tokens: int) -> None:
        """Count tokens as used."""
        self._after(owner, tokens)

    def _after(self, owner: str, used: int) -> _Allowance | None:
        """The owner's allowance when `used` tokens are taken from it; None where there is no limit."""
        rate = self._quota(owner).tokens_per_minute
        with self._lock:
            if rate is None:
                self._allowances.pop(owner, None)
                return None
            now = self._clock()
            allowance = self._allowances.setdefault(owner, _Allowance(rate, now, rate))
            allowance.refill(now, rate)
            allowance.left -= used
            return replace(allowance)
