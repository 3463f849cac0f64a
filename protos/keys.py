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
# Up to so many bytes a sample is faster spelt out next to its headers and hashed in one call than fed part by part;
# so many bytes are spelt out at a time, few enough to stay in a processor's cache.
_SPELT_BYTES = 32 * 1024
_BLOCK_BYTES = 256 * 1024


def sample_keys(fingerprint: str, inputs: Mapping[str, NDArray[np.generic]]) -> list[bytes]:
    """The keys of the n samples in `inputs`, each tensor [n, ...]. The same whatever batch a sample comes in."""
    parts = []  # what is hashed, in order: the same bytes for every sample, then [n, bytes] of its own
    header = _part(_DOMAIN) + _part(fingerprint.encode())
    for name in sorted(inputs):
        array = inputs[name]
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        shape = little.shape[1:]
        size = little.nbytes // len(little)
        header += (
            _part(name.encode())
            + _part(little.dtype.name.encode())
            + _part(struct.pack(f"<{len(shape)}q", *shape))
            + struct.pack("<Q", size)
        )
        parts.append((header, little.reshape(-1).view(np.uint8).reshape(len(little), size)))
        header = b""
    width = sum(len(header) + rows.shape[1] for header, rows in parts)
    return _spelt_out(parts, width) if width <= _SPELT_BYTES else _part_by_part(parts)


_Parts = list[tuple[bytes, NDArray[np.uint8]]]


def _spelt_out(parts: _Parts, width: int) -> list[bytes]:
    n = len(parts[0][1])
    at_once = max(1, _BLOCK_BYTES // width)
    block = np.empty((min(n, at_once), width), np.uint8)
    column, columns = 0, []
    for header, rows in parts:
        block[:, column : column + len(header)] = np.frombuffer(header, np.uint8)
        columns.append(slice(column + len(header), column + len(header) + rows.shape[1]))
        column = columns[-1].stop
    content = memoryview(block.reshape(-1))  # type: ignore[arg-type] # numpy 2.4's stubs forget that it is one
    keys = []
    for start in range(0, n, at_once):
        count = min(at_once, n - start)
        for (_, rows), place in zip(parts, columns, strict=True):
            block[:count, place] = rows[start : start + count]
        keys += [blake3(content[at : at + width]).digest(length=KEY_BYTES) for at in range(0, count * width, width)]
    return keys


def _part_by_part(parts: _Parts) -> list[bytes]:
    keys = []
    for i in range(len(parts[0][1])):
        hasher = blake3()
        for header, rows in parts:
            hasher.update(header)
            hasher.update(rows[i])
        keys.append(hasher.digest(length=KEY_BYTES))
    return keys


def _part(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
