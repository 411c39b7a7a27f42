"""Seeds out of seeds."""

from __future__ import annotations

import numpy as np


def derived_seed(*words: int) -> int:
    """A seed that depends on all `words` (not negative), as good as independent of that of others
    (32 bits)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])
