"""The contract over gRPC (asyncio), with health and reflection; grpc_calls.py has the calls themselves."""

from collections.abc import Callable

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from teacher_server.access import Ended, log_call
from teacher_server.auth import Authenticator
from teacher_server.config import NetworkConfig
from teacher_server.grpc_calls import SERVICE_NAME, Calls
from teacher_server.health import SERVICE_NAME as HEALTH_NAME
from teacher_server.health import Health
from teacher_server.metrics import Metrics
from teacher_server.reflection import Reflection
from teacher_server.service import Service
from teacher_server.tls import Certificates

_LIMITS = {
    "grpc.max_metadata_size": 8 * 1024,
    "grpc.absolute_max_metadata_size": 16 * 1024,
    "grpc.server_handshake_timeout_ms": 10_000,  # TLS and HTTP/2's first frames
    "grpc.keepalive_time_ms": 60_000,  # after as long a silence the peer is asked whether it lives,
    "grpc.keepalive_timeout_ms": 20_000,  # and must say so
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,  # a peer that pings oftener
    "grpc.http2.max_ping_strikes": 2,  # is sent away
    "grpc.max_connection_idle_ms": 300_000,
    "grpc.max_connection_age_grace_ms": 300_000,  # for calls under way at --max-connection-age-seconds
    # No compression: gRPC would unpack a message before anybody knows how large it becomes.
    "grpc.compression_enabled_algorithms_bitset": 1,
    # Or gRPC refuses at random, and soon nearly all, of a connection that has had many calls, one after another too.
    "grpc.http.overload_protection": 0,
    "grpc.so_reuseport": 0,  # a port that is taken must be an error, not a share of its traffic
}
_GRACE_SECONDS = 5.0  # for replies that are on their way, once nothing is computed any more


class GrpcApp:
    """`async with` opens the port, NOT_SERVING until told otherwise; leaving lets replies on their way arrive."""

    def __init__(
        self,
        service: Service,
        authenticator: Authenticator,
        metrics: Metrics,
        config: NetworkConfig,
        *,
        max_tenant_bytes: int,
        certificates: Certificates | None = None,
        on_end: Callable[[Ended], None] = log_call,
    ) -> None:
        """`max_tenant_bytes`: of messages that one tenant may have under way. Clear text without `certificates`.
        `on_end`: called with each call that ended."""
        self._config, self._certificates = config, certificates
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=config.max_concurrent_calls,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.max_allowed_incoming_connections", config.max_connections),
                ("grpc.max_connection_age_ms", int(1000 * config.max_connection_age_seconds)),
                # No more of one connection than of all; its tenant's share is smaller, and refused with a hint when to
                # ask again, where what is beyond this would wait at the client's end.
                ("grpc.max_concurrent_streams", config.max_concurrent_calls),
                *_LIMITS.items(),
            ],
        )
        self._health = Health(SERVICE_NAME)
        self._calls = Calls(
            service,
            authenticator,
            metrics,
            max_concurrent_calls=config.max_concurrent_calls,
            max_tenant_bytes=max_tenant_bytes,
            on_end=on_end,
        )
        self._server.add_generic_rpc_handlers((self._calls.handler(), self._health.handler()))
        reflected = Reflection(authenticator, SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, self._server)
        self.port = 0

    async def __aenter__(self) -> "GrpcApp":
        address = self._config.address(self._config.grpc_port)
        try:
            if self._certificates is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, self._certificates.for_grpc())
        except RuntimeError as error:
            raise OSError(f"grpc_port: cannot bind {address}; is it taken? give another --grpc-port") from error
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._health.close()
        await self._server.stop(min(_GRACE_SECONDS, self._config.drain_seconds))

    def set_serving(self, serving: bool) -> None:
        self._health.set_serving(serving)

    async def idle(self) -> None:
        """Waits until no call of the contract is under way; health and reflection streams do not count."""
        await self._calls.idle.wait()
