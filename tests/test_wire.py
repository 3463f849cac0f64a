"""The bytes on the wire: golden for every encoding, round trips, and hostile messages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos import teacher_pb2 as pb
from protos import wire

DTYPES = {"uint8": 1, "float16": 2, "float32": 3, "int32": 4, "int64": 5}
LOGITS = np.array([[1.0, 3.0, 2.0, 0.0], [0.5, 0.5, -1.0, 0.5]], dtype=np.float32)


@pytest.mark.parametrize(
    ("dtype", "golden"),
    [
        ("uint8", "0a017810011a020201220201ff"),
        ("float16", "0a017810021a0202012204003c00c0"),
        ("float32", "0a017810031a02020122080000803f000000c0"),
        ("int32", "0a017810041a020201220801000000feffffff"),
        ("int64", "0a017810051a02020122100100000000000000feffffffffffffff"),
    ],
)
def test_golden_bytes_of_every_dtype(dtype, golden):
    array = np.array([[1], [255 if dtype == "uint8" else -2]]).astype(dtype)
    assert wire.encode_tensor("x", array).SerializeToString(deterministic=True).hex() == golden


@pytest.mark.parametrize(
    ("spec", "values", "indices", "tail_mass"),
    [
        (pb.OutputSpec(name="logits"), LOGITS.astype("<f4").tobytes().hex(), "", ""),
        (
            pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT32),
            "0000803f0000404000000040000000000000003f0000003f000080bf0000003f",
            "",
            "",
        ),
        (
            pb.OutputSpec(name="logits", encoding=pb.ENCODING_FLOAT16),
            "003c0042004000000038003800bc0038",
            "",
            "",
        ),
        (
            pb.OutputSpec(name="logits", encoding=pb.ENCODING_TOP_K, k=2),
            "00004040000000400000003f0000003f",
            "01000000020000000000000001000000",
            "a920f43de24bc23e",
        ),
    ],
)
def test_golden_bytes_of_every_encoding(spec, values, indices, tail_mass):
    answers = wire.encode_answers(LOGITS, spec)
    assert answers.values.hex() == values
    assert answers.indices.hex() == indices
    assert answers.tail_mass.hex() == tail_mass


def test_every_enum_value_has_a_codec():
    for name, code in pb.DataType.items():
        if code:
            assert wire.dtype_code(wire.dtype_of(code)) == code, name
    for name, code in pb.Encoding.items():
        spec = pb.OutputSpec(name="logits", encoding=code, k=3)
        assert len(wire.decode_answers(wire.encode_answers(LOGITS, spec))[0]) in {2, 4}, name


@given(
    hnp.arrays(
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=hnp.array_shapes(min_dims=1, max_dims=wire.MAX_AXES, max_side=3),
    )
)
def test_tensors_survive_the_wire(array):
    message = pb.Tensor.FromString(wire.encode_tensor("x", array).SerializeToString())
    back = wire.decode_tensor(message)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


def test_any_memory_layout_is_sent_row_major():
    array = np.arange(24, dtype=">i4").reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(wire.decode_tensor(wire.encode_tensor("x", array)), array)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-100, 100, width=32),
    ),
    st.data(),
)
def test_answers_survive_the_wire(logits, data):
    dense = wire.decode_answers(wire.encode_answers(logits, pb.OutputSpec(name="logits")))
    np.testing.assert_array_equal(dense, logits)
    half = wire.decode_answers(wire.encode_answers(logits, pb.OutputSpec(encoding=pb.ENCODING_FLOAT16)))
    np.testing.assert_array_equal(half, logits.astype(np.float16).astype(np.float32))

    k = data.draw(st.integers(1, logits.shape[1]))
    temperature = data.draw(st.floats(0.5, 20, width=32))
    spec = pb.OutputSpec(encoding=pb.ENCODING_TOP_K, k=k, temperature=temperature)
    top = wire.decode_answers(wire.encode_answers(logits, spec))
    assert top.classes == logits.shape[1]
    np.testing.assert_array_equal(top.values, np.sort(logits, axis=1)[:, ::-1][:, :k])
    np.testing.assert_array_equal(np.take_along_axis(logits, top.indices, axis=1), top.values)
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    inside = np.take_along_axis(probabilities, top.indices, axis=1).sum(axis=1)
    np.testing.assert_allclose(top.tail_mass, 1 - inside, atol=1e-6)


def test_tail_mass_keeps_what_subtraction_would_cancel():
    logits = np.array([[0.0, -40.0, -41.0]], dtype=np.float32)
    top = wire.top_k(logits, 1, 1.0)
    assert top.tail_mass[0] == pytest.approx(np.exp(-40.0) + np.exp(-41.0), rel=1e-6)


def tensor(**fields):
    return pb.Tensor(**{"name": "x", "dtype": pb.DATA_TYPE_FLOAT32, "shape": [2, 3], "data": bytes(24)} | fields)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (tensor(data=bytes(23)), ["23 bytes", "needs 24"]),
        (tensor(shape=[]), ["0 axes"]),
        (tensor(shape=[1] * 9, data=bytes(4)), ["9 axes"]),
        (tensor(shape=[0, 3], data=b""), ["axis below 1"]),
        (tensor(shape=[-2, -3]), ["axis below 1"]),
        (tensor(shape=[2**62, 2**62]), ["needs"]),  # would be 2**126 bytes
        (tensor(shape=[1] * 100_000), ["100000 axes"]),
    ],
)
def test_hostile_tensors_are_refused(message, words):
    with pytest.raises(wire.MalformedMessage) as refused:
        wire.decode_tensor(message)
    assert all(word in str(refused.value) for word in words)
    assert len(str(refused.value)) < 1000


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10), st.binary(max_size=64), st.integers(0, 8))
def test_no_hostile_tensor_gets_past_its_own_length(shape, data, dtype):
    message = pb.Tensor(name="x", dtype=dtype, shape=shape, data=data)
    try:
        array = wire.decode_tensor(message)
    except wire.MalformedMessage:
        return
    assert array.nbytes == len(data)


@given(st.binary(max_size=80))
def test_no_hostile_answer_gets_past_its_own_length(body):
    for encoding in (1, 2, 3):
        answers = pb.Answers(
            encoding=encoding, shape=[2, 4], k=2, temperature=1, values=body, indices=body, tail_mass=body
        )
        try:
            decoded = wire.decode_answers(answers)
        except wire.MalformedMessage:
            continue
        assert (decoded if encoding < 3 else decoded.values).size in {8, 4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [4, 4]}, "needs 64"),
        ({"shape": [2]}, r"\[n, classes\]"),
        ({"encoding": pb.ENCODING_TOP_K, "k": 5}, "outside 1..4"),
        ({"encoding": pb.ENCODING_TOP_K, "k": 2, "temperature": float("nan")}, "temperature"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(change, words):
    answers = pb.Answers(shape=[2, 4], values=bytes(32), temperature=1)
    answers.MergeFrom(pb.Answers(**{key: value for key, value in change.items() if key != "shape"}))
    if "shape" in change:
        answers.shape[:] = change["shape"]
    with pytest.raises(wire.MalformedMessage, match=words):
        wire.decode_answers(answers)


def test_a_class_outside_the_answer_is_refused():
    answers = wire.encode_answers(LOGITS, pb.OutputSpec(encoding=pb.ENCODING_TOP_K, k=1))
    answers.indices = np.array([0, 4], dtype="<i4").tobytes()
    with pytest.raises(wire.MalformedMessage, match=r"outside 0\.\.3"):
        wire.decode_answers(answers)


def test_unusable_requests_name_the_fix():
    with pytest.raises(wire.MalformedMessage, match=r"outputs.k: 0 is outside 1\.\.4"):
        wire.check_spec(pb.OutputSpec(encoding=pb.ENCODING_TOP_K), classes=4)
    with pytest.raises(wire.MalformedMessage, match=r"outputs.temperature: nan"):
        wire.check_spec(pb.OutputSpec(encoding=pb.ENCODING_TOP_K, k=4, temperature=float("nan")), classes=4)
    with pytest.raises(wire.MalformedMessage, match="ask for FLOAT32"):
        wire.encode_answers(LOGITS * 1e5, pb.OutputSpec(encoding=pb.ENCODING_FLOAT16))
    with pytest.raises(wire.MalformedMessage, match="float64 has no place"):
        wire.encode_tensor("x", np.zeros((1, 1)))


@given(st.integers(1, 50), st.integers(1, 300), st.sampled_from([1, 2, 3]), st.data())
def test_a_replys_size_is_known_before_it_is_made(n, classes, encoding, data):
    spec = pb.OutputSpec(name="logits", encoding=encoding, k=data.draw(st.integers(1, classes)), temperature=4)
    answers = wire.encode_answers(np.zeros((n, classes), np.float32), spec)
    reply = pb.LabelResponse(fingerprint="f" * 32, answers=[answers], sources=[pb.SOURCE_COALESCED] * n)
    assert reply.ByteSize() <= wire.answers_bytes(spec, n, classes) <= reply.ByteSize() + 1024


def test_unknown_values_are_told_apart_from_malformed_ones():
    with pytest.raises(wire.UnknownValue, match="DataType 77 is not known here; one of DATA_TYPE_UINT8"):
        wire.decode_tensor(tensor(dtype=77))
    with pytest.raises(wire.UnknownValue, match="Encoding 9"):
        wire.encode_answers(LOGITS, pb.OutputSpec(encoding=9))


def test_a_field_from_the_future_is_refused_wherever_it_stands():
    future = bytes([0xF8, 0x07, 0x01])  # field 127, varint 1
    wire.refuse_unknown_fields(pb.LabelRequest(inputs=[tensor()]))
    with pytest.raises(wire.UnknownValue, match="LabelRequest: field number 127"):
        wire.refuse_unknown_fields(pb.LabelRequest.FromString(future))
    inner = pb.Tensor.FromString(tensor().SerializeToString() + future)
    with pytest.raises(wire.UnknownValue, match="Tensor: field number 127"):
        wire.refuse_unknown_fields(pb.LabelRequest(inputs=[tensor(), inner]))


def test_inputs_must_agree_on_their_samples():
    with pytest.raises(wire.MalformedMessage, match="none given"):
        wire.decode_inputs([])
    with pytest.raises(wire.MalformedMessage, match="given twice"):
        wire.decode_inputs([tensor(), tensor()])
    with pytest.raises(wire.MalformedMessage, match=r"differ: \{'x': 2, 'y': 1\}"):
        wire.decode_inputs([tensor(), tensor(name="y", shape=[1, 6])])
