"""The whole of it, on real servers: what UNIX asks is what the server counts, and nobody harms anybody."""

import hashlib
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import nn

from student_worker import TeacherClient, Unix
from student_worker.errors import InvalidQuery, TeacherUnavailable
from tests.asking import direct, metric, pixels
from tests.serving import GATE, ROOT, arguments, serving, until


def small_student():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def to_student(x):
    return x.float() / 255 - 0.5


def loader(batches, batch_size, seed=0, last=None):
    for i in range(batches):
        n = last if last and i == batches - 1 else batch_size
        yield torch.from_numpy(pixels(n, seed=1000 * seed + i))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_server_counts_exactly_what_unix_kept(server, depth):
    job = f"counted-{depth}"
    student = small_student()
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    with TeacherClient(server.grpc_address, job=job) as teacher:
        unix = Unix(teacher, to_student=to_student)
        kept = 0
        for b in unix.batches(loader(7, 64, last=10), student, depth):
            optimizer.zero_grad()
            unix.criterion(student(b.x), b).backward()
            optimizer.step()
            kept += len(b.x)
    assert kept == unix.asked == unix.learnt == 6 * 48 + 8
    assert unix.scored == 6 * 64 + 10
    assert metric(server, "preceptor_asked_samples_total", job=job) == kept
    assert metric(server, "preceptor_samples_total", job=job, source="computed") == kept


def test_student_and_teacher_get_the_very_same_pixels(server):
    """Mixed, rounded once, sent: the answers are those of the direct forward pass on what the student learns from."""
    student = small_student()
    with TeacherClient(server.grpc_address, job="same") as teacher:
        unix = Unix(teacher, to_student=lambda x: x)  # the student is fed pixels, so b.x is what was sent
        student = nn.Sequential(Floats(), student)
        for b in unix.batches(loader(3, 32), student):
            assert b.x.dtype == torch.uint8
            np.testing.assert_allclose(b.answer.numpy(), direct(b.x.numpy()), rtol=1e-4, atol=1e-4)


class Floats(nn.Module):
    def forward(self, x):
        return to_student(x)


class Student(threading.Thread):
    """Distils for some steps and compares every answer with the direct forward pass."""

    def __init__(self, address, job, token, steps=6):
        super().__init__(name=job)
        self.address, self.job, self.token, self.steps = address, job, token, steps
        self.error = None
        self.asked = 0

    def run(self):
        try:
            student = nn.Sequential(Floats(), small_student())
            with TeacherClient(self.address, job=self.job, token=self.token) as teacher:
                unix = Unix(teacher, generator=torch.Generator().manual_seed(int(self.job.rpartition("-")[2])))
                seed = int(self.job.rpartition("-")[2])
                with closing(unix.batches(loader(self.steps, 64, seed=seed), student)) as batches:
                    for b in batches:
                        np.testing.assert_allclose(b.answer.numpy(), direct(b.x.numpy()), rtol=1e-4, atol=1e-4)
                self.asked = unix.asked
        except BaseException as error:
            self.error = error


VICTIM = """
import sys
import numpy as np
from student_worker import TeacherClient
TeacherClient(sys.argv[1], job="victim", token="white").label(np.zeros((50, 3, 8, 8), np.uint8))
"""


def test_eight_students_of_whom_three_misbehave(tmp_path):
    """One sends rubbish, one is killed with SIGKILL mid-query, one of a greedy tenant fills its queue."""
    tokens = tmp_path / "tokens"
    words = {"white": "white", "greedy": "greedy", "v": "board viewer"}
    tokens.write_text("".join(f"{hashlib.sha256(t.encode()).hexdigest()} {who}\n" for t, who in words.items()))
    settings = arguments(tmp_path, "gated") | {"tokens_file": tokens, "max_tenant_queue_size": 600}
    with serving(**settings) as server:
        with GATE.shut():
            address = server.grpc_address
            victim = subprocess.Popen([sys.executable, "-c", VICTIM, address], cwd=ROOT)
            greedy = TeacherClient(address, job="flood", token="greedy", window=40, timeout=2)
            floods = [greedy.submit(pixels(64, seed=i)) for i in range(20)]
            until(
                lambda: metric(server, "preceptor_requests_total", token="v", call="Label", code="RESOURCE_EXHAUSTED")
            )
            # Of 50 samples and a first batch of 64, some of the victim's may be with the device already.
            until(lambda: metric(server, "preceptor_asked_samples_total", token="v", job="victim"))
            victim.kill()
            assert victim.wait(10) == -9

            students = [Student(address, f"student-{i}", "white") for i in range(5)]
            for student in students:
                student.start()
            with TeacherClient(address, job="rubbish", token="white") as rubbish:
                for wrong in (np.zeros((2, 3, 7, 8), np.uint8), np.full((2, 3, 8, 8), np.inf, np.float32)):
                    with pytest.raises(InvalidQuery):
                        rubbish.label(wrong)
                described = rubbish.describe()  # past the client's own check, to the server's
                described.inputs[0].ClearField("minimum")
                described.inputs[0].ClearField("maximum")
                for _ in range(20):
                    with pytest.raises(InvalidQuery, match="leave the teacher's range"):
                        rubbish.label(np.full((2, 3, 8, 8), 1e9, np.float32))
        for student in students:
            student.join(60)
        for student in students:
            assert student.error is None, f"{student.name}: {student.error!r}"
            assert student.asked == 6 * 48
            assert metric(server, "preceptor_samples_total", token="v", tenant="white", job=student.name) == 6 * 48
        for future in floods:  # answered in the end, or given up for lack of room: nothing else
            assert isinstance(future.exception(60), TeacherUnavailable | None)
        assert metric(server, "preceptor_samples_total", token="v", tenant="white", job="rubbish") == 0
        greedy.close()
