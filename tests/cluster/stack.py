"""docker-compose.yml as a user has it, under a name, ports and volumes of its own."""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.cluster import stand_ins
from tests.cluster.engine import PREFIX, can_pull, compose_command, docker, engine_version, inspect, layers, said
from tests.serving import ROOT, free_port

FILE = ROOT / "docker-compose.yml"
PORTS = ("GRPC", "HTTP", "RAY", "PROMETHEUS", "GRAFANA")
OURS = ("preceptor-teacher:0.1.0", "preceptor-student:0.1.0")


class Stack:
    """A running cluster. What it `notes` is shown at once, and again at the end."""

    def __init__(self, folder: Path, *, pulled: bool) -> None:
        self.began = time.monotonic()
        self.pulled = pulled
        self.project = f"{PREFIX}-{secrets.token_hex(4)}"
        self.ports = {name: free_port() for name in PORTS}
        self.notes: list[str] = []
        self._files = [FILE]
        foreign = ("TEACHER_", "STUDENT_", "PRECEPTOR_", "PIP_", "COMPOSE_")  # the developer's own
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment["REDIS_PASSWORD"] = secrets.token_hex(24)
        self.environment |= {f"PRECEPTOR_{name}_PORT": str(port) for name, port in self.ports.items()}
        if not pulled:
            self.environment["PYTHON_IMAGE"] = stand_ins.PYTHON
            self._files.append(folder / "stand-ins.yml")
            self._files[-1].write_text(yaml.safe_dump({"services": _stand_ins()}))

    def note(self, line: str) -> None:
        line = f"[{time.monotonic() - self.began:4.0f} s] {line}"
        self.notes.append(line)
        print(line, flush=True)

    def command(self, *arguments: str) -> list[str]:
        files = [word for file in self._files for word in ("--file", str(file))]
        return [*compose_command(), "--project-name", self.project, "--env-file", os.devnull, *files, *arguments]

    def compose(self, *arguments: str, timeout: float = 900) -> str:
        return said(*self.command(*arguments), timeout=timeout, env=self.environment, cwd=ROOT)

    def containers(self) -> dict[str, Any]:
        """`docker inspect` of each, by its service."""
        found = {}
        for name in self.compose("ps", "--all", "--quiet").split():
            seen = inspect(name)
            found[seen["Config"]["Labels"]["com.docker.compose.service"]] = seen
        return found

    def container(self, service: str) -> Any:
        return inspect(self.compose("ps", "--all", "--quiet", service).strip())

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "30")

    def executed(self, service: str, *command: str) -> str:
        return self.compose("exec", "-T", service, *command)

    # ------------------------------------------------------------ what it serves

    def text(self, port: str, path: str, token: str | None = None) -> str:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[port]}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return str(reply.read(), "utf-8")

    def page(self, port: str, path: str, token: str | None = None) -> Any:
        return json.loads(self.text(port, path, token))

    def ready(self) -> bool:
        try:
            self.text("HTTP", "/readyz")
        except OSError:
            return False
        return True

    def token(self, role: str) -> str:
        """As docs/cluster.md says."""
        return self.compose("run", "--rm", "-T", "--entrypoint", "cat", "tokens", f"/tokens/{role}/token").strip()

    def series(self, expression: str) -> list[Any]:
        """[(labels, value)] as Prometheus has them now."""
        result = self.page("PROMETHEUS", f"/api/v1/query?query={urllib.parse.quote(expression)}")["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]

    # ------------------------------------------------------------ students

    def launch(self, job: str, on_line: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """The demo under another name; returns what the run says of itself at its end."""
        options = [f"--env=STUDENT_JOB={job}", f"--env=STUDENT_OUTPUT=/runs/{job}"]
        command = self.command("run", "--rm", "-T", "--no-deps", *options, "demo")
        lines = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment, cwd=ROOT
        ) as run:
            assert run.stdout
            for line in run.stdout:
                lines.append(line)
                sys.stdout.write(f"         {line}")
                on_line(line)
        assert run.returncode == 0, "".join(lines)
        record = json.loads(self.executed("ray-worker", "cat", f"/runs/{job}/epoch-0012.json"))
        assert isinstance(record, dict)
        return record


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:.0f} s not yet: {what}"
        time.sleep(0.2)


def _stand_ins() -> dict[str, Any]:
    built = {"build": {"network": "host"}}
    redis = {"image": stand_ins.REDIS}
    return {
        **dict.fromkeys(("teacher", "ray-head"), built),
        **dict.fromkeys(("redis-cache", "redis-ledger"), redis),
        "prometheus": {"image": stand_ins.PROMETHEUS},
        "grafana": {"profiles": ["left-out"]},
    }


@contextmanager
def running() -> Iterator[Stack]:
    """The stack, built and up; nothing of it is left but images."""
    version = engine_version()
    with TemporaryDirectory(prefix="preceptor-cluster-") as folder:
        images = [service["image"] for service in yaml.safe_load(FILE.read_text())["services"].values()]
        pulled = can_pull(next(image for image in images if image.startswith("redis:")))
        stack = Stack(Path(folder), pulled=pulled)
        stack.note(f"engine {version}, compose {stack.compose('version', '--short').strip()}")
        if not pulled:
            stack.note("no image can be pulled: Debian's Python, Redis and Prometheus stand in, Grafana is left out")
            stand_ins.make_bases()
            stack.note("stand-in base images are there")
        try:
            _build(stack)
            stack.compose("up", "--detach", "--no-build", "--wait")
            stack.note("up, everything healthy")
            yield stack
        except BaseException:
            print(stack.logs())
            raise
        finally:
            stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans")
            left = docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={stack.project}")
            assert not left
            print("\n" + "\n".join(["", *stack.notes, f"the whole test took {time.monotonic() - stack.began:.0f} s"]))


def _build(stack: Stack) -> None:
    if stack.pulled:
        stack.compose("build", timeout=3600)
    else:
        with stand_ins.wheels() as arguments:
            stack.environment |= arguments
            stack.compose("build", timeout=3600)
    for image in OURS:
        sizes = [size for size, _ in layers(image)]
        stack.note(f"{image}: {sum(sizes) / 1e6:.0f} MB in layers of {', '.join(f'{s / 1e6:.1f}' for s in sizes)} MB")
