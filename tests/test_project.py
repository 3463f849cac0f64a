"""What `make check` demands of the code itself: format, lint, types, import contracts, fresh stubs, quick help."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"], ["lint-imports"]],
    ids=" ".join,
)
@pytest.mark.timeout(300)
def test_static_checks(command):
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stubs_are_fresh(tmp_path):
    (tmp_path / "protos").mkdir()
    shutil.copy(ROOT / "protos/teacher.proto", tmp_path / "protos")
    outputs = [f"--{kind}=." for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, "protos/teacher.proto"],
        cwd=tmp_path,
        check=True,
    )
    for fresh in sorted((tmp_path / "protos").glob("*_pb2*")):
        committed = ROOT / "protos" / fresh.name
        assert committed.read_text() == fresh.read_text(), f"{committed} is stale: make protos"


@pytest.mark.parametrize("module", ["teacher_server.__main__", "student_worker.__main__"])
def test_the_command_line_is_parsed_before_torch_is_imported(module):
    program = f"import sys, {module} as program\nprogram.main(['--help'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
