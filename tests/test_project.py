"""What `make check` demands of the code itself: format, lint, types, imports, stubs, an unbroken contract."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from protos import teacher_pb2

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


def test_the_formulas_contract_names_all_other_modules():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (formulas,) = (one for one in contracts if one["name"] == "the published formulas import nothing of ours")
    ours = {f"student_worker.{path.stem}" for path in (ROOT / "student_worker").glob("[!_]*.py")}
    assert set(formulas["forbidden_modules"]) == {"protos"} | ours - set(formulas["source_modules"])


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


def _contract(file):
    """What a peer of another version relies on, as {path: meaning}."""
    promises = {}

    def message(path, described):
        for field in described.field:
            kind = (field.type, field.label, field.type_name)
            promises[f"{path}.{described.name}, field number {field.number}"] = (field.name, *kind)
        for enum in described.enum_type:
            enumeration(f"{path}.{described.name}", enum)
        for nested in described.nested_type:
            message(f"{path}.{described.name}", nested)

    def enumeration(path, described):
        for value in described.value:
            promises[f"{path}.{described.name}, value {value.number}"] = value.name

    for described in file.message_type:
        message(file.package, described)
    for described in file.enum_type:
        enumeration(file.package, described)
    for service in file.service:
        for method in service.method:
            kind = (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            promises[f"{file.package}.{service.name}, method {method.name}"] = kind
    return promises


def _broken(released, current):
    return [path for path, meaning in _contract(released).items() if _contract(current).get(path) != meaning]


def _released():
    """The descriptor of the last tag. With a new tag, write it anew:

    python -m grpc_tools.protoc -I . --descriptor_set_out=tests/reference/released.binpb protos/teacher.proto
    """
    content = (ROOT / "tests/reference/released.binpb").read_bytes()
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(content).file
    return file


def test_the_contract_breaks_no_promise_of_the_last_release():
    current = descriptor_pb2.FileDescriptorProto()
    teacher_pb2.DESCRIPTOR.CopyToProto(current)
    assert _broken(_released(), current) == []


@pytest.mark.parametrize("change", ["removed", "renumbered", "retyped", "enum value removed", "method removed"])
def test_a_broken_promise_is_noticed(change):
    changed = descriptor_pb2.FileDescriptorProto()
    changed.CopyFrom(_released())
    tensor = next(message for message in changed.message_type if message.name == "Tensor")
    match change:
        case "removed":
            del tensor.field[0]
        case "renumbered":
            tensor.field[0].number = 99
        case "retyped":
            tensor.field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
        case "enum value removed":
            del changed.enum_type[0].value[1]
        case "method removed":
            del changed.service[0].method[0]
    assert len(_broken(_released(), changed)) == 1
    tensor.field.add(name="new", number=100, type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES)
    assert len(_broken(_released(), changed)) == 1  # what is added breaks nothing
