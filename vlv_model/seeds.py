"""Seeds of random draws: hashes of integers such as (seed, epoch, key), the same on every machine.

Results that are stored depend on both formulas, so neither can replace the other: drawn scenes and the
noise of trainings on `mix`, sampled captions on `mix_bytes`. Reconstructions use `seed ^ key`.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def mix(*values: int) -> int:
    """A 64-bit hash of integers of any size, by numpy's SeedSequence."""
    return int(np.random.SeedSequence([v % 2**64 for v in values]).generate_state(1, np.uint64)[0])


def mix_bytes(*values: int) -> int:
    """A 64-bit hash of int64 numbers, by BLAKE2b over their bytes."""
    message = struct.pack(f"<{len(values)}q", *values)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
