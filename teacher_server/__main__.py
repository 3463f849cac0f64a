"""teacher-server: the command line. Torch is imported only once the arguments are known to be good."""

import logging
import os
import sys

from protos.settings import Command, run_command
from teacher_server.config import ServeSettings


def _serve(settings: ServeSettings) -> int:
    try:
        import asyncio

        from teacher_server.model import ModelError
        from teacher_server.server import serve
    except ModuleNotFoundError as error:
        print(f"teacher-server: {error}; install Preceptor with its [server] extra", file=sys.stderr)
        return 1
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    try:
        return asyncio.run(serve(settings))
    except (ModelError, ValueError, OSError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1


COMMANDS: dict[str, Command] = {"serve": (ServeSettings, _serve)}


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it; gRPC's log repeats it
    return run_command("teacher-server", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
