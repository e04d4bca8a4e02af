"""Seeds: every random choice is a function of the run's seed and of its position in the run."""

from functools import lru_cache

import numpy as np

STREAMS = ("order", "crop", "mask", "validation-crop", "validation-mask", "weights", "labelled", "step")
"""Independent sources of randomness in a run; a new one goes to the end, so that the others keep their draws."""


def seed_at(seed: int, stream: str, *position: int) -> int:
    """Derive a 63-bit seed for one random choice, independent of every other (stream, position) of the run."""
    sequence = np.random.SeedSequence([seed, STREAMS.index(stream), *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def rng_at(seed: int, stream: str, *position: int) -> np.random.Generator:
    """Make the generator that `seed_at` seeds."""
    return np.random.default_rng(seed_at(seed, stream, *position))


def volume_at(position: int, num_volumes: int, seed: int) -> int:
    """Return the index of the volume at a position of the endless stream.

    Every pass over the data is a permutation of its own.
    """
    number, within = divmod(position, num_volumes)
    return int(order_of_pass(number, num_volumes, seed)[within])


@lru_cache(2)
def order_of_pass(number: int, num_volumes: int, seed: int) -> np.ndarray:
    """Draw the permutation of one pass over the data; the last two are kept, since a batch may span both."""
    return rng_at(seed, "order", number).permutation(num_volumes)
