"""Spend and budgets over HTTP, beside a real Valkey; who may see and change what, and how refusals read."""

import json
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
from google.protobuf import json_format

from protos import teacher_pb2 as pb
from teacher_server.accounts import Books
from teacher_server.auth import Authenticator
from teacher_server.budgets import audit
from teacher_server.config import NetworkConfig
from teacher_server.http_app import HttpApp
from teacher_server.metrics import Metrics
from teacher_server.service import Service
from teacher_server.store import Store
from teacher_server.tokens import Token, digest_of
from tests.asking import asking, pixels, stub_at
from tests.redis_servers import running
from tests.serving import arguments, http_serving, serving
from tests.spending import RED, a_redis, charge, fill, using

ADMIN = "root"
TOKENS = {"red": "red", "blue": "blue", ADMIN: "red admin", "board": "green viewer"}


def bearer(token):
    return {"authorization": f"Bearer {token}"} if token else {}


class Api:
    """What an HTTP client sees."""

    def __init__(self, address, url):
        self.address, self.url = address, url

    def __call__(self, method, path, token=ADMIN, body=None):
        """(status, reply); the reply is what the JSON holds, None where there is no body."""
        headers = bearer(token)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"content-type": "application/json"} if data else {}
        request = urllib.request.Request(f"http://{self.address}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                status, text = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def get(self, path, token=ADMIN):
        status, reply = self("GET", path, token)
        assert status == 200, reply
        return reply


@contextmanager
def http(url, tokens=None, post=None):
    """An HttpApp on the ledger at `url`."""

    @asynccontextmanager
    async def app():
        metrics = Metrics()
        async with Store(url, "ledger") as store:
            books = Books(store) if post is None else Books(store, lambda: post(store))
            who = Authenticator(tokens and (lambda: tokens))
            async with HttpApp(Service(metrics, books), who, metrics, NetworkConfig(http_port=0), books) as entered:
                yield entered

    with http_serving(app) as port:
        yield Api(f"127.0.0.1:{port}", url)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokens = {digest_of(token): Token(digest_of(token), *words.split()) for token, words in TOKENS.items()}
    with a_redis(tmp_path_factory.mktemp("redis")) as url, http(url, tokens) as api:
        yield api


@pytest.fixture
def api(server):
    """On an empty ledger."""
    using(server.url, lambda store: store.command("FLUSHALL"))
    return server


@pytest.fixture
def full(api):
    using(api.url, fill)
    return api


def message(kind, reply):
    return json_format.ParseDict(reply, kind())


# ---------------------------------------------------------------- spend


def test_spend_is_the_contracts_message_in_json(full):
    reply = full.get("/v1/spend", "blue")
    assert reply == {
        "lines": [
            {
                "tenant": "blue",
                "job": "b",
                "day": day,
                "fingerprint": "f" * 32,
                "candidates": str(asked),
                "asked": str(asked),
                "computed": str(computed),
                "cached": str(asked - computed),
                "coalesced": "0",
                "flops": computed * 2e9,
                "deviceNanoseconds": str(1000 * computed),
                "moneyNanos": str(1_500_000 * computed),
                "currency": "EUR",
                "nanosPerSample": "1500000",
            }
            for day, asked, computed in (("2026-01-31", 12, 0), ("2026-02-01", 40, 40))
        ],
        "budgets": [],
    }
    assert [line.computed for line in message(pb.SpendResponse, reply).lines] == [0, 40]


@pytest.mark.parametrize(
    ("query", "token", "found"),
    [
        ("", "red", {("red", "sweep/a"): 1820, ("red", "other"): 3}),
        ("?job=sweep/a", "red", {("red", "sweep/a"): 1820}),
        ("?job=sweep%2Fa", "red", {("red", "sweep/a"): 1820}),
        ("?tenant=red", "red", {("red", "sweep/a"): 1820, ("red", "other"): 3}),
        ("?since=2026-02-01", "red", {("red", "other"): 3}),
        ("?until=2026-01-30", "red", {("red", "sweep/a"): 1250}),
        ("?since=2026-01-31&until=2026-01-31", "red", {("red", "sweep/a"): 570}),
        ("?since=2026-02-02", "red", {}),
        ("?tenant=blue", "root", {("blue", "b"): 52}),
        ("?tenant=nobody", "root", {}),
        ("?tenant=_platform", "root", {("_platform", "own/warm-up"): 0, ("_platform", "wasted/crash"): 0}),
        (
            "?tenant=*&since=2026-02-01",
            "root",
            {("_platform", "wasted/crash"): 0, ("blue", "b"): 40, ("red", "other"): 3},
        ),
    ],
)
def test_filters_choose_the_lines(full, query, token, found):
    sums = {}
    for line in full.get(f"/v1/spend{query}", token)["lines"]:
        key = line["tenant"], line["job"]
        sums[key] = sums.get(key, 0) + int(line["asked"])
    assert sums == found


@pytest.mark.parametrize("tenant", ["blue", "*", "_platform", "nobody", ""])
def test_only_an_admin_sees_what_others_spent(full, tenant):
    status, reply = full("GET", f"/v1/spend?tenant={tenant}", "red")
    assert (status, reply["reason"]) == (403, "NOT_ALLOWED")
    assert f"tenant: {tenant!r} is not yours, 'red'" in reply["detail"]
    if tenant:
        status, reply = full("GET", f"/v1/budgets/{tenant}", "red")
        assert (status, reply["reason"]) == (403, "NOT_ALLOWED")


def test_what_this_replica_has_not_posted_yet_is_posted_first(api):
    async def post(store):
        await charge(store, RED, 1, "2026-01-31")

    with http(api.url, None, post) as here:
        for count in (1, 2):
            (line,) = here.get("/v1/spend?tenant=red", "")["lines"]
            assert line["computed"] == str(count)
        here("PUT", "/v1/budgets/red", "", {"unit": "samples", "limit": 10})
        for path, spent in (("/v1/budgets", 4), ("/v1/budgets/red", 5)):
            reply = here.get(path, "")
            (budget,) = reply["budgets"] if "budgets" in reply else reply["tenants"][0]["budgets"]
            assert budget["left"] == str(10 - spent)


def test_a_servers_answers_are_in_its_spend_at_once(tmp_path):
    with serving(**arguments(tmp_path), price_nanos=1000) as server, stub_at(server.grpc_address) as stub:
        api = Api(server.http_address, "")
        status, _ = api("PUT", "/v1/budgets/default", "", {"unit": "money", "limit": 1_000_000})
        assert status == 200
        for asked in (5, 10):
            stub.Label(asking(pixels(5, seed=asked)), metadata=[("preceptor-job", "a/b")])
            reply = message(pb.SpendResponse, api.get("/v1/spend?job=a/b", ""))
            assert [(line.asked, line.computed, line.money_nanos) for line in reply.lines] == [
                (asked, asked, 1000 * asked)
            ]
            assert [budget.left for budget in reply.budgets] == [1_000_000 - 1000 * asked]
            assert stub.Spend(pb.SpendRequest(job="a/b")) == reply
        lines = message(pb.SpendResponse, api.get("/v1/spend?tenant=*", "")).lines
        assert {line.job for line in lines if line.tenant == "_platform"} >= {"own/warm-up"}


# ---------------------------------------------------------------- budgets


def test_a_budget_is_set_changed_listed_and_removed(full):
    path = "/v1/budgets/red"
    status, reply = full("PUT", path, body={"unit": "samples", "period": "total", "limit": 2000})
    assert (status, reply) == (
        200,
        {
            "owner": "OWNER_TENANT",
            "name": "red",
            "unit": "UNIT_SAMPLES",
            "period": "PERIOD_TOTAL",
            "limit": "2000",
            "left": "427",
        },
    )
    assert full("PUT", path, body={"unit": "samples", "limit": 100})[1]["left"] == "0"
    status, reply = full("PUT", f"{path}/jobs/sweep/a", body={"unit": "money", "period": "month", "limit": 9 * 10**9})
    budget = message(pb.Budget, reply)
    assert (status, budget.owner, budget.name) == (200, pb.Budget.OWNER_JOB, "sweep/a")
    assert (budget.unit, budget.period) == (pb.Budget.UNIT_MONEY_NANOS, pb.Budget.PERIOD_MONTH)
    assert (budget.limit, budget.left) == (9 * 10**9, 9 * 10**9)  # what was spent was spent in another month
    assert budget.until.ToDatetime().day == 1
    listed = full.get(path, "red")
    assert listed["tenant"] == "red"
    assert [(b["name"], b["limit"]) for b in listed["budgets"]] == [("red", "100"), ("sweep/a", "9000000000")]
    assert full.get("/v1/spend", "red")["budgets"] == listed["budgets"]
    assert full.get("/v1/spend?job=other", "red")["budgets"] == listed["budgets"][:1]
    assert full.get("/v1/spend?tenant=*")["budgets"] == []
    full("PUT", "/v1/budgets/blue", body={"unit": "samples", "period": "day", "limit": 1})
    assert [of["tenant"] for of in full.get("/v1/budgets")["tenants"]] == ["blue", "red"]
    assert full.get("/v1/budgets", "red") == {"tenants": [listed]}
    assert full.get("/v1/budgets/nobody") == {"tenant": "nobody", "budgets": []}

    assert full("DELETE", f"{path}?unit=samples") == (204, None)
    assert full("DELETE", f"{path}/jobs/sweep/a?unit=money&period=month") == (204, None)
    assert full.get(path)["budgets"] == []
    status, reply = full("DELETE", f"{path}/jobs/sweep/a?unit=money&period=month")
    assert (status, reply["reason"]) == (404, "NOT_FOUND")
    assert "job 'sweep/a' of tenant 'red' has no budget of money, per month" in reply["detail"]
    assert full("DELETE", f"{path}?unit=samples")[0] == 404
    changes = [change.details for change in using(full.url, audit) if change.what == "budget"]
    assert {change["who"] for change in changes} == {"http:red"}
    assert [(change["tenant"], change["job"], change["old"], change["new"]) for change in changes] == [
        ("red", "", "", "2000"),
        ("red", "", "2000", "100"),
        ("red", "sweep/a", "", "9000000000"),
        ("blue", "", "", "1"),
        ("red", "", "100", ""),
        ("red", "sweep/a", "9000000000", ""),
    ]


@pytest.mark.parametrize("job", ["a", "a/b", "a:b+c.d_e-f/g", "jobs/jobs", "x" * 128])
@pytest.mark.parametrize("safe", ["", "/:+"])
def test_a_job_may_have_any_name_that_jobs_have(api, job, safe):
    path = f"/v1/budgets/red/jobs/{urllib.parse.quote(job, safe=safe)}"
    status, reply = api("PUT", path, body={"unit": "samples", "limit": 1})
    assert (status, reply["name"]) == (200, job)
    assert api("DELETE", f"{path}?unit=samples")[0] == 204


def test_without_tokens_everybody_is_an_admin(api):
    with http(api.url) as here:
        assert here("PUT", "/v1/budgets/other", "", {"unit": "samples", "limit": 3})[0] == 200
        assert [of["tenant"] for of in here.get("/v1/budgets", "")["tenants"]] == ["other"]
        assert here.get("/v1/spend?tenant=*", "")["lines"] == []


CALLS = [
    ("GET", "/v1/spend", None),
    ("GET", "/v1/budgets", None),
    ("GET", "/v1/budgets/red", None),
    ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": 1}),
    ("PUT", "/v1/budgets/red/jobs/a", {"unit": "samples", "limit": 1}),
    ("DELETE", "/v1/budgets/red?unit=samples", None),
    ("DELETE", "/v1/budgets/red/jobs/a?unit=samples", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_nobody_gets_in_without_a_token_and_only_admins_change(api, method, path, body):
    for token in ("", "unknown"):
        status, reply = api(method, path, token, body)
        assert (status, reply["reason"]) == (401, "UNAUTHENTICATED")
        assert "unknown" not in reply["detail"]
    status, reply = api(method, path, "red", body)
    if method == "GET":
        assert status == 200
    else:
        assert (status, reply["reason"]) == (403, "NOT_ALLOWED")
        assert "only an admin may set or remove budgets" in reply["detail"]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_viewer_sees_everything_and_changes_nothing(full, method, path, body):
    status, reply = full(method, path, "board", body)
    if method == "GET":
        assert status == 200
        assert len(full.get("/v1/spend?tenant=*", "board")["lines"]) > 5
        full("PUT", "/v1/budgets/red", body={"unit": "samples", "limit": 1})
        assert [of["tenant"] for of in full.get("/v1/budgets", "board")["tenants"]] == ["red"]
    else:
        assert (status, reply["reason"]) == (403, "NOT_ALLOWED")
        assert "this token of tenant 'green' is a viewer's" in reply["detail"]


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        *((path, "nothing") for path in ("/livez", "/docs", "/openapi.json")),
        *((path, "a token") for path in ("/v1/teacher", "/v1/spend", "/v1/budgets", "/v1/budgets/red")),
        *((path, "a viewer") for path in ("/metrics", "/v1/spend?tenant=*", "/v1/budgets/blue")),
    ],
)
def test_each_page_asks_for_as_much_as_it_shows(full, path, needs):
    got = {token: _status(full, path, token) for token in ("", "unknown", "red", "board", ADMIN)}
    nobody, student = {"nothing": (200, 200), "a token": (401, 200), "a viewer": (401, 403)}[needs]
    if path == "/v1/teacher":  # none is loaded here, so whoever is let in hears that
        assert got == {"": 401, "unknown": 401, "red": 503, "board": 503, ADMIN: 503}
    else:
        assert got == {"": nobody, "unknown": nobody, "red": student, "board": 200, ADMIN: 200}


def _status(api, path, token):
    request = urllib.request.Request(f"http://{api.address}{path}", headers=bearer(token))
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("GET", "/v1/spend?since=today", None, "query since: Input should be a valid date"),
        ("GET", "/v1/spend?since=2026-02-30", None, "got '2026-02-30'"),
        ("GET", "/v1/spend?since=2026-02-02&until=2026-02-01", None, "since: 2026-02-02 is after until, 2026-02-01"),
        ("GET", "/v1/spend?job=a%20b", None, "job 'a b': a name is"),
        ("PUT", "/v1/budgets/red", {"unit": "samples"}, "body limit: Field required"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": -1}, "greater than or equal to 0, got -1"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": 2**53}, "less than or equal to 9007199254740991"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": 1.5}, "body limit: Input should be a valid integer"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": "1"}, "body limit: Input should be a valid integer"),
        ("PUT", "/v1/budgets/red", {"unit": "dollars", "limit": 1}, "should be 'samples' or 'money', got 'dollars'"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": 1, "period": "week"}, "body period: Input should be"),
        ("PUT", "/v1/budgets/red", {"unit": "samples", "limit": 1, "per": "day"}, "body per: Extra inputs"),
        ("PUT", "/v1/budgets/red", [1], "body: Input should be"),
        ("PUT", "/v1/budgets/red", b"{", "body: this is no JSON"),
        ("PUT", "/v1/budgets/red", None, "body: Field required"),
        ("PUT", "/v1/budgets/_platform", {"unit": "samples", "limit": 1}, "tenant '_platform': a name is"),
        ("PUT", "/v1/budgets/a%20b", {"unit": "samples", "limit": 1}, "tenant 'a b': a name is"),
        ("PUT", "/v1/budgets/red/jobs/a%20b", {"unit": "samples", "limit": 1}, "job 'a b': a name is"),
        ("PUT", "/v1/budgets/red/jobs/", {"unit": "samples", "limit": 1}, "path job: String should have at least 1"),
        ("DELETE", "/v1/budgets/red", None, "query unit: Field required"),
        ("DELETE", "/v1/budgets/red?unit=samples&period=week", None, "query period: Input should be"),
        ("DELETE", "/v1/budgets/red/jobs/?unit=samples", None, "path job: String should have at least 1"),
    ],
)
def test_what_is_not_understood_is_named_with_its_value(api, method, path, body, words):
    status, reply = api(method, path, body=body)
    assert (status, reply["reason"]) == (400, "INVALID_QUERY"), reply
    assert words in reply["detail"]
    assert api.get("/v1/budgets") == {"tenants": []}


