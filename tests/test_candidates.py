"""Of how many samples a student chose those that it asks about: sent, checked, and in the ledger to the sample."""

import json

import grpc
import numpy as np
import pytest
import torch
from torch import nn

from protos import teacher_pb2 as pb
from protos.keys import sample_keys
from student_worker import TeacherClient, Unix
from tests.asking import asking, get, metric, pixels, refusal
from tests.students import LocalTeacher, data, net


def line(server, job):
    (found,) = json.loads(get(server, f"/v1/spend?job={job}"))["lines"]
    unasked = int(found["candidates"]) - int(found["asked"])
    assert metric(server, "preceptor_unasked_samples_total", job=job) == unasked
    return {name: int(found[name]) for name in ("candidates", "asked", "computed", "cached", "coalesced")}


@pytest.mark.parametrize("mixing", ["adaptive", "none", "uniform"])
def test_a_student_says_from_how_many_it_chose(server, mixing):
    job = f"chooses-{mixing}"
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with TeacherClient(server.grpc_address, job=job) as teacher:
        unix = Unix(teacher, keep=0.3, mixing=mixing, to_student=lambda x: x.float())
        for seed, n in ((1, 64), (2, 64), (3, 10)):
            unix.loss(student, torch.from_numpy(pixels(n, seed=1000 + seed))).backward()
    found = line(server, job)
    assert (found["candidates"], found["asked"]) == (138, 19 + 19 + 3)


def test_any_teacher_is_told(tmp_path):
    teacher = LocalTeacher()
    for _ in Unix(teacher, keep=0.5).batches(data(3, 16), net(1)):
        pass
    assert teacher.candidates == 48


@pytest.mark.parametrize("first", [False, True])
def test_the_parts_of_a_query_add_up(server, first):
    """700 samples go in three parts; 1,001 candidates do not divide by them."""
    job, x = f"parts-{first}", pixels(700, seed=50 + first)
    with TeacherClient(server.grpc_address, job=job) as teacher:
        teacher.label(x[:300])
        teacher.label(x, candidates=1001, look_up_first=first)
        found = line(server, job)
        assert (found["candidates"], found["asked"]) == (300 + 1001, 1000)
        assert (found["computed"], found["cached"] + found["coalesced"]) == (700, 300)
        teacher.label(x, candidates=800, look_up_first=first)  # all of them are known
        assert line(server, job)["candidates"] == 300 + 1001 + 800


def test_a_repetition_of_a_request_id_chose_nothing_anew(server):
    job, x = "repeats", pixels(48, seed=70)
    with TeacherClient(server.grpc_address, job=job) as teacher:
        for _ in range(3):
            teacher.label(x, request_id="once", candidates=64, cache_mode="bypass")
    found = line(server, job)
    assert found["computed"] == 48
    assert found["candidates"] - found["asked"] == 16


@pytest.mark.parametrize("candidates", [-1, 4, 10**6 + 1, 2**62])
def test_what_cannot_be_is_refused(stub, candidates):
    x = pixels(5)
    code, details, reason, _ = refusal(stub.Label, asking(x, candidates=candidates))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_QUERY")
    assert details.startswith(f"candidates: {candidates}, and asked about are 5 samples of them")
    keys = sample_keys("f" * 32, {"x": x})
    code, details, _, _ = refusal(stub.Lookup, pb.LookupRequest(keys=keys, candidates=candidates))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(f"candidates: {candidates}, and asked about are 5 keys of them")


def test_a_client_refuses_it_first(server):
    with TeacherClient(server.grpc_address) as teacher:
        with pytest.raises(ValueError, match="candidates is 4, of which 5 are asked about: give n or more, or 0"):
            teacher.label(np.zeros((5, 3, 8, 8), np.uint8), candidates=4)
