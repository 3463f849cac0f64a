"""teacher-server: the command line. Torch is imported only once the arguments are known to be good."""

import sys

from protos.settings import Command, run_command
from teacher_server.config import ServeSettings


def _serve(settings: ServeSettings) -> int:
    import asyncio

    from teacher_server.model import ModelError
    from teacher_server.server import serve

    try:
        return asyncio.run(serve(settings))
    except (ModelError, ValueError, OSError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1


COMMANDS: dict[str, Command] = {"serve": (ServeSettings, _serve)}


def main(argv: list[str] | None = None) -> int:
    return run_command("teacher-server", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
