"""`make demo`, shortened: everything it starts, writes and prints, with one epoch each."""

import json
import re
import subprocess
import sys

import pytest

from tests.serving import ROOT


@pytest.mark.timeout(300)
def test_the_demo_runs_from_nothing_to_its_report(tmp_path):
    command = [sys.executable, "benchmarks/demo.py", "--teacher-epochs", "2", "--epochs", "1", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "teacher-server: ready" in done.stdout
    assert "understands mnist5k" in done.stdout
    for method in ("hard", "kd", "kd+mixup", "unix"):
        assert f"\n{method} " in done.stdout
    assert "the whole demo took" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {run["method"]: run["computed"] for run in report["runs"]} == {
        "hard": 0,
        "kd": 4000,
        "kd+mixup": 4000,
        "unix": 3000,
    }
    assert (tmp_path / "plot.png").exists()
    assert '"call": "Label"' in (tmp_path / "teacher-server.log").read_text()
    spend = re.search(r"^spend:  (.*)$", done.stdout, re.MULTILINE)[1].split()
    shown = subprocess.run(
        [sys.executable, "-m", "teacher_server", *spend[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert re.search(r"demo-unix-s0 .* 4,?000 .* 3,?000 .* 3,?000 ", shown.stdout), shown
