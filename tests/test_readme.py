"""What the README shows is run: its Python as it stands, its JSON and its command lines as far as they go.

So are the command lines of docs/ray.md (ours, those that Ray is to run, and Ray's own as far as their options), of
docs/kubernetes.md (ours, and kubectl's as far as the files that they name) and of docs/operations.md, of which
tests/test_operations.py runs some.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

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
ON_RAY = (ROOT / "docs/ray.md").read_text()
ON_KUBERNETES = (ROOT / "docs/kubernetes.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()


def blocks(language, text=README):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for kind, content in fenced if kind == language]


def commands(text, *programs):
    """Lines that begin with "$ " and one of these programs, continued ones whole, without the "$ "."""
    lines = (line for block in blocks("", text) for line in block.replace("\\\n", " ").splitlines())
    return [line.removeprefix("$ ") for line in lines if line.startswith(tuple(f"$ {name} " for name in programs))]


OURS = [
    line
    for text in (README, ON_RAY, ON_KUBERNETES, OPERATIONS)
    for line in commands(text, "teacher-server", "student-worker")
]
OURS += [
    line.partition(" -- python -m ")[2].replace("_", "-", 1)
    for line in commands(README + ON_RAY, "ray job submit")
    if " -- python -m " in line
]
OURS += [line.partition(" -- ")[2] for line in commands(ON_KUBERNETES, "kubectl") if " exec " in line]


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
    exec(code.replace("localhost:8001", server.grpc_address).replace("my-run", "five-lines"), names)
    assert not torch.equal(before, student[1].weight)
    assert metric(server, "preceptor_asked_samples_total", job="five-lines") == 3 * 48
    names["teacher"].close()


def test_the_description_is_one():
    (text,) = blocks("json")
    described = json_format.Parse(text, pb.TeacherDescription())
    assert list(described.inputs[0].shape) == [3, 224, 224]


@pytest.mark.parametrize("line", OURS)
def test_command_lines_are_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('job = "second"\n')
    teacher = ["model = 'm:f'", "weights = 'w.safetensors'"]
    teacher += [f"{name}_redis_url = 'redis://127.0.0.1'" for name in ("cache", "ledger")]
    Path("teacher.toml").write_text("\n".join(teacher))
    program, *words = shlex.split(line.partition(" > ")[0])
    known = TEACHER if program == "teacher-server" else STUDENT
    name = max((name for name in known if words[: len(name.split())] == name.split()), key=len)
    settings, _ = known[name]
    settings(_cli_parse_args=words[len(name.split()) :])


def test_rays_own_options_are_rays():
    """Ray is asked in processes of its own: it is imported nowhere here."""
    lines = commands(ON_RAY, "ray")
    assert {line.split()[1] for line in lines} == {"start", "job", "stop"}
    lines += re.findall(r"`(ray job [^`]*)`", ON_RAY)
    for line in lines:
        words = shlex.split(line.partition(" -- ")[0])
        command = [word for word in words[:3] if not word.startswith("-")]
        ray = Path(sys.executable).parent / "ray"
        help_ = subprocess.run([ray, *command[1:], "--help"], capture_output=True, text=True, check=True).stdout
        for option in re.findall(r" (--[\w-]+)", line.partition(" -- ")[0]):
            assert re.search(rf"{option}\b", help_), line


def test_what_kubectl_is_given_is_there():
    lines = commands(ON_RAY + ON_KUBERNETES, "kubectl", "helm")
    given = {word for line in lines for word in line.split() if word.startswith("deploy/")}
    assert all((ROOT / path).exists() for path in given)
    alone = {str(path.relative_to(ROOT)) for path in ROOT.glob("deploy/kubernetes/*.yaml")}
    alone |= {f"deploy/kubernetes/students/{name}.yaml" for name in ("cluster", "train-job")}
    assert {path for path in given if path.endswith(".yaml")} == alone, "kustomize takes the others"


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for document in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", document.read_text()):
            assert (ROOT / "docs" / path).exists(), f"{document.name}: {path}"
