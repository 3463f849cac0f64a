"""Writes what kustomize cannot take from where it stands: Prometheus's rules, and which boards there are.

    python deploy/kubernetes/generate.py

A test says when this is due.
"""

from pathlib import Path

DEPLOY = Path(__file__).parent.parent
RULES = DEPLOY / "kubernetes/components/monitoring/rules.yaml"
BOARDS = DEPLOY / "grafana/dashboards/kustomization.yaml"

_RULE = """\
# Made by generate.py from deploy/prometheus/rules.yml and alerts.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: preceptor
spec:
  groups:
"""
_BOARDS = """\
# Made by deploy/kubernetes/generate.py. One ConfigMap each: what `kubectl apply` takes in one is bounded.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
generatorOptions:
  disableNameSuffixHash: true # the label is what the sidecar goes by, and nothing refers to the name
  labels: {grafana_dashboard: "1"}
configMapGenerator:
"""


def rules() -> str:
    """One PrometheusRule with the groups of both files, comments included."""
    groups = []
    for name in ("rules.yml", "alerts.yml"):
        _, _, body = (DEPLOY / "prometheus" / name).read_text().partition("\ngroups:\n")
        groups += [f"  {line}" if line else "" for line in body.splitlines()]
    return _RULE + "\n".join(groups) + "\n"


def boards() -> str:
    """A ConfigMap for each file of a board."""
    names = sorted(path.name for path in BOARDS.parent.glob("*.json"))
    listed = (f"  - {{name: grafana-{name.removesuffix('.json')}, files: [{name}]}}\n" for name in names)
    return _BOARDS + "".join(listed)


if __name__ == "__main__":
    RULES.write_text(rules())
    BOARDS.write_text(boards())
