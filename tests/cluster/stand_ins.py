"""Base images for a machine that pulls none: Debian by debootstrap, and its own Redis and Prometheus. Grafana has none.

They are no replacement for the published ones: they show that what is built on such images works. Made once, they stay
in the engine until `docker image rm`.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.engine import NoEngine, docker, has_image, said
from tests.serving import ROOT

PYTHON = "preceptor-stand-in/python:3.11-slim-bookworm"
REDIS = "preceptor-stand-in/redis:7"
PROMETHEUS = "preceptor-stand-in/prometheus:2"
_INSTALL = "RUN apt-get -q update && apt-get install -qy --no-install-recommends"
_RECIPES = {
    REDIS: f"FROM {PYTHON}\n{_INSTALL} redis-server && install -d -o 999 -g 999 /data\n",
    PROMETHEUS: f"""FROM {PYTHON}
{_INSTALL} prometheus wget && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
""",
}
_PORT = 38651  # always the same where it is free: it is a build argument, and another one builds anew


def make_bases() -> None:
    """Those that the engine does not have. Raises NoEngine where this machine cannot make any."""
    if not has_image(PYTHON):
        _make_python()
    for name, recipe in _RECIPES.items():
        if not has_image(name):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "Dockerfile").write_text(recipe)
                docker("build", "--network", "host", "--quiet", "--tag", name, folder, env=_classic())


def _classic() -> dict[str, str]:
    """BuildKit would need a plugin of the client's."""
    return os.environ | {"DOCKER_BUILDKIT": "0"}


def _make_python() -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise NoEngine("no image can be pulled here, and none be made: run as root, after apt-get install debootstrap")
    with tempfile.TemporaryDirectory(prefix="preceptor-base-") as folder:
        root = Path(folder) / "root"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        said("debootstrap", "--variant=minbase", packages, "bookworm", root)
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / waste)
            (root / waste).mkdir()
        # Whom this machine trusts, so that pip within a build gets through where pip without does.
        bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
        shutil.copyfile(bundle, root / "etc/ssl/certs/ca-certificates.crt")
        (root / "etc/pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            docker("import", "-", PYTHON, stdin=tar.stdout)


@contextmanager
def wheels() -> Iterator[dict[str, str]]:
    """Build arguments by which pip finds torch: the wheel that this machine's pip finds, served while they are used."""
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch
    with tempfile.TemporaryDirectory(prefix="preceptor-wheels-") as folder:
        said(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, torch[0])
        handler = functools.partial(_Quiet, directory=folder)
        try:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", _PORT), handler)
        except OSError:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        with server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield {"TORCH_INDEX": "", "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_address[1]}/"}
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass
