"""deploy/grafana: boards that load, name only what there is, and sum rightly where replicas restart."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.boards import BOARDS, FOLDER, everything, panels, targets_of
from tests.watching import needs_prometheus, promtool

BUILT_IN = {"__interval", "__rate_interval", "__range", "__url_time_range"}


# ---------------------------------------------------------------- without a server


def test_the_boards_are_what_the_program_writes(tmp_path):
    subprocess.run([sys.executable, FOLDER / "boards.py", tmp_path], check=True)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_text() for file in (FOLDER / "dashboards").glob("*.json")}, (
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
    assert made["url"] == "http://prometheus:9090"
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
    "restarted as the range begins": ({"a": "1000+10x40 10+10x39"}, 400),
}
"""{tenant: ({replica: its counter every 15 s}, what it gained in the last 10 of 20 minutes and 7 s)}"""


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
        if "restarted" in tenant:
            total = f"vector({gained}) and {total} > {0.95 * gained} and {total} < {1.05 * gained}"
        cases.append({"expr": total, "eval_time": "20m7s", "exp_samples": [{"labels": "{}", "value": gained}]})
    file = tmp_path / "totals.yml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": cases}]}))
    promtool("test", "rules", file)
