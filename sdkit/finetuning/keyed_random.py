"""Random numbers by name: the same key draws the same numbers, whatever was drawn before.

A generator that walks along would have to be stored to resume, and its numbers would depend on how
a batch is cut and on which process draws first. These depend on the key alone.
"""

import hashlib
from contextlib import contextmanager

import torch


def keyed_generator(*key) -> torch.Generator:
    """Returns a CPU generator for a key.

    Args:
        key: Numbers and words, such as (seed, "train", step, position).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def keyed_dropout(device, *key):
    """Lets dropout draw by a key too, from torch's own generators: they come back as they were.

    All but that of MPS, which `fork_rng` does not keep: it goes on from the key.

    Args:
        device: Where the model is.
        key: As of `keyed_generator`.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield
