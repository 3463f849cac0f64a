"""deploy/grafana: boards that load, and whose every expression is answered by a real Prometheus, rightly."""

import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import yaml

from protos import teacher_pb2 as pb
from tests.asking import refusal, stub_at
from tests.ray_training import Exact, save_exact
from tests.serving import ROOT, until
from tests.watching import TOKENS, needs_prometheus, promtool, rules, watching

FOLDER = ROOT / "deploy/grafana"
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((FOLDER / "dashboards").glob("*.json"))}
BUILT_IN = {"__interval", "__rate_interval", "__range", "__url_time_range"}


def panels(board):
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def targets_of(uid, title):
    """The queries of a panel."""
    (panel,) = (panel for panel in panels(BOARDS[uid]) if panel["title"] == title)
    return panel["targets"]


def everything(value):
    """All dicts in it, itself included."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything(part)


# ---------------------------------------------------------------- without a server


def test_the_boards_are_what_the_program_writes(tmp_path):
    subprocess.run([sys.executable, FOLDER / "boards.py", tmp_path], check=True)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_text() for file in (FOLDER / "dashboards").iterdir()}, (
        "stale: python deploy/grafana/boards.py"
    )
    assert len(written) == 3


@pytest.mark.parametrize("uid", BOARDS)
def test_a_board_is_whole(uid):
    board = BOARDS[uid]
    assert board["uid"] == uid
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels(board):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles)
    assert [panel["type"] for panel in panels(board)[:4]] == ["stat"] * 4, "figures come first"


@pytest.mark.parametrize("uid", BOARDS)
def test_a_board_names_only_what_there_is(uid):
    board = BOARDS[uid]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "tenant", "job"}
    queried = [*board["annotations"]["list"], *board["templating"]["list"][1:]]
    for panel in panels(board):
        queried += [panel, *panel["targets"]]
    assert all(one["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for one in queried)
    text = json.dumps(board)
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__data", "__field", "__all"}
    assert used <= variables | BUILT_IN
    links = [one["url"] for one in everything(board) if one.get("url")]
    assert {url.split("?")[0] for url in links} >= {f"/d/{other}" for other in BOARDS if other != uid}
    assert all(re.fullmatch(r"/d/([\w-]+)(\?.*)?", url)[1] in BOARDS for url in links)
    assert all(link["keepTime"] and link["includeVars"] for link in board["links"])


def test_provisioning_points_at_what_there_is():
    """As docker-compose.yml mounts it."""
    (source,) = (FOLDER / "provisioning/datasources").glob("*.yaml")
    (made,) = yaml.safe_load(source.read_text())["datasources"]
    assert (made["uid"], made["type"], made["isDefault"]) == ("prometheus", "prometheus", True)
    (provider,) = (FOLDER / "provisioning/dashboards").glob("*.yaml")
    (given,) = yaml.safe_load(provider.read_text())["providers"]
    assert given["options"]["path"] == "/var/lib/grafana/dashboards"


# ---------------------------------------------------------------- made-up replicas

SPENT = "preceptor_charged_samples_total"
HISTORIES = {
    "steady": ({"a": "0+10x80"}, 400),
    "of two": ({"a": "0+10x80", "b": "0+5x80"}, 600),
    "born": ({"a": "_x60 64+10x20"}, 264),
    "gone": ({"a": "0+10x60 stale"}, 200),
    "moved": ({"a": "0+10x60 stale", "b": "_x61 7+10x19"}, 397),
    "restarted": ({"a": "1000+10x50 0+10x29"}, 390),
}
"""{tenant: ({replica: its counter every 15 s}, what it gained in the last 10 of 20 minutes)}"""


@needs_prometheus
def test_totals_are_right_where_replicas_restart_come_and_go(tmp_path):
    """To the sample, but for a restart under the same name: that one Prometheus estimates."""
    (target,) = targets_of("preceptor-compute", "Samples computed")
    series = [
        {"series": f'{SPENT}{{tenant="{tenant}", job="j", instance="{replica}"}}', "values": values}
        for tenant, (replicas, _) in HISTORIES.items()
        for replica, values in replicas.items()
    ]
    cases = []
    for tenant, (_, gained) in HISTORIES.items():
        total = target["expr"].replace("$tenant", tenant).replace("$job", ".*").replace("$__range", "10m")
        if tenant == "restarted":
            total = f"vector({gained}) and {total} > {0.95 * gained} and {total} < {1.05 * gained}"
        cases.append({"expr": total, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": gained}]})
    file = tmp_path / "totals.yml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": cases}]}))
    promtool("test", "rules", file)


# ---------------------------------------------------------------- a real Prometheus, teacher and student

RATE, STEP, RANGE = 5, 4, 600
"""What stands for Grafana's intervals, in seconds: five scrapes, four, and more than it all takes."""
EPOCHS, N, KEEP = 8, 1437, 0.75


class Unhurried(Exact):
    """Takes its time, so that others wait and a run lasts for some scrapes."""

    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)


