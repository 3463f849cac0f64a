"""The content key of a sample: golden, independent of the batch, different for whatever differs."""

import struct

import numpy as np
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from protos.keys import KEY_BYTES, sample_keys

X = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def test_golden_keys():
    keys = sample_keys("f00d", {"x": X})
    assert [key.hex() for key in keys] == ["17130a92a505120f0442fe3db2360d81", "113d5e980575ab03b2f6ced4931d890b"]
    two = sample_keys(
        "f00d", {"mask": np.array([[1], [0]], dtype=np.int64), "ids": np.array([[7, 8], [9, 10]], np.int32)}
    )
    assert two[0].hex() == "da73dc9fc82340a4b463043ac1e8acd2"


def test_a_key_does_not_depend_on_its_batch_or_on_the_order_of_inputs():
    inputs = {"a": X, "b": X.astype(np.float32)}
    both = sample_keys("f", inputs)
    one = sample_keys("f", {name: inputs[name][1:] for name in reversed(inputs)})
    assert one == both[1:]
    assert all(len(key) == KEY_BYTES for key in both)


def test_byte_order_and_layout_of_memory_do_not_matter():
    x = np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    assert sample_keys("f", {"x": x.astype(">i4")}) == sample_keys("f", {"x": x})
    assert sample_keys("f", {"x": np.asfortranarray(x)}) == sample_keys("f", {"x": x})


def test_whatever_differs_has_another_key():
    zeros = np.zeros((1, 2, 4), np.uint8)
    keys = [
        *sample_keys("f", {"x": zeros}),
        *sample_keys("g", {"x": zeros}),  # another teacher
        *sample_keys("f", {"y": zeros}),  # another name
        *sample_keys("f", {"x": zeros.reshape(1, 4, 2)}),  # another shape
        *sample_keys("f", {"x": zeros.view(np.int32)}),  # another dtype, the same bytes
        *sample_keys("f", {"x": zeros, "y": zeros}),
        *sample_keys("f", {"x": np.concatenate([zeros, zeros], axis=1)}),
    ]
    assert len(set(keys)) == len(keys)


@given(st.lists(st.binary(min_size=3, max_size=3), min_size=2, max_size=2, unique=True))
def test_other_bytes_have_another_key(rows):
    first, second = sample_keys("f", {"x": np.frombuffer(b"".join(rows), np.uint8).reshape(2, 3)})
    assert first != second


@given(st.integers(1, 5), st.sampled_from([1, 31_000, 33_000, 70_000]), st.booleans())
def test_keys_of_any_size_are_the_hash_of_the_message_that_the_module_describes(n, size, two):
    def part(data):
        return struct.pack("<Q", len(data)) + data

    inputs = {"x": np.arange(n * size, dtype=np.uint32).astype(np.uint8).reshape(n, size)}
    if two:
        inputs["a"] = np.arange(2 * n, dtype=np.int64).reshape(n, 2)
    messages = [part(b"preceptor.sample.v1") + part("é".encode())] * n
    for name in sorted(inputs):
        for i, row in enumerate(inputs[name]):
            shape = struct.pack("<q", len(row))
            messages[i] += part(name.encode()) + part(row.dtype.name.encode()) + part(shape) + part(row.tobytes())
    assert sample_keys("é", inputs) == [blake3(message).digest(length=KEY_BYTES) for message in messages]