def test_a_body_is_small_and_its_echo_is_short(api):
    status, reply = api("PUT", "/v1/budgets/red", body=b" " * 70_000)
    assert (status, reply["reason"]) == (413, "REQUEST_ENTITY_TOO_LARGE")
    assert "65536 bytes at most" in reply["detail"]
    status, reply = api("PUT", "/v1/budgets/red", body={"unit": "s" * 60_000, "limit": 1})
    assert status == 400
    assert len(reply["detail"]) < 300


def test_refusals_of_the_server_itself_have_the_same_shape(api):
    assert api("GET", "/v1/spent") == (404, {"reason": "NOT_FOUND", "detail": "Not Found"})
    assert api("POST", "/v1/spend") == (405, {"reason": "METHOD_NOT_ALLOWED", "detail": "Method Not Allowed"})


def test_without_redis_it_says_503(tmp_path):
    with ExitStack() as stack:
        redis = stack.enter_context(running(tmp_path, "--appendonly", "yes"))
        here = stack.enter_context(http(redis.url))
        redis.kill()
        for method, path, body in CALLS:
            status, reply = here(method, path, "", body)
            assert (status, reply["reason"]) == (503, "LEDGER_UNAVAILABLE"), (method, path)
            assert "ask again, or another replica" in reply["detail"]


def test_all_calls_are_documented(api):
    paths = api.get("/openapi.json")["paths"]
    assert {(method.upper(), path) for path, calls in paths.items() for method in calls if "v1" in path} == {
        ("GET", "/v1/teacher"),
        ("GET", "/v1/spend"),
        ("GET", "/v1/usage"),
        ("GET", "/v1/usage.csv"),
        ("GET", "/v1/budgets"),
        ("GET", "/v1/budgets/{tenant}"),
        ("PUT", "/v1/budgets/{tenant}"),
        ("DELETE", "/v1/budgets/{tenant}"),
        ("PUT", "/v1/budgets/{tenant}/jobs/{job}"),
        ("DELETE", "/v1/budgets/{tenant}/jobs/{job}"),
    }
    for path, calls in paths.items():
        for call in calls.values():
            assert call["summary"]
            if "spend" in path or "budgets" in path or "usage" in path:
                assert {"400", "401", "403", "503"} <= call["responses"].keys()
                assert "422" not in call["responses"]