def asked(expression, interval):
    """As Grafana asks it, with all tenants and jobs chosen."""
    for name, value in (("__rate_interval", RATE), ("__interval", interval), ("__range", RANGE)):
        expression = expression.replace(f"${name}", f"{value}s")
    return expression.replace("$tenant", ".*").replace("$job", ".*")


class Looked:
    """What Grafana shows to somebody who looks at a moment (s since 1970), with all that came before since `since`."""

    def __init__(self, watched, since, moment):
        self._watched, self._since, self.moment = watched, since, moment

    def series(self, expression, *, instant=False, step=1):
        """[(labels, [[time, value], ...]), ...]"""
        if instant:
            found = self._watched.api("/api/v1/query", query=asked(expression, step), time=self.moment)
            return [(one["metric"], [one["value"]]) for one in found["data"]["result"]]
        start, end = (int(when) // step * step for when in (self._since + step, self.moment))  # Grafana aligns them too
        found = self._watched.api("/api/v1/query_range", query=asked(expression, step), start=start, end=end, step=step)
        return [(one["metric"], one["values"]) for one in found["data"]["result"]]

    def shown(self, target):
        return self.series(target["expr"], instant=target.get("instant", False))

    def figures(self, uid, title, ref="A"):
        """{(tenant, job): value} of a table's or figure's query; of all together: the value."""
        (target,) = (target for target in targets_of(uid, title) if target["refId"] == ref)
        found = {
            (labels.get("tenant"), labels.get("job")): float(values[-1][1]) for labels, values in self.shown(target)
        }
        return found[None, None] if found.keys() == {(None, None)} else found

    def column(self, uid, title, heading):
        """The figures of a table's column."""
        (panel,) = (panel for panel in panels(BOARDS[uid]) if panel["title"] == title)
        (organised,) = (one["options"] for one in panel["transformations"] if one["id"] == "organize")
        (value,) = (value for value, name in organised["renameByName"].items() if name == heading)
        return self.figures(uid, title, value[-1])


def digits(n, seed):
    return np.random.default_rng(seed).integers(0, 17, (n, 1, 8, 8), dtype=np.uint8) * 15


def burst(watched):
    """A job asks for more than can be computed at once, for some seconds, and for some of it again."""
    with watched.student("blue", "burst") as teacher, ThreadPoolExecutor(16) as pool:
        batches = [digits(64, seed) for seed in range(64)]
        list(pool.map(teacher.label, batches))
        teacher.label(batches[0])


def refused(watched):
    with stub_at(watched.grpc) as stub:
        who = [("authorization", f"Bearer {TOKENS['blue']}"), ("preceptor-job", "burst")]
        assert refusal(stub.Label, pb.LabelRequest(), metadata=who)[0] is grpc.StatusCode.INVALID_ARGUMENT


def reached(watched):
    """How far the student has come, 0 to 1."""
    return watched.value("preceptor_student_reached_steps / preceptor_student_planned_steps") or 0


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A student has learnt while another job asked: the board while it did, and afterwards; and the teacher's word."""
    folder = tmp_path_factory.mktemp("boards")
    (folder / "red").write_text(TOKENS["red"])
    settings = {
        "model": "tests.test_boards:Unhurried",
        "weights": save_exact(folder),
        "grpc_port": 0,
        "http_port": 0,
        "threads": 1,
        "max_batch_size": 64,
    }
    flags = ["--method", "unix", "--dataset", "digits", "--epochs", str(EPOCHS), "--keep", str(KEEP), "--depth", "0"]
    flags += ["--job", "digits", "--threads", "1", "--output", folder / "run", "--token-file", folder / "red"]
    with watching(folder, **settings) as watched:
        until(lambda: watched.ask("up") and not watched.ask("ALERTS"))  # it has found the teacher
        since = time.time()
        watched.set_budget("red", "", 100_000)
        where = ["--teacher-address", watched.grpc, "--metrics-targets", watched.targets]
        command = [sys.executable, "-m", "student_worker", "train", *flags, *where]
        burst(watched)
        ended = time.time()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as student:
            for _ in range(2):
                refused(watched)
                time.sleep(1.1)
            with watched.student("blue", "patient") as teacher:
                while time.time() < ended + 2 * STEP + 2 or reached(watched) < 0.5:
                    assert student.poll() is None, student.stderr.read().decode()
                    teacher.label(digits(8, seed=0))  # cached
                    time.sleep(0.5)
            during = Looked(watched, since, time.time() - 1)
            _, said = student.communicate(timeout=60)
            assert student.returncode == 0, said.decode()
        until(lambda: watched.value("preceptor_ledger_pending_samples") == 0)
        usage = json.loads(watched.told("/v1/usage"))
        places = [tuple(usage["jobs"][job][:2]) for job in usage["rows"]["job"]]
        booked = {}
        for column, values in usage["rows"].items():
            booked[column] = dict.fromkeys(places, 0)
            for place, value in zip(places, values, strict=True):
                booked[column][place] += float(value)

        def now():
            return Looked(watched, since, time.time())

        yield SimpleNamespace(watched=watched, during=during, after=now(), now=now, ended=ended, booked=booked)


@needs_prometheus
@pytest.mark.timeout(180)
@pytest.mark.parametrize("uid", BOARDS)
def test_every_expression_of_a_board_is_answered(seen, uid):
    board = BOARDS[uid]
    silent = [
        f"{panel['title']}, {target['refId']}: {target['expr']}"
        for panel in panels(board)
        for target in panel["targets"]
        if not seen.during.shown(target)
    ]
    silent += [
        mark["name"]
        for mark in board["annotations"]["list"]
        if not seen.during.series(mark["target"]["expr"], step=STEP)
    ]
    for variable in board["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
        values = seen.watched.api(f"/api/v1/label/{label}/values", **{"match[]": asked(selector, STEP)})["data"]
        if not values:
            silent.append(variable["name"])
    assert silent == []


@needs_prometheus
def test_every_recording_rule_is_answered_and_no_alert_stirs(seen):
    assert [name for name in rules("rules.yml") if not seen.during.series(name)] == []
    groups = seen.watched.api("/api/v1/rules")["data"]["groups"]
    assert [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []
    assert seen.during.series("ALERTS") == []
    assert seen.watched.ask("ALERTS") == {}


@needs_prometheus
def test_the_teachers_board_says_what_the_ledger_says(seen):
    booked = seen.booked

    def column(heading):
        return seen.after.column("preceptor-compute", "By tenant and job", heading)

    for heading, name in (
        ("asked", "asked"),
        ("charged", "computed"),
        ("cached", "cached"),
        ("coalesced", "coalesced"),
    ):
        assert column(heading) == booked[name], heading
    unasked = {place: booked["candidates"][place] - booked["asked"][place] for place in booked["asked"]}
    assert unasked["red", "digits"] > 0
    assert column("not asked about") == unasked
    assert column("FLOPs") == pytest.approx(booked["flops"])
    assert column("device time") == pytest.approx({k: v / 1e9 for k, v in booked["device_nanoseconds"].items()})
    assert column("money") == pytest.approx({k: v / 1e9 for k, v in booked["money_nanos"].items() if v})
    saved = {k: 1 - booked["computed"][k] / (booked["asked"][k] + unasked[k]) for k in unasked}
    assert column("saved") == pytest.approx(saved)
    whole = 1 - sum(booked["computed"].values()) / sum(booked["candidates"].values())
    assert seen.after.figures("preceptor-compute", "Saved against full KD") == pytest.approx(whole)
    assert seen.after.figures("preceptor-compute", "Samples computed") == sum(booked["computed"].values())
    spent = sum(samples for (tenant, _), samples in booked["computed"].items() if tenant == "red")
    until(lambda: seen.now().column("preceptor-compute", "Budgets", "left") == {("red", None): 100_000 - spent})


@needs_prometheus
def test_the_students_board_says_what_the_student_did(seen):
    booked = seen.booked
    place = ("red", "digits")
    uid = "preceptor-students"
    assert seen.after.column(uid, "Runs", "asked") == {place: booked["asked"][place]}
    assert seen.after.figures(uid, "Samples asked") == booked["asked"][place]
    rate = seen.after.figures(uid, "Selection rate")
    assert rate == booked["asked"][place] / booked["candidates"][place]
    assert rate == pytest.approx(KEEP, abs=0.01)
    assert seen.after.figures(uid, "Progress") == {place: 1}
    not_computed = (booked["cached"][place] + booked["coalesced"][place]) / booked["asked"][place]
    assert seen.after.figures(uid, "Not computed for them") == pytest.approx(not_computed)
    assert 0 < seen.after.figures(uid, "Waiting for the teacher") < 1


@needs_prometheus
@pytest.mark.parametrize("title", ["Accuracy against teacher samples", "Loss against teacher samples"])
def test_both_sides_of_a_curve_are_there_at_the_same_moments(seen, title):
    """So that Grafana's merge makes a row of each moment; what is on the x axis only grows."""
    x, y = (seen.after.shown(target) for target in targets_of("preceptor-students", title))
    assert [labels for labels, _ in x] == [labels for labels, _ in y] == [{"tenant": "red", "job": "digits"}]
    ((_, xs),), ((_, ys),) = x, y
    assert [when for when, _ in xs] == [when for when, _ in ys]
    assert len(xs) >= 2
    if "Accuracy" in title:
        assert len(xs) <= EPOCHS
    assert [float(value) for _, value in xs] == sorted(float(value) for _, value in xs)


@needs_prometheus
def test_a_job_starts_and_ends_with_one_mark_each(seen):
    starts, ends = (mark["target"]["expr"] for mark in BOARDS["preceptor-compute"]["annotations"]["list"])
    begun = {labels["job"]: len(values) for labels, values in seen.after.series(starts, step=STEP)}
    assert (begun["digits"], begun["burst"]) == (1, 1)
    ((when, _),) = {labels["job"]: values for labels, values in seen.during.series(ends, step=STEP)}["burst"]
    assert seen.ended < when < seen.ended + 3 * STEP
    assert "digits" not in {labels["job"] for labels, _ in seen.during.series(ends, step=STEP)}
