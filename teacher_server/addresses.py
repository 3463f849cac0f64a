"""Which addresses lead where: to this machine alone, to all of its interfaces, or to one that students can be told."""

import ipaddress
import os
import socket
from pathlib import Path

from teacher_server.config import NetworkConfig

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = "/proc/self/ns/net"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: it may resolve to anything
        return False


def advertised(config: NetworkConfig, port: int) -> str | None:
    """host:port at which students reach a replica whose gRPC port is `port`; None where nothing says so, since it is
    bound to all interfaces."""
    given = config.advertise_address
    if given is not None:
        return given if given.rpartition(":")[2].isdigit() and not given.endswith("]") else f"{given}:{port}"
    try:
        if ipaddress.ip_address(config.host).is_unspecified:
            return None
    except ValueError:  # a name
        pass
    return config.address(port)


def scraped(config: NetworkConfig, grpc_port: int, http_port: int) -> str:
    """host:port of a replica's HTTP port, at the host at which students reach it; the one bound where nothing says."""
    host, _, _ = (advertised(config, grpc_port) or config.address(grpc_port)).rpartition(":")
    return f"{host}:{http_port}"


def reach(address: str) -> str:
    """Within which network host:port means this process: "" for everywhere, else the name of this machine's loopback.

    Containers and network namespaces have loopbacks of their own.
    """
    if not is_loopback(address.rpartition(":")[0].strip("[]")):
        return ""
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink(_NETWORK)}"  # noqa: PTH115 - its target is no path
    except OSError:  # no Linux
        return socket.gethostname()
