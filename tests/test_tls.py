"""TLS and mTLS on both ports of real servers: who gets in, what the others are told, and files that change."""

import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress

import pytest

from student_worker import TeacherClient
from student_worker.__main__ import main as student
from student_worker.errors import NotTrusted, TeacherUnavailable
from student_worker.tls import GREETING
from teacher_server.tls import Certificates
from tests.asking import pixels
from tests.certificates import Authority, served_with, showing
from tests.redis_servers import AOF, running
from tests.serving import arguments, free_port, serving, until

HOST = "127.0.0.1"
NOT_LET_IN = r"(?i)alert|reset|EOF|closed"  # whichever reaches the client first


class World:
    """A CA that is trusted and one that is not."""

    def __init__(self, folder):
        self.folder = folder
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls(world, tmp_path_factory):
    with serving(**arguments(tmp_path_factory.mktemp("tls")), **served_with(world.ours.issue(HOST))) as server:
        yield server


@pytest.fixture(scope="module")
def mtls(world, tmp_path_factory):
    settings = served_with(world.ours.issue(HOST), world.ours.file)
    with serving(**arguments(tmp_path_factory.mktemp("mtls")), **settings) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with serving(**arguments(tmp_path_factory.mktemp("plain"))) as server:
        yield server


def ask(address, **trust):
    with TeacherClient(address, timeout=60, **trust) as client:
        return len(client.label(pixels(3), cache_mode="bypass").sources)


def refused(address, **trust):
    """What the client is told, soon."""
    began = time.monotonic()
    with pytest.raises(NotTrusted) as error:
        ask(address, **trust)
    assert time.monotonic() - began < 20, "not after the whole timeout"
    assert str(error.value).startswith(f"{address}: ")
    return str(error.value)


def https(address, ca, files=None, **options):
    context = ssl.create_default_context(cafile=ca)
    if files:
        context.load_cert_chain(*files)
    for name, value in options.items():
        setattr(context, name, value)
    with urllib.request.urlopen(f"https://{address}/livez", timeout=10, context=context) as reply:
        return reply.read()


# ---------------------------------------------------------------- who gets in


def test_a_client_that_trusts_the_ca_is_answered_on_both_ports(tls, world):
    assert ask(tls.grpc_address, ca_file=world.ours.file) == 3
    assert https(tls.http_address, world.ours.file) == b"ok\n"


def test_with_mtls_so_is_one_that_shows_a_certificate(mtls, world):
    mine = world.ours.issue("student")
    assert ask(mtls.grpc_address, ca_file=world.ours.file, **showing(mine)) == 3
    assert https(mtls.http_address, world.ours.file, mine) == b"ok\n"


def test_who_does_not_trust_the_server_is_told_so(tls, plain, world, tmp_path):
    assert "certificate is not accepted (unable to get local issuer" in refused(
        tls.grpc_address, ca_file=world.theirs.file
    )
    assert "certificate is not accepted" in refused(tls.grpc_address, tls=True)
    port = tls.grpc_address.rpartition(":")[2]
    assert "not valid for 'localhost'" in refused(f"localhost:{port}", ca_file=world.ours.file)
    assert "speaks TLS and was asked without" in refused(tls.grpc_address)
    assert "speaks no TLS" in refused(plain.grpc_address, ca_file=world.ours.file)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        https(tls.http_address, world.theirs.file)


def test_an_expired_server_is_not_trusted(world, tmp_path):
    with serving(**arguments(tmp_path), **served_with(world.ours.issue(HOST, expired=True))) as server:
        assert "certificate has expired" in refused(server.grpc_address, ca_file=world.ours.file)
        with pytest.raises(urllib.error.URLError, match="certificate has expired"):
            https(server.http_address, world.ours.file)


