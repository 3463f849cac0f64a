"""Who asks: tenants, roles and jobs; a tokens file that changes while the server runs."""

import logging
from collections import Counter

import pytest

from teacher_server.auth import Authenticator, Caller, Identity, check_tenant_name
from teacher_server.errors import InvalidQuery, NotAllowed, Unauthenticated
from teacher_server.tokens import digest_of


def bearer(token, **metadata):
    return {"authorization": f"Bearer {token}", **metadata}


def line(token, *words):
    return " ".join((digest_of(token), *words))


class Who:
    """An authenticator of a file, and what it tells of."""

    def __init__(self, folder, *lines):
        self.file, self.refused = folder / "tokens", Counter()
        self.write(*lines)
        self.authenticator = Authenticator.from_file(
            self.file,
            failed=lambda reason: self.refused.update([reason]),
            stale=lambda stale: self.refused.update(["file"] if stale else []),
        )

    def write(self, *lines):
        self.file.write_text("\n".join(lines))

    def __call__(self, token):
        return self.authenticator.identify(bearer(token))

    def knows(self, token):
        try:
            self(token)
        except Unauthenticated:
            return False
        return True


def test_a_token_is_its_tenants_and_has_a_role(tmp_path):
    who = Who(
        tmp_path,
        "# who may ask",
        "",
        line("one", "red"),
        f"  {digest_of('two')}\tred   admin  # the owner",
        line("three", "blue.team-1", "viewer", "board"),
        line("four", "blue", "ann@host"),
        line("five", "blue", "student", "bob"),
    )
    assert who("one") == Identity("red", "student")
    assert who("two") == Identity("red", "admin")
    assert who("three") == Identity("blue.team-1", "viewer")
    assert who("four") == who("five") == Identity("blue", "student")
    caller = who.authenticator.caller
    assert caller(bearer("one")) == Caller("red", "default")
    assert caller(bearer("two", **{"preceptor-job": "a/b"})) == Caller("red", "a/b")
    assert caller({"authorization": "bearer one"}).tenant == "red"
    assert who.refused == {}


@pytest.mark.parametrize(
    ("role", "asks", "sees_all", "administers"),
    [("student", True, False, False), ("viewer", False, True, False), ("admin", True, True, True)],
)
def test_what_roles_may(role, asks, sees_all, administers):
    identity = Identity("red", role)
    assert (identity.asks, identity.sees_all, identity.administers) == (asks, sees_all, administers)


def test_a_viewer_asks_nothing(tmp_path):
    who = Who(tmp_path, line("board", "red", "viewer"))
    with pytest.raises(NotAllowed, match="tenant 'red' is a viewer's") as refused:
        who.authenticator.caller(bearer("board"))
    assert "board" not in str(refused.value)
    assert who.refused == {"role": 1}
    assert who.authenticator.caller(bearer("board"), asks=False) == Caller("red", "default")


def test_without_a_file_everybody_is_default_and_an_admin():
    who = Authenticator.from_file(None)
    assert who.caller({}) == Caller("default", "default")
    assert who.identify({}) == Identity("default", "admin")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "missing"),
        ({"authorization": ""}, "missing"),
        (bearer(""), "missing"),
        ({"authorization": "Basic one"}, "missing"),
        (bearer("other"), "unknown"),
        (bearer(digest_of("one")), "unknown"),
        (bearer("one "), "unknown"),
        (bearer("é"), "unknown"),
    ],
)
def test_an_unknown_token_is_refused_counted_and_not_repeated(tmp_path, metadata, reason):
    who = Who(tmp_path, line("one", "red", "admin"))
    for ask in (who.authenticator.caller, who.authenticator.identify):
        with pytest.raises(Unauthenticated) as refused:
            ask(metadata)
        for secret in ("other", "é", digest_of("one")):
            assert secret not in str(refused.value)
    assert who.refused == {reason: 2}


def test_a_file_without_lines_lets_nobody_in(tmp_path):
    assert not Who(tmp_path, "# nobody yet").knows("one")


@pytest.mark.parametrize("name", ["", "_platform", "a b", "a/b", "a\tb", "x" * 65, "é"])
def test_a_tenants_name_is_checked(name):
    with pytest.raises(ValueError, match="a name is 1 to 64 letters"):
        check_tenant_name(name)


@pytest.mark.parametrize("name", ["red", "a.b-c_d", "-", "9", "x" * 64])
def test_tenants_may_be_called(name):
    check_tenant_name(name)


@pytest.mark.parametrize("job", ["a b", "x" * 129, "a\n", 'x"}'])
def test_a_jobs_name_is_checked(job):
    with pytest.raises(InvalidQuery, match="preceptor-job"):
        Authenticator().caller({"preceptor-job": job})


# ---------------------------------------------------------------- while it runs


def test_what_the_file_says_holds_at_the_next_call(tmp_path):
    who = Who(tmp_path, line("one", "red"))
    assert who.knows("one")
    who.write(line("one", "red"), line("two", "blue"))
    assert who("two") == Identity("blue", "student")
    who.write(line("two", "blue", "admin"))
    assert who("two") == Identity("blue", "admin")
    assert not who.knows("one")
    other = tmp_path / "other"
    other.write_text(line("six", "grey"))
    other.replace(who.file)
    assert who.knows("six")
    assert not who.knows("two")


@pytest.mark.parametrize("broken", ["malformed", "missing", "a directory", "not text"])
def test_a_file_that_cannot_be_read_leaves_the_tokens_known_before(tmp_path, caplog, broken):
    caplog.set_level(logging.INFO)
    who = Who(tmp_path, line("one", "red"))
    match broken:
        case "malformed":
            who.write(line("two", "blue"), "secret-token red")
        case "missing":
            who.file.unlink()
        case "a directory":
            who.file.unlink()
            who.file.mkdir()
        case "not text":
            who.file.write_bytes(b"\xff\xfe")
    for _ in range(5):
        assert who.knows("one")
        assert not who.knows("two")
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert str(who.file) in record.message
    assert "what was read before stays in force" in record.message
    assert "secret-token" not in record.message
    assert who.refused["file"] == 1
    if broken == "a directory":
        who.file.rmdir()
    who.write(line("three", "blue"))
    assert who.knows("three")
    assert not who.knows("one")
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_each_change_that_cannot_be_read_is_told_once(tmp_path):
    who = Who(tmp_path, line("one", "red"))
    for number in range(1, 4):
        who.write("x" * number)
        assert [who.knows("one") for _ in range(3)] == [True] * 3
        assert who.refused["file"] == number


def test_a_server_does_not_start_without_its_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Authenticator.from_file(tmp_path / "nowhere")
