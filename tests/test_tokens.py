"""`teacher-server token`, and the file that it keeps."""

import multiprocessing
import os
import re
import stat

import pytest

from teacher_server.__main__ import main
from teacher_server.tokens import Token, add_token, digest_of, new_token, read_tokens, remove_token


@pytest.fixture
def file(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TEACHER_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "tokens"
    monkeypatch.setenv("TEACHER_TOKENS_FILE", str(path))
    return path


@pytest.fixture
def token(capsys, file):
    """Runs `teacher-server token ...`; (status, standard output, standard error)."""

    def run(*arguments):
        status = main(["token", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_a_token_is_shown_once_and_only_its_hash_is_kept(token, file):
    status, out, err = token("new", "red", "--role", "admin", "--token-name", "ann@host")
    assert status == 0
    assert re.fullmatch(r"preceptor_[A-Za-z0-9_-]{43}\n", out)
    secret = out.strip()
    assert secret not in err
    assert secret not in file.read_text()
    assert read_tokens(file) == {digest_of(secret): Token(digest_of(secret), "red", "admin", "ann@host")}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir() if path.name != ".tokens.lock"] == ["tokens"]


def test_list_shows_all_but_the_hash(token, file):
    secrets = [token("new", *words)[1].strip() for words in (["red"], ["blue.team", "--role", "viewer"])]
    token("new", "red", "--token-name", "ann")
    status, out, _ = token("list")
    lines = out.splitlines()
    assert (status, lines[0].split()) == (0, ["id", "tenant", "role", "name"])
    assert [line.split()[1:] for line in lines[1:]] == [
        ["red", "student"],
        ["blue.team", "viewer"],
        ["red", "student", "ann"],
    ]
    assert [line.split()[0] for line in lines[1:3]] == [digest_of(secret)[:8] for secret in secrets]
    assert not any(digest in out for digest in read_tokens(file))


def test_revoking_takes_one_line_out_and_leaves_the_rest_as_it_was(token, file):
    token("new", "red", "--token-name", "ann")
    (line,) = file.read_text().splitlines()
    file.write_text(f"# team red\n\n{line}  # until spring\n   # the end")
    _, secret, _ = token("new", "blue")
    digest = digest_of(secret.strip())
    assert file.read_text() == f"# team red\n\n{line}  # until spring\n   # the end\n{digest} blue student\n"
    status, out, _ = token("revoke", digest[:8])
    assert (status, out) == (0, f"revoked {digest[:8]} of tenant blue, role student\n")
    assert file.read_text() == f"# team red\n\n{line}  # until spring\n   # the end\n"
    assert token("revoke", "ann")[0] == 0
    assert file.read_text() == "# team red\n\n   # the end\n"


def test_who_could_read_the_file_still_can(token, file):
    token("new", "red", "--token-name", "ann")
    file.chmod(0o640)  # for the group that the server runs as
    token("new", "red")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    token("revoke", "ann")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_link_stays_one(token, file, tmp_path):
    (tmp_path / "there").mkdir()
    file.symlink_to(tmp_path / "there" / "tokens")
    assert token("new", "red")[0] == 0
    assert file.is_symlink()
    assert len(read_tokens(tmp_path / "there" / "tokens")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["new", "_platform"], "tenant '_platform': a name is"),
        (["new", "red", "--token-name", "a b"], "name 'a b': give"),
        (["new", "red", "--token-name", "admin"], "no role's name"),
        (["new", "red", "--token-name", "#x"], "name '#x': give"),
        (["new", "red", "--token-name", "ann"], "'ann' stands in"),
        (["revoke", "bob"], "'bob' means no token"),
        (["revoke", "abc"], "'abc' means no token"),
        (["revoke", "a" * 8], f"means several tokens: {'a' * 8}"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(token, file, arguments, words):
    file.write_text(f"{'a' * 64} red student ann\n{'a' * 63}b red\n")
    before = file.read_text()
    status, out, err = token(*arguments)
    assert (status, out) == (1, "")
    assert words in err
    assert file.read_text() == before


def test_a_malformed_file_is_neither_read_nor_written(token, file):
    file.write_text("my-secret-token red\n")
    for arguments in (["list"], ["new", "red"], ["revoke", "ann"]):
        status, out, err = token(*arguments)
        assert (status, out) == (1, "")
        assert f"{file}:1: expected 'SHA256-OF-TOKEN TENANT" in err
        assert "my-secret-token" not in err
    assert file.read_text() == "my-secret-token red\n"


@pytest.mark.parametrize(
    "line",
    [
        digest_of("t"),
        f"{digest_of('t')} _platform",
        f"{digest_of('t')} red admin admin",
        f"{digest_of('t')} red admin ann bob",
        f"{digest_of('t')} red ann admin",
        f"{digest_of('t').upper()} red",
        f"{digest_of('t')[:-1]} red",
        "plain-token red",
        f"{digest_of('one')} blue",
        f"{digest_of('one')} red admin",
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line):
    file = tmp_path / "tokens"
    file.write_text(f"{digest_of('one')} red\n{line}")
    with pytest.raises(ValueError, match=r"tokens:2: ") as refused:
        read_tokens(file)
    said = "stands in the file already, for red" if digest_of("one") in line else "expected 'SHA256-OF-TOKEN TENANT"
    assert said in str(refused.value)


def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path):
    file = tmp_path / "tokens"
    file.write_bytes(f"{digest_of('one')} red\n".encode() + "Jürgen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"tokens:2: .*; the file has to be UTF-8") as refused:
        read_tokens(file)
    assert "rgen" not in str(refused.value)


def _add(path, tenant):
    for _ in range(10):
        add_token(path, new_token(tenant)[1])


def test_writers_at_once_lose_no_token(tmp_path):
    path = tmp_path / "tokens"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add, args=(path, f"t{number}")) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(read_tokens(path)) == 30
    remove_token(path, next(iter(read_tokens(path))))
    assert len(read_tokens(path)) == 29


def test_a_write_that_fails_leaves_the_file_and_no_litter(tmp_path):
    path = tmp_path / "tokens"
    add_token(path, new_token("red")[1])
    before = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        add_token(path, Token("a" * 64, "\ud800"))
    assert path.read_text() == before
    assert {each.name for each in tmp_path.iterdir()} == {"tokens", ".tokens.lock"}
