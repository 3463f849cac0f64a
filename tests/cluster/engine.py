"""The Docker engine, by its own client: what the tests of the cluster ask of it."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

PREFIX = "preceptor-test"
"""Of the projects that are ours to remove."""


class NoEngine(Exception):
    """With the fix."""


def docker(*arguments: str | Path, timeout: float = 600, **options: Any) -> str:
    """What `docker ...` says; CalledProcessError with all it said where it fails."""
    return said("docker", *arguments, timeout=timeout, **options)


def said(*command: str | Path, timeout: float = 600, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **options)
    if done.returncode:
        words = " ".join(map(str, command))
        raise AssertionError(f"{words}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def engine_version() -> str:
    """Raises NoEngine."""
    if shutil.which("docker") is None:
        raise NoEngine("there is no `docker`: install Docker (on Debian: apt-get install docker.io)")
    try:
        return docker("version", "--format", "{{.Server.Version}}", timeout=30).strip()
    except AssertionError as error:
        raise NoEngine(
            f"no Docker engine answers: start one (`dockerd` as root), or name it in DOCKER_HOST\n{error}"
        ) from None


def compose_command() -> list[str]:
    """As in the Makefile: Docker's own where it is there, else the one of the environment."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else [str(compose_of_the_environment())]


def compose_of_the_environment() -> Path:
    """The program itself: the `docker-compose` beside Python always ends with status 0."""
    package = importlib.util.find_spec("compose")
    assert package
    assert package.origin
    return Path(package.origin).with_name("docker-compose")


def has_image(name: str) -> bool:
    return name in docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()


def can_pull(name: str, seconds: float = 60) -> bool:
    if has_image(name):
        return True
    try:
        docker("pull", "--quiet", name, timeout=seconds)
    except (AssertionError, subprocess.TimeoutExpired):
        return False
    return True


def inspect(name: str) -> Any:
    return json.loads(docker("inspect", name))[0]


def layers(image: str) -> list[tuple[int, str]]:
    """(bytes, how it was made), the first below, without those that are empty."""
    lines = docker("history", "--human=false", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}", image)
    made = [line.partition("\t")[::2] for line in reversed(lines.splitlines())]
    return [(int(size), how) for size, how in made if int(size)]
