"""Manifests of deploy/kubernetes: built by kustomize, and held against schemas, offline.

Kubernetes' own kinds by kubernetes-validate. tests/reference/kuberay.json and prometheus_operator.json have the fields
of each type that custom resources touch, and what each holds: ray.io/v1 by KubeRay's API reference with pods by version
37 of Kubernetes' Python client, monitoring.coreos.com/v1 by the operator's API reference. "!" is required, "[]" a list,
"{}" a map, "a|b" a choice.
"""

import json
import shutil
import subprocess
from functools import cache

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import latest_version, schema_contents
from referencing import Registry, Resource

from tests.serving import ROOT

FOLDER = ROOT / "deploy/kubernetes"
SCHEMA = {
    name: fields
    for file in ("kuberay", "prometheus_operator")
    for name, fields in json.loads((ROOT / f"tests/reference/{file}.json").read_text()).items()
}
KUBERNETES = ("1.30.0", latest_version())
"""Oldest and newest: of the features that the manifests use, matchLabelKeys came last, and is on since 1.27."""
PLAIN = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "any": object}


def kustomize():
    """The command that builds a folder: `kustomize build`, or kubectl's own; None where there is neither."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@cache
def built(folder):
    """What `kubectl apply -k deploy/kubernetes/FOLDER` would send."""
    command = [*kustomize(), FOLDER / folder]
    return [*yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout)]


def read(path):
    return [*yaml.safe_load_all((FOLDER / path).read_text())]


def of_kind(manifests, kind, name=None):
    return [one for one in manifests if one["kind"] == kind and name in (None, one["metadata"]["name"])]


def pods(manifest):
    """Pod specs of a manifest, wherever."""
    found = []
    if isinstance(manifest, dict):
        found += [manifest] if "containers" in manifest else []
        manifest = list(manifest.values())
    if isinstance(manifest, list):
        found += [pod for item in manifest for pod in pods(item)]
    return found


def containers(pod):
    return pod.get("initContainers", []) + pod["containers"]


# ---------------------------------------------------------------- Kubernetes' own kinds


@cache
def _validator(version, kind, api_version):
    """Strict: a field that it does not know is an error."""
    group, _, name = api_version.rpartition("/")
    file = "-".join(filter(None, (kind.lower(), group.partition(".")[0], name)))
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    schema = schema_contents(f"{folder}/{file}.json", version)
    return Draft202012Validator(schema, registry=_definitions(folder, version))


@cache
def _definitions(folder, version):
    return Resource.from_contents(schema_contents(f"{folder}/_definitions.json", version)) @ Registry()


def invalid(manifest, version):
    """What Kubernetes of that version says against a manifest, as lines."""
    validator = _validator(version, manifest["kind"], manifest["apiVersion"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


# ---------------------------------------------------------------- custom resources


def complaints(value, kind, where=""):
    """What the schema says against a value, as lines."""
    kind = kind.removesuffix("!")
    fields = SCHEMA.get(kind)
    if not (fields or kind.startswith(("[]", "{}"))):
        return [] if _fits(value, kind) else [f"{where}: {value!r} is no {kind}"]
    if not isinstance(value, list if kind[0] == "[" else dict):
        return [f"{where}: {value!r} is no {kind}"]
    if not fields:
        items = enumerate(value) if kind[0] == "[" else value.items()
        return [line for key, item in items for line in complaints(item, kind[2:], f"{where}.{key}")]
    lines = [f"{where}: no {name}" for name, of in fields.items() if of.endswith("!") and name not in value]
    for name, item in value.items():
        lines += complaints(item, fields[name], f"{where}.{name}") if name in fields else [f"{where}: what is {name}?"]
    return lines


def _fits(value, kind):
    """A kind of no fields. One that the schema has not fits nothing: tests/reference is to say it then."""
    if kind in PLAIN:
        return isinstance(value, PLAIN[kind]) and not (isinstance(value, bool) and kind in {"integer", "number"})
    return value in kind.split("|")


# ---------------------------------------------------------------- who is whom


def selects(selector, labels):
    """Whether a LabelSelector does."""
    operators = {"In": lambda value, values: value in values, "Exists": lambda value, _: value is not None}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        operators[one["operator"]](labels.get(one["key"]), one.get("values"))
        for one in selector.get("matchExpressions", [])
    )


def allowed(policies, direction, pod, other, port):
    """Whether NetworkPolicies of one namespace let a pod of these labels be reached by (Ingress) or reach (Egress)
    another, of labels and namespace labels, at a TCP port."""
    applied = [
        one["spec"]
        for one in policies
        if direction in one["spec"]["policyTypes"] and selects(one["spec"]["podSelector"], pod)
    ]
    end, key = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
    rules = [rule for spec in applied for rule in spec.get(key, [])]
    return not applied or any(
        any(_is_peer(peer, other) for peer in rule[end])
        and any(one["port"] == port and one["protocol"] == "TCP" for one in rule["ports"])
        for rule in rules
    )


def _is_peer(peer, other):
    labels, namespace = other
    elsewhere = peer.get("namespaceSelector")
    if not (namespace == HERE if elsewhere is None else selects(elsewhere, namespace)):
        return False
    return selects(peer.get("podSelector", {}), labels)


HERE = {"kubernetes.io/metadata.name": "preceptor"}
