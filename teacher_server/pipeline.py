"""One connection to Redis that all callers share, and that tells at once when Redis is gone.

What is asked for while a pipeline is under way goes out together in the next one: no timer, and the more callers there
are, the less each command costs. redis-py connects, authenticates and reads; what its client adds to that (pools,
retries, callbacks) costs ten times as much and would send commands twice.
"""

import asyncio
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Self, cast

import hiredis
from redis.asyncio.connection import Connection, parse_url
from redis.exceptions import AuthenticationError, RedisError, ResponseError

_CONNECT_SECONDS = 1.0
SILENCE_SECONDS = 2.0  # a Redis that has moved nothing for so long is gone
_IDLE_SECONDS = 1.0  # after which we look whether it is still there
_BACKOFF_SECONDS = (0.05, 1.0)
_PIPELINE_COMMANDS = 1024
_PIPELINE_BYTES = 16 * 2**20
_PIECE_BYTES = 2**20  # must go out within the silence that we bear
# RESP2, so that a reply looks the same whatever redis-py's default is; no time limits or retries but ours: a script
# that may have run must not run again behind our back.
_OPTIONS = {
    "protocol": 2,
    "decode_responses": False,
    "socket_connect_timeout": _CONNECT_SECONDS,
    "socket_timeout": None,
    "health_check_interval": 0,
    "retry_on_timeout": False,
}
_GONE = (RedisError, OSError)  # what redis-py raises; ResponseError, one command's own, is taken out before
# Of redis://user:pass#word@host redis-py makes host `user`, port `pass`, and both would show in our messages.
_URL = re.compile(r"(unix://([^/?#]*@)?/[^?#]+|rediss?://([^/?#]*@)?[^/?#@:][^/?#@]*(/\d*)?)(\?[^#@]*)?")
_log = logging.getLogger(__name__)

Part = bytes | str | int | float
_Command = tuple[bytes, asyncio.Future[Any]]
_pack = cast("Callable[[tuple[Part, ...]], bytes]", hiredis.pack_command)  # its stub says: a tuple of one


class StoreUnavailable(Exception):
    """This Redis gives no answer: it is gone or silent. What was under way may have run, or not."""


