"""The content key of a sample: what a cached answer is filed under.

BLAKE3, 16 bytes, over a domain tag, the teacher's fingerprint, and each tensor's name, dtype, shape and bytes in the
order of the names; every part is length-prefixed and every integer little-endian, so that no two different samples
spell the same message. The server hashes what it received: nobody can plant an answer.
"""

import struct
from collections.abc import Mapping

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

KEY_BYTES = 16
_DOMAIN = b"preceptor.sample.v1"


def sample_keys(fingerprint: str, inputs: Mapping[str, NDArray[np.generic]]) -> list[bytes]:
    """The keys of the n samples in `inputs`, each tensor [n, ...]. The same whatever batch a sample comes in."""
    start = blake3(_part(_DOMAIN) + _part(fingerprint.encode()))
    tensors = []
    for name in sorted(inputs):
        array = inputs[name]
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        shape = little.shape[1:]
        size = little.nbytes // len(little)
        header = (
            _part(name.encode())
            + _part(little.dtype.name.encode())
            + _part(struct.pack(f"<{len(shape)}q", *shape))
            + struct.pack("<Q", size)
        )
        tensors.append((header, little.reshape(-1).view(np.uint8).reshape(len(little), size)))
    keys = []
    for i in range(len(tensors[0][1])):
        hasher = start.copy()
        for header, rows in tensors:
            hasher.update(header)
            hasher.update(rows[i])
        keys.append(hasher.digest(length=KEY_BYTES))
    return keys


def _part(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
