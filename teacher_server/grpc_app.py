"""The contract over gRPC (asyncio), with health and reflection; grpc_calls.py has the calls themselves."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from teacher_server.auth import Authenticator
from teacher_server.config import NetworkConfig
from teacher_server.grpc_calls import SERVICE_NAME, Calls
from teacher_server.metrics import Metrics
from teacher_server.service import Service

_MAX_HEADER_BYTES = 16 * 1024
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
    ) -> None:
        """`max_tenant_bytes`: of messages that one tenant may have under way."""
        self._config = config
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=config.max_concurrent_calls,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port that is taken must be an error, not a share of its traffic
                ("grpc.max_concurrent_streams", config.max_concurrent_calls),  # of one connection
                ("grpc.max_metadata_size", _MAX_HEADER_BYTES),
                ("grpc.absolute_max_metadata_size", _MAX_HEADER_BYTES),
                ("grpc.server_handshake_timeout_ms", 10_000),
                # Who has gone without a word is found out, and who says nothing for long has to connect again.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.max_connection_idle_ms", 600_000),
            ],
        )
        self._health = health.aio.HealthServicer()
        self._calls = Calls(
            service,
            authenticator,
            metrics,
            max_concurrent_calls=config.max_concurrent_calls,
            max_tenant_bytes=max_tenant_bytes,
        )
        self._server.add_generic_rpc_handlers((self._calls.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = 0

    async def __aenter__(self) -> "GrpcApp":
        await self.set_serving(False)
        try:
            self.port = self._server.add_insecure_port(self._config.address(self._config.grpc_port))
        except RuntimeError as error:
            address = self._config.address(self._config.grpc_port)
            raise OSError(f"grpc_port: cannot bind {address}; is it taken? give another --grpc-port") from error
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(min(_GRACE_SECONDS, self._config.drain_seconds))

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def idle(self) -> None:
        """Waits until no call of the contract is under way; health and reflection streams do not count."""
        await self._calls.idle.wait()