@pytest.mark.parametrize("shown", ["none", "another CA's", "expired", "in clear text"])
def test_with_mtls_nobody_else_gets_in(mtls, world, shown):
    files = {
        "none": None,
        "another CA's": world.theirs.issue("student"),
        "expired": world.ours.issue("student", expired=True),
        "in clear text": None,
    }[shown]
    if shown == "in clear text":
        assert "speaks TLS and was asked without" in refused(mtls.grpc_address)
        return
    told = refused(mtls.grpc_address, ca_file=world.ours.file, **(showing(files) if files else {}))
    assert ("a client without a certificate" if files is None else "the certificate that it was shown") in told
    with pytest.raises(OSError, match=NOT_LET_IN):
        https(mtls.http_address, world.ours.file, files)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.parametrize("port", ["grpc_address", "http_address"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_of_tls_are_refused(tls, version, port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    host, _, number = getattr(tls, port).rpartition(":")
    with socket.create_connection((host, int(number)), 10) as peer, pytest.raises(OSError, match=NOT_LET_IN):
        context.wrap_socket(peer)


def test_what_is_not_there_is_still_waited_for(world):
    with (
        pytest.raises(TeacherUnavailable, match="gave up after"),
        TeacherClient(f"{HOST}:{free_port()}", ca_file=world.ours.file, timeout=0.5) as client,
    ):
        client.describe()


def test_one_replica_that_is_not_trusted_is_told_of_and_the_other_asked(tls, world, tmp_path, caplog):
    with serving(**arguments(tmp_path), **served_with(world.theirs.issue(HOST))) as other:
        assert ask([other.grpc_address, tls.grpc_address], ca_file=world.ours.file) == 3
        assert f"{other.grpc_address}: its certificate is not accepted" in caplog.text
        with pytest.raises(NotTrusted, match="certificate is not accepted"):
            ask([other.grpc_address, other.grpc_address.replace(HOST, "localhost")], ca_file=world.ours.file)


def test_replicas_that_a_server_tells_of_show_certificates_of_their_own(world, tmp_path, caplog):
    """One address is given; of the two others that it tells of, one shows a certificate that nobody trusts."""
    (tmp_path / "redis").mkdir()
    port = free_port()

    def replica(name, authority):
        settings = arguments(tmp_path) | served_with(authority.issue(HOST, into=name))
        return serving(**settings, state_directory=tmp_path / name, ledger_redis_url=f"redis://127.0.0.1:{port}")

    with (
        running(tmp_path / "redis", *AOF, "--port", str(port)),
        replica("other", world.ours) as other,
        replica("stranger", world.theirs) as stranger,
        ExitStack() as stack,
    ):
        given = stack.enter_context(replica("given", world.ours))
        client = stack.enter_context(TeacherClient(given.grpc_address, ca_file=world.ours.file, timeout=60))
        client.describe()
        until(lambda: client._call._replicas.in_rotation == [given.grpc_address, other.grpc_address])
        until(lambda: f"{stranger.grpc_address}: is listed as a replica, but cannot be used" in caplog.text)
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        for _ in range(4):
            assert len(client.label(pixels(3), cache_mode="bypass").sources) == 3
        assert all(client._call._replicas._members[one.grpc_address].latencies for one in (given, other))


def test_a_connection_closed_without_a_word_is_tried_again(world):
    """As a server without room closes it, or a balancer that has no server just now."""
    with socket.create_server((HOST, 0)) as listening:

        def close_all():
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(4096)

        threading.Thread(target=close_all, daemon=True).start()
        try:
            with (
                pytest.raises(TeacherUnavailable, match="gave up after"),
                TeacherClient(f"{HOST}:{listening.getsockname()[1]}", ca_file=world.ours.file, timeout=0.5) as client,
            ):
                client.describe()
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts


def test_a_server_reached_from_outside_still_needs_tokens_but_is_not_warned_of_clear_text(world, tmp_path, caplog):
    settings = arguments(tmp_path) | served_with(world.ours.issue(HOST))
    with pytest.raises(ValueError, match="--tokens-file"), serving(**settings, host="0.0.0.0"):
        pass
    (tmp_path / "tokens").write_text("")
    with serving(**settings, host="0.0.0.0", tokens_file=tmp_path / "tokens"):
        pass
    assert "in clear" not in caplog.text
    with serving(**arguments(tmp_path), host="0.0.0.0", tokens_file=tmp_path / "tokens"):
        pass
    assert "tokens and samples travel in clear on 0.0.0.0: give --tls-certificate-file" in caplog.text


# ---------------------------------------------------------------- files that change


def test_certificates_and_client_cas_are_taken_as_they_are_at_each_handshake(world, tmp_path, caplog):
    ours, theirs = world.ours, world.theirs
    files = ours.issue(HOST, into="rotating")
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(ours.file.read_bytes())
    mine, his = ours.issue("student"), theirs.issue("student")
    with serving(**arguments(tmp_path), **served_with(files, client_ca)) as server:

        def both(ca, client):
            ask(server.grpc_address, ca_file=ca, **showing(client))
            https(server.http_address, ca, client)

        both(ours.file, mine)
        theirs_now = theirs.issue(HOST)
        for old, new in zip(files, theirs_now, strict=True):
            new.replace(old)
        both(theirs.file, mine)
        refused(server.grpc_address, ca_file=ours.file, **showing(mine))
        client_ca.write_bytes(theirs.file.read_bytes())
        both(theirs.file, his)
        refused(server.grpc_address, ca_file=theirs.file, **showing(mine))
        with pytest.raises(OSError, match=NOT_LET_IN):
            https(server.http_address, theirs.file, mine)
        caplog.clear()
        files[1].write_text("this is no key")
        for _ in range(3):
            both(theirs.file, his)
        (said,) = [record.message for record in caplog.records if "not reloaded" in record.message]
        assert "no certificate (PEM, the server's own first) with its own key" in said
        files[1].unlink()
        both(theirs.file, his)


@pytest.mark.parametrize(
    ("port", "version"),
    [
        ("http_address", ssl.TLSVersion.TLSv1_3),
        ("grpc_address", ssl.TLSVersion.TLSv1_2),
        ("grpc_address", ssl.TLSVersion.TLSv1_3),
    ],
)
def test_no_session_is_taken_up_again_without_a_certificate(mtls, world, port, version):
    """It would outlive its certificate, and the CA that signed it."""
    context = ssl.create_default_context(cafile=world.ours.file)
    context.load_cert_chain(*world.ours.issue("student"))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["http/1.1" if port == "http_address" else "h2"])
    host, _, number = getattr(mtls, port).rpartition(":")
    session, reused = None, []
    for _ in range(2):
        with socket.create_connection((host, int(number)), 10) as plain:
            with context.wrap_socket(plain, server_hostname=host, session=session) as connection:
                connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" if port == "http_address" else GREETING)
                assert connection.recv(4096)
                session = connection.session
                reused.append(connection.session_reused)
    assert reused == [False, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tls_key_file": None}, "tls_certificate_file and tls_key_file: give both, or neither"),
        ({"tls_certificate_file": None, "tls_key_file": None}, "tls_client_ca_file: needs --tls-certificate-file"),
    ],
)
def test_settings_that_do_not_go_together(world, tmp_path, change, words):
    settings = arguments(tmp_path) | served_with(world.ours.issue(HOST), world.ours.file) | change
    with pytest.raises(ValueError, match=words), serving(**settings):
        pass


def test_files_that_do_not_fit_are_named_at_the_start(world, tmp_path):
    ours, other = world.ours.issue(HOST), world.theirs.issue(HOST)
    (tmp_path / "empty").write_text("")
    for files, words in (
        ((ours[0], other[1]), "with its own key"),
        ((ours[1], ours[1]), "no certificate"),
        ((tmp_path / "empty", ours[1]), "no certificate"),
        ((*ours, tmp_path / "empty"), "tls_client_ca_file: .*empty holds no certificate"),
    ):
        with pytest.raises(ValueError, match=words):
            Certificates(*files)
    with pytest.raises(FileNotFoundError):
        Certificates(tmp_path / "nowhere", ours[1])


# ---------------------------------------------------------------- the student's end


def test_the_students_own_files_are_named_when_they_do_not_fit(world, tmp_path):
    ours, other = world.ours.issue("student"), world.theirs.issue("student")
    (tmp_path / "empty").write_text("")
    for trust, words in (
        ({"ca_file": tmp_path / "empty"}, "ca_file: .*empty holds no certificate"),
        (showing((ours[0], other[1])), "with its own key"),
        ({"certificate_file": ours[0]}, "certificate_file and key_file: give both"),
    ):
        with pytest.raises(ValueError, match=words):
            TeacherClient("a:1", **trust)
    with pytest.raises(FileNotFoundError):
        TeacherClient("a:1", ca_file=tmp_path / "nowhere")


def test_student_worker_takes_the_same_files(mtls, world, capsys):
    mine = world.ours.issue("student")
    flags = ["--teacher-address", mtls.grpc_address, "--dataset", "digits", "--samples", "1", "--teacher-timeout", "9"]
    assert student(["check", *flags, "--tls"]) == 1
    assert "its certificate is not accepted" in capsys.readouterr().err
    trust = ["--tls-ca-file", str(world.ours.file)]
    assert student(["check", *flags, *trust]) == 1
    assert "a client without a certificate" in capsys.readouterr().err
    student(["check", *flags, *trust, "--tls-certificate-file", str(mine[0]), "--tls-key-file", str(mine[1])])
    said = capsys.readouterr().err  # it was let in: what it hears of now is the data
    assert "digits" in said or "samples of" in said, said
