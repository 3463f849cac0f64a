"""Who asks: tokens files, tenants and admins."""

import hashlib

import pytest

from teacher_server.auth import Authenticator, Caller, check_tenant_name
from teacher_server.errors import InvalidQuery, Unauthenticated


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(token, **metadata):
    return {"authorization": f"Bearer {token}", **metadata}


def authenticator(tmp_path, *lines):
    file = tmp_path / "tokens"
    file.write_text("\n".join(lines))
    return Authenticator.from_file(file)


def test_a_token_is_its_tenants_and_only_some_are_admins(tmp_path):
    who = authenticator(
        tmp_path,
        "# who may ask",
        "",
        f"{digest('one')} red",
        f"  {digest('two')}\tred   admin  # the owner",
        f"{digest('three')} blue.team-1",
    )
    assert who.caller(bearer("one")) == Caller("red", "default")
    assert who.caller(bearer("two", **{"preceptor-job": "a/b"})) == Caller("red", "a/b")
    assert who.caller(bearer("three") | {"authorization": "bearer three"}).tenant == "blue.team-1"
    assert [who.is_admin(bearer(token)) for token in ("one", "two", "three")] == [False, True, False]


def test_without_a_file_everybody_is_default_and_an_admin():
    who = Authenticator.from_file(None)
    assert who.caller({}) == Caller("default", "default")
    assert who.is_admin({})
    assert not Authenticator({digest("t"): ("red", False)}).is_admin(bearer("t"))


@pytest.mark.parametrize(
    "metadata", [{}, {"authorization": ""}, bearer(""), bearer("other"), {"authorization": "Basic one"}]
)
def test_an_unknown_token_is_refused_and_not_repeated(tmp_path, metadata):
    who = authenticator(tmp_path, f"{digest('one')} red admin")
    for ask in (who.caller, who.is_admin):
        with pytest.raises(Unauthenticated) as refused:
            ask(metadata)
        assert "other" not in str(refused.value)


def test_a_file_without_lines_lets_nobody_in(tmp_path):
    with pytest.raises(Unauthenticated):
        authenticator(tmp_path, "# nobody yet").caller(bearer("one"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (digest("t"), "expected 'SHA256-OF-TOKEN TENANT'"),
        (f"{digest('t')} _platform", "a tenant's name begins without _"),
        (f"{digest('t')} red root", "perhaps with 'admin' behind it"),
        (f"{digest('t')} red admin admin", "perhaps with 'admin'"),
        (f"{digest('t').upper()} red", "sha256sum"),
        (f"{digest('t')[:-1]} red", "sha256sum"),
        ("plain-token red", "sha256sum"),
        (f"{digest('one')} blue", "this token stands in the file already, for red"),
        (f"{digest('one')} red admin", "this token stands in the file already, for red"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=r"tokens:2: ") as refused:
        authenticator(tmp_path, f"{digest('one')} red", line)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["", "_platform", "a b", "a/b", "a\tb", "x" * 65, "é"])
def test_a_tenants_name_is_checked(name):
    with pytest.raises(ValueError, match="a name is 1 to 64 letters"):
        check_tenant_name(name)


@pytest.mark.parametrize("name", ["red", "a.b-c_d", "-", "9", "x" * 64])
def test_tenants_may_be_called(name):
    check_tenant_name(name)


@pytest.mark.parametrize("job", ["a b", "x" * 129, "a\n", 'x"}'])
def test_a_jobs_name_is_checked_before_it_is_anybodys(job):
    with pytest.raises(InvalidQuery, match="preceptor-job"):
        Authenticator().caller({"preceptor-job": job})
