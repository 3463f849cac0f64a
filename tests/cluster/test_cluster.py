"""docker-compose.yml run for real: images, health, a UNIX job counted to the sample, kills, restarts, Prometheus.

`make cluster-test` runs it, `make test` does not: it needs a Docker engine, and takes minutes. The tests are steps of
one story, in this order, on one stack.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.engine import NoEngine, docker
from tests.cluster.stack import OURS, running, until

pytestmark = pytest.mark.timeout(3600)
ONE_SHOTS = {"tokens", "demo-teacher"}
USERS = {"prometheus": "65534:65534", "grafana": "472:0", "redis-cache": "999:999", "redis-ledger": "999:999"}


@pytest.fixture(scope="module")
def stack(request):
    try:
        with running() as stack:
            yield stack
            if request.session.testsfailed:
                print(stack.logs())
    except NoEngine as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(scope="module")
def admin(stack):
    return stack.token("admin")


def charged(stack, admin, job):
    """Samples that the ledger has charged to a job of tenant `demo`."""
    lines = stack.page("HTTP", f"/v1/spend?tenant=demo&job={job}", admin)["lines"]
    assert {(line["tenant"], line["job"]) for line in lines} == {("demo", job)}
    return sum(int(line["computed"]) for line in lines)


def verified(stack):
    """The books balance: (forwarded, charged, wasted, own)."""
    summary = stack.executed("teacher", "teacher-server", "ledger", "verify")
    counts = re.search(r"forwarded (\d+) = charged (\d+) \+ wasted (\d+) \+ own (\d+)", summary)
    assert counts, summary
    stack.note(f"ledger verify: {summary.strip()}")
    return tuple(map(int, counts.groups()))


# ---------------------------------------------------------------- up


def test_all_services_are_healthy(stack):
    found = stack.containers()
    expected = {"tokens", "demo-teacher", "redis-cache", "redis-ledger", "teacher", "ray-head", "ray-worker"}
    assert found.keys() == expected | {"prometheus"} | ({"grafana"} if stack.pulled else set())
    for service, seen in found.items():
        if service in ONE_SHOTS:
            assert (seen["State"]["Status"], seen["State"]["ExitCode"]) == ("exited", 0), service
        else:
            assert seen["State"]["Health"]["Status"] == "healthy", service
            assert seen["RestartCount"] == 0, service


def test_all_are_confined(stack):
    for service, seen in stack.containers().items():
        host = seen["HostConfig"]
        assert seen["Config"]["User"] == USERS.get(service, "10001:10001"), service
        assert host["ReadonlyRootfs"], service
        assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False), service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["PidsLimit"] or service in ONE_SHOTS, service
        published = [to for ports in seen["NetworkSettings"]["Ports"].values() for to in ports or []]
        assert {to["HostIp"] for to in published} <= {"127.0.0.1"}, service
    for service in ("teacher", "ray-worker"):
        status = stack.executed(service, "cat", "/proc/self/status")
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        assert len(re.findall(r"^(?:CapEff|CapPrm|CapBnd):\s+0+$", status, re.MULTILINE)) == 3
        assert re.search(r"^Uid:\s+10001\s+10001", status, re.MULTILINE)
    for image in OURS:
        config = docker("image", "inspect", "--format", "{{.Config.User}} {{json .Config.Entrypoint}}", image)
        assert re.fullmatch(r'10001:10001 \["(teacher-server|student-worker)"\]', config.strip())


def test_secrets_are_in_no_process_list(stack):
    password = stack.environment["REDIS_PASSWORD"]
    for service in ("redis-cache", "redis-ledger", "teacher", "ray-worker"):
        processes = docker("top", stack.container(service)["Id"], "-eo", "pid,args")
        assert password not in processes
        assert "preceptor_" not in processes


def test_a_students_code_does_not_reach_the_stores(stack):
    probe = "import socket\ntry: socket.create_connection(('redis-ledger', 6379), 3)\nexcept OSError: print('away')"
    assert stack.executed("ray-worker", "python", "-c", probe).strip() == "away"


def test_tokens_are_for_those_who_need_them(stack):
    modes = stack.compose(
        "run", "--rm", "-T", "--entrypoint", "sh", "tokens", "-c", "stat -c '%n %a %u:%g' /tokens/*/token* /tokens/*"
    )
    found = dict(line.split(" ", 1) for line in modes.splitlines())
    assert {found[f"/tokens/{role}/token"] for role in ("admin", "viewer", "student")} == {"640 10001:10001"}
    assert found["/tokens/server/tokens"] == "600 10001:10001"
    assert {found[f"/tokens/{name}"] for name in ("admin", "viewer", "student", "server")} == {"750 10001:10001"}
    for service, role in (("ray-worker", "student"), ("prometheus", "viewer")):
        assert stack.executed(service, "ls", "/tokens").split() == [role]


# ---------------------------------------------------------------- a student


def test_the_demo_is_counted_to_the_sample(stack, admin):
    run = stack.launch("demo")
    stack.note(f"demo: accuracy {run['accuracy']:.2%}, {run['asked']} samples asked, {run['seconds']:.0f} s")
    assert run["asked"] == run["computed"] == 36_000  # UNIX asks about fresh mixtures: nothing was cached
    assert run["accuracy"] > 0.95
    assert charged(stack, admin, "demo") == run["computed"]

    def in_prometheus(metric):
        return [(labels["tenant"], labels["job"], value) for labels, value in stack.series(metric)]

    expected = [("demo", "demo", run["computed"])]
    for metric in ("preceptor_charged_samples_total", "preceptor_asked_samples_total"):
        until(lambda metric=metric: in_prometheus(f'{metric}{{job="demo"}}') == expected, metric)
    # The student has gone; Prometheus has what it told at its end.
    student = 'last_over_time(preceptor_student_asked_samples_total{job="demo"}[5m])'
    assert in_prometheus(student) == expected
    forwarded, paid, wasted, own = verified(stack)
    assert forwarded == paid + wasted + own
    stack.note(f"demo: {run['computed']} in the run, in the ledger and in Prometheus, tenant demo, job demo")


def test_a_killed_teacher_comes_back_and_the_ledger_is_whole(stack, admin):
    before = stack.container("teacher")["RestartCount"]
    away = []

    def kill(line):
        if not re.search(r": epoch [38]/12,", line):
            return
        pid = stack.container("teacher")["State"]["Pid"]
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"teacher-server" in program, "the engine is not on this machine: its processes are not ours to kill"
        os.kill(pid, signal.SIGKILL)  # `docker kill` would tell the engine not to start it again
        since = time.monotonic()
        until(
            lambda: stack.container("teacher")["RestartCount"] == before + len(away) + 1, "the engine starts it again"
        )
        until(stack.ready, "the teacher is ready")
        away.append(f"{time.monotonic() - since:.1f} s")

    run = stack.launch("killed", kill)
    assert len(away) == 2
    stack.note(f"teacher killed twice: ready again after {' and '.join(away)}; the job finished: {run['accuracy']:.2%}")
    assert run["asked"] == run["computed"] == 36_000
    assert charged(stack, admin, "killed") == run["computed"]
    forwarded, paid, wasted, own = verified(stack)
    assert forwarded == paid + wasted + own


def test_stores_that_restart_lose_nothing(stack, admin):
    restarted = []

    def restart(line):
        for epoch, store in ((3, "redis-ledger"), (6, "redis-cache")):
            if f": epoch {epoch}/12," in line:
                stack.compose("restart", store)
                restarted.append(store)

    run = stack.launch("stores", restart)
    assert restarted == ["redis-ledger", "redis-cache"]
    stack.note(f"both Redis restarted during a job, which finished: {run['accuracy']:.2%}")
    assert run["asked"] == run["computed"] == 36_000
    until(lambda: charged(stack, admin, "stores") == run["computed"], "all is booked")
    forwarded, paid, wasted, own = verified(stack)
    assert forwarded == paid + wasted + own
    assert charged(stack, admin, "demo") == charged(stack, admin, "killed") == 36_000  # as before


# ---------------------------------------------------------------- to see it


def test_prometheus_finds_everything_and_no_alert_fires(stack):
    def targets():
        return stack.page("PROMETHEUS", "/api/v1/targets?state=active")["data"]["activeTargets"]

    until(lambda: all(target["health"] == "up" for target in targets()), "targets are up")
    jobs = sorted(target["labels"]["job"] for target in targets())
    assert jobs == ["preceptor", "ray", "ray"]
    groups = stack.page("PROMETHEUS", "/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    until(lambda: not stack.page("PROMETHEUS", "/api/v1/alerts")["data"]["alerts"], "no alert is pending or fires", 150)
    fired = stack.series('count by (alertname) (last_over_time(ALERTS{alertstate="firing"}[1h]))')
    stack.note(
        f"prometheus: {len(jobs)} targets up, {len(rules)} rules without an error, alerts fired: {fired or 'none'}"
    )
    assert fired == []


def test_grafana_has_its_boards(stack):
    if not stack.pulled:
        stack.note("grafana: not here")
        return
    boards = stack.page("GRAFANA", "/api/search?type=dash-db")
    files = list((Path(__file__).parents[2] / "deploy/grafana/dashboards").glob("*.json"))
    assert len(boards) == len(files) > 0
    stack.note(f"grafana: {len(boards)} boards, for anybody on this machine")


# ---------------------------------------------------------------- down


def test_a_teacher_that_is_stopped_drains(stack):
    teacher = stack.container("teacher")["Id"]
    since = time.monotonic()
    docker("stop", teacher)
    seconds = time.monotonic() - since
    state = stack.container("teacher")["State"]
    assert (state["Status"], state["ExitCode"], state["OOMKilled"]) == ("exited", 0, False)
    assert '"message": "drained"' in stack.compose("logs", "--no-log-prefix", "--tail", "5", "teacher")
    stack.note(f"docker stop: the teacher drained and ended with status 0 after {seconds:.1f} s")
    until(lambda: stack.series('up{job="preceptor", instance="teacher:8000"} == 0'), "Prometheus misses it")
