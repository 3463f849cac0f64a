"""docs/resume.md: its loop runs as it stands, is stopped, and goes on."""

import re

import pytest
import torch

from student_worker.__main__ import COMMANDS
from tests.asking import metric, pixels
from tests.serving import ROOT
from tests.test_system import small_student

TEXT = (ROOT / "docs" / "resume.md").read_text()
(LOOP,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
MEAN, STD = (torch.tensor(values).view(-1, 1, 1) for values in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
BATCHES = [(torch.from_numpy(pixels(16, seed=i)).float() / 255 - MEAN) / STD for i in range(12)]


class Killed(BaseException):
    """As good as a kill for a loop that writes nothing on its way out."""


def live(server, job, until=None):
    """The weights after the loop, in the current folder; killed when it draws batch number `until`."""
    torch.manual_seed(0)
    student = small_student()

    def batches_from(step):
        for number in range(step, len(BATCHES)):
            if number == until:
                raise Killed
            yield BATCHES[number]

    names = {
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1, momentum=0.9),
        "batches_from": batches_from,
    }
    code = LOOP.replace("localhost:8001", server.grpc_address).replace("my-run", job).replace("% 100", "% 4")
    try:
        exec(code, names)
    finally:
        names["answers"].close()
        names["teacher"].close()
    return {name: value.clone() for name, value in student.state_dict().items()}


def test_the_loop_goes_on_as_if_nothing_had_happened(server, tmp_path, monkeypatch):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = live(server, "loop-whole")
    monkeypatch.chdir(tmp_path / "killed")
    for until in (3, 7, 11):
        with pytest.raises(Killed):
            live(server, "loop-killed", until)
    resumed = live(server, "loop-killed")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for job in ("loop-whole", "loop-killed"):
        assert metric(server, "preceptor_charged_samples_total", job=job) == 12 * 12


def test_the_command_is_understood():
    (line,) = re.findall(r"^\$ student-worker train (.*)$", TEXT, re.MULTILINE)
    settings = COMMANDS["train"][0](_cli_parse_args=line.split())
    assert settings.resume
    assert settings.checkpoint_steps == 500
