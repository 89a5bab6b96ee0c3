"""Random numbers by name: the same key draws the same numbers, whatever was drawn before.

A generator that walks along would have to be stored to resume, and its numbers would depend on how
a batch is cut and on which process draws first. These depend on the key alone.
"""

import hashlib

import torch


def keyed_generator(*key) -> torch.Generator:
    """Returns a CPU generator for a key.

    Args:
        key: Numbers and words, such as (seed, "train", step, position).
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
