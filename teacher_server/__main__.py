"""teacher-server: the command line. Torch is imported only once the arguments are known to be good."""

import os
import sys
from collections.abc import Callable
from typing import Any

from protos.settings import Command, run_command
from teacher_server.config import DoctorSettings, ServeOnRaySettings, ServeSettings
from teacher_server.ledger_settings import (
    BudgetSettings,
    ExportSettings,
    RestoreSettings,
    ShowSettings,
    VerifySettings,
)
from teacher_server.token_settings import ListTokensSettings, NewTokenSettings, RevokeTokenSettings


def _serve(settings: ServeSettings) -> int:
    try:
        import asyncio
        import resource

        from teacher_server.log_lines import logging_to
        from teacher_server.model import ModelError
        from teacher_server.server import serve
    except ModuleNotFoundError as error:
        print(f"teacher-server: {error}; install Preceptor with its [server] extra", file=sys.stderr)
        return 1
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection takes a descriptor; often 1024 are allowed
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with logging_to(sys.stderr):
            return asyncio.run(serve(settings))
    except (ModelError, ValueError, OSError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1


def _serve_on_ray(settings: ServeOnRaySettings) -> int:
    try:
        from teacher_server.log_lines import logging_to
        from teacher_server.ray_fleet import serve_on_ray
        from teacher_server.ray_replicas import ReplicaFailed
    except ModuleNotFoundError as error:
        print(f"teacher-server: {error}; install Preceptor with its [server] and [ray] extras", file=sys.stderr)
        return 1
    try:
        with logging_to(sys.stderr):
            return serve_on_ray(settings)
    except (ReplicaFailed, ValueError, OSError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        return 1


def _doctor(settings: DoctorSettings) -> int:
    from teacher_server.doctor.examine import examine

    return examine(settings, sys.stdout)


def _ledger(name: str) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        try:
            import asyncio

            from teacher_server import ledger_commands
        except ModuleNotFoundError as error:
            print(f"teacher-server: {error}; install Preceptor with its [server] extra", file=sys.stderr)
            return 1
        try:
            status: int = asyncio.run(getattr(ledger_commands, name)(settings, sys.stdout))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough; at its end Python would flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ledger_commands.FAILURES as error:
            print(f"teacher-server ledger {name}: {error}", file=sys.stderr)
            return 1
        return status

    return run


def _token(name: str) -> Callable[[Any], int]:
    def run(settings: Any) -> int:
        from teacher_server import token_commands

        try:
            getattr(token_commands, name)(settings, sys.stdout)
        except (OSError, ValueError) as error:
            print(f"teacher-server token: {error}", file=sys.stderr)
            return 1
        return 0

    return run


COMMANDS: dict[str, Command] = {
    "serve": (ServeSettings, _serve),
    "serve-on-ray": (ServeOnRaySettings, _serve_on_ray),
    "doctor": (DoctorSettings, _doctor),
    "ledger show": (ShowSettings, _ledger("show")),
    "ledger export": (ExportSettings, _ledger("export")),
    "ledger verify": (VerifySettings, _ledger("verify")),
    "ledger restore": (RestoreSettings, _ledger("restore")),
    "ledger budget": (BudgetSettings, _ledger("budget")),
    "token new": (NewTokenSettings, _token("new")),
    "token revoke": (RevokeTokenSettings, _token("revoke")),
    "token list": (ListTokensSettings, _token("show")),
}


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors say it; gRPC's log repeats it
    try:
        return run_command("teacher-server", COMMANDS, argv)
    except KeyboardInterrupt:
        print("teacher-server: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
