"""What the README shows is run: its Python as it stands, its JSON and its command lines as far as they go."""

import re
import shlex

import pytest
import torch
from google.protobuf import json_format

from protos import teacher_pb2 as pb
from student_worker.__main__ import COMMANDS as STUDENT
from teacher_server.__main__ import COMMANDS as TEACHER
from tests.asking import metric, pixels
from tests.serving import ROOT
from tests.test_system import small_student

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_five_lines_run_as_they_stand(server):
    (code,) = blocks("python")
    assert code.count("\n") <= 10
    torch.manual_seed(0)
    student = small_student()
    before = student[1].weight.clone()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    names = {
        "loader": [(torch.from_numpy(pixels(64, seed=i)).float() / 255 - mean) / std for i in range(3)],
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
    }
    exec(code.replace("localhost:8001", server.grpc_address), names)
    assert not torch.equal(before, student[1].weight)
    assert metric(server, "preceptor_asked_samples_total", job="my-run") == 3 * 48
    names["teacher"].close()


def test_the_description_is_one():
    (text,) = blocks("json")
    described = json_format.Parse(text, pb.TeacherDescription())
    assert list(described.inputs[0].shape) == [3, 224, 224]


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in blocks("")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(("$ teacher-server", "$ student-worker"))
    ],
)
def test_command_lines_are_understood(line):
    program, *words = shlex.split(line.removeprefix("$ ").partition(" > ")[0])
    commands = TEACHER if program == "teacher-server" else STUDENT
    name = max((name for name in commands if words[: len(name.split())] == name.split()), key=len)
    settings, _ = commands[name]
    settings(_cli_parse_args=words[len(name.split()) :])


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