class Pipeline:
    """One Redis. `async with` connects; whoever is inside may use it from one event loop, in any number of tasks.

    When Redis goes away, what is under way and what comes fails at once with StoreUnavailable, until one attempt in
    the background has reached it again. Nothing is ever sent twice.
    """

    def __init__(self, url: str, what: str) -> None:
        """`what` it is, "cache" or "ledger", for messages. Raises ValueError for what is no URL of a Redis."""
        self.what = what
        self._make, self.where = _parse(url, what)
        self.connected_since = 0.0
        """time.time() when the present connection was made, on which all later acknowledgements came."""
        self._connection: Any = None  # redis-py annotates its connections in part only
        self._why_not = "not connected"
        self._asked: deque[_Command] = deque()
        self._under_way: list[_Command] = []
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[NoReturn] | None = None

    @property
    def available(self) -> bool:
        """Whether Redis answered when last asked, which was a second or two ago at most."""
        return self._connection is not None

    async def __aenter__(self) -> Self:
        """Raises OSError naming what is not reached, where, and the option to change; never the password."""
        try:
            self._connected(await self._connect())
        except _GONE as error:
            fix = f"start a Redis there, or give another --{self.what}-redis-url"
            if isinstance(error.__cause__ or error, AuthenticationError):  # redis-py wraps it on a unix socket
                fix = f"give user and password with the URL, in the environment's TEACHER_{self.what.upper()}_REDIS_URL"
            elif str(error).startswith("MISCONF"):  # it refuses even PING
                fix = "it cannot write to its disk: make room there, and it takes writes again by itself"
            raise OSError(f"{self.what}: no answer from {self.where} ({_say(error)}); {fix}") from None
        self._runner = asyncio.create_task(self._run(), name=f"store {self.what}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        await self._lose("closed")  # a runner cancelled before it began did not

    async def command(self, *parts: Part) -> Any:
        """The reply, with bytes for strings. Raises StoreUnavailable, or redis.exceptions.ResponseError for an error
        of this very command. Cancelled before it has gone out, it never does."""
        return await self._ask(*parts)

    async def apart(self, *commands: tuple[Part, ...], within: float) -> list[Any]:
        """The replies of commands that may block for `within` seconds, on a connection of their own. Raises as
        `command`, for the first that failed."""
        if self._connection is None:
            raise self._unavailable()
        loop = asyncio.get_running_loop()
        asked = [(_pack(parts), loop.create_future()) for parts in commands]
        try:
            connection = await self._connect()
            try:
                await _exchange(connection, asked, within + SILENCE_SECONDS)
            finally:
                await connection.disconnect(nowait=True)
        except _GONE as error:
            raise StoreUnavailable(f"{self.what}: no answer from {self.where} ({_say(error)})") from error
        replies = await asyncio.gather(*(reply for _, reply in asked), return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    def _ask(self, *parts: Part) -> asyncio.Future[Any]:
        if self._connection is None:
            raise self._unavailable()
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append((_pack(parts), reply))
        self._wake.set()
        return reply

    def _unavailable(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self.what}: no answer from {self.where} ({self._why_not})")

    async def _connect(self) -> Any:
        connection = self._make()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS + SILENCE_SECONDS):
                await connection.connect()
                await connection.send_command("PING")  # which needs the password, and the data to be loaded
                await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _connected(self, connection: Any) -> None:
        self._connection = connection
        self.connected_since = time.time()

    async def _run(self) -> NoReturn:
        try:
            while True:
                try:
                    await self._serve()
                except _GONE as error:
                    await self._lose(_say(error))
                    _log.warning("%s: %s is gone (%s), trying to reach it", self.what, self.where, self._why_not)
                self._connected(await self._reconnect())
                _log.warning("%s: %s answers again", self.what, self.where)
        except Exception:
            _log.exception("%s: %s is given up for a fault of ours", self.what, self.where)
            raise
        finally:
            await self._lose("closed")

    async def _serve(self) -> NoReturn:
        while True:
            if not self._asked:
                self._wake.clear()
                try:
                    async with asyncio.timeout(_IDLE_SECONDS):
                        await self._wake.wait()
                except TimeoutError:
                    self._ask("PING").add_done_callback(asyncio.Future.exception)  # nobody else looks at it
            self._under_way = self._next_pipeline()
            await _exchange(self._connection, self._under_way, SILENCE_SECONDS)

    def _next_pipeline(self) -> list[_Command]:
        commands: list[_Command] = []
        size = 0
        while self._asked and len(commands) < _PIPELINE_COMMANDS and size < _PIPELINE_BYTES:
            packed, reply = self._asked.popleft()
            if not reply.done():  # else its caller has gone
                commands.append((packed, reply))
                size += len(packed)
        return commands

    async def _lose(self, why: str) -> None:
        connection, self._connection, self._why_not = self._connection, None, why
        for _, reply in (*self._under_way, *self._asked):
            if not reply.done():
                reply.set_exception(self._unavailable())
        self._under_way = []
        self._asked.clear()
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _reconnect(self) -> Any:
        pause, longest = _BACKOFF_SECONDS
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
            with suppress(*_GONE):
                return await self._connect()


async def _exchange(connection: Any, commands: list[_Command], patience: float) -> None:
    """Sends all, and hands each reply to whoever waits for it. Raises TimeoutError after so many seconds of silence."""
    loop = asyncio.get_running_loop()
    data = b"".join([packed for packed, _ in commands])
    async with asyncio.timeout(patience) as limit:
        for start in range(0, len(data), _PIECE_BYTES):
            await connection.send_packed_command(data[start : start + _PIECE_BYTES], check_health=False)
            limit.reschedule(loop.time() + patience)
        for number, (_, reply) in enumerate(commands):
            if number:
                limit.reschedule(loop.time() + patience)
            try:
                value = await connection.read_response()
            except ResponseError as error:
                if not reply.done():
                    reply.set_exception(error)
            else:
                if not reply.done():
                    reply.set_result(value)


def _parse(url: str, what: str) -> tuple[Callable[[], Any], str]:
    """What makes connections to that URL, and its name without the password."""
    misread = ValueError(
        f"{what}_redis_url: not understood; write redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// for TLS "
        "(with ?ssl_ca_certs=FILE) or unix://[[USER]:PASSWORD@]/PATH, and /?#@ in a password percent-encoded"
    )
    if not _URL.fullmatch(url):
        raise misread
    try:
        options: dict[str, Any] = dict(parse_url(url))
        make = partial(options.pop("connection_class", Connection), **{**options, **_OPTIONS})
        make()  # only now does it look at its arguments
    except (ValueError, TypeError, RedisError):  # whose text may quote the password
        raise misread from None
    if "path" in options:
        return make, os.path.realpath(options["path"])
    host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    return make, f"{url.partition(':')[0]}://{host}:{options.get('port', 6379)}/{options.get('db', 0)}"


def _say(error: BaseException) -> str:
    return str(error) or f"silent for {SILENCE_SECONDS:g} s"
