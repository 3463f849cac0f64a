"""A real Prometheus that scrapes a real teacher and student answers every expression of the boards, and rightly."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from protos import teacher_pb2 as pb
from tests.asking import refusal, stub_at
from tests.boards import BOARDS, STEP, Looked, asked, panels, targets_of
from tests.ray_training import Exact, save_exact
from tests.serving import ROOT, until
from tests.watching import TOKENS, needs_prometheus, rules, watching

EPOCHS, KEEP = 10, 0.75


class Unhurried(Exact):
    """Takes its time as long as a file is there, so that others wait and a run lasts for some scrapes."""

    def __init__(self, slow):
        super().__init__()
        self.slow = Path(slow)

    def forward(self, x):
        if self.slow.exists():
            time.sleep(0.05)
        return super().forward(x)


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
    slow = folder / "slow"
    slow.touch()
    settings = {
        "model": "tests.test_boards_answered:Unhurried",
        "model_arguments": json.dumps({"slow": str(slow)}),
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
        watched.set_budget("red", "digits", 90_000)
        where = ["--teacher-address", watched.grpc, "--metrics-targets", watched.targets]
        command = [sys.executable, "-m", "student_worker", "train", *flags, *where]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as student:
            burst(watched)
            ended = time.time()
            for _ in range(2):
                refused(watched)
                time.sleep(1.1)
            with watched.student("blue", "patient") as teacher:
                while time.time() < ended + 2 * STEP + 2 or reached(watched) < 4 / EPOCHS:
                    assert student.poll() is None, student.stderr.read().decode()
                    teacher.label(digits(8, seed=0))  # cached
                    time.sleep(0.5)
            during = Looked(watched, since, time.time() - 1)
            slow.unlink()
            _, said = student.communicate(timeout=60)
            assert student.returncode == 0, said.decode()
        left = time.time()
        until(lambda: watched.value("timestamp(preceptor_ledger_pending_samples)") > left)
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
@pytest.mark.parametrize("uid", BOARDS)
def test_a_tables_columns_can_be_joined(seen, uid):
    """Grafana makes one row of rows whose common labels are equal. So a name would part them, and a label that some
    rows of a column lack would join what is apart."""
    for panel in panels(BOARDS[uid]):
        for target in panel["targets"] if any(one["id"] == "merge" for one in panel.get("transformations", ())) else ():
            found = [labels for labels, _ in seen.during.shown(target)]
            assert len({frozenset(labels) for labels in found}) == 1, (panel["title"], found)
            assert "__name__" not in found[0], panel["title"]


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

    assert column("charged") == booked["computed"]
    for name in ("asked", "cached", "coalesced"):
        assert column(name) == booked[name]
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
    left = {("red", "(all)"): 100_000 - spent, ("red", "digits"): 90_000 - booked["computed"]["red", "digits"]}
    until(lambda: seen.now().column("preceptor-compute", "Budgets", "left") == left)


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
