"""How both programs read their knobs: one definition is config field, flag, environment variable and TOML key."""

import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

# Kubernetes gives its pods TEACHER_SERVICE_HOST, TEACHER_PORT_8001_TCP and the like for a Service called "teacher".
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_(HOST|PORT)(_\w+)?=.*|\w+_PORT_\d+_(TCP|UDP)(_\w+)?=.*|\w+_PORT=(tcp|udp)://.*"
)


class _TomlFile(TomlConfigSettingsSource):
    """The file that --config (or PREFIX_CONFIG) names; known only once those sources have been read."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, toml_file=None)

    def __call__(self) -> dict[str, Any]:
        config = self.current_state.get("config")
        if config is None:
            return {}
        try:
            values = self._read_files(Path(config))
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"config: {config} cannot be read as TOML: {error}") from error
        if not Path(config).is_file():
            raise SettingsError(f"config: no file at {config}")
        _refuse_unknown(values, {name: name for name in self.settings_cls.model_fields}, f"key in {config}")
        return values


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = None
    """TOML file with any of these keys."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _TomlFile(settings_cls)


Command = tuple[type[Settings], Callable[[Any], int | None]]


def run_command(program: str, commands: Mapping[str, Command], argv: list[str] | None = None) -> int:
    """Parses `program COMMAND [OPTIONS]`, runs the command and returns its exit status (2: unusable arguments)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"usage: {program} COMMAND [OPTIONS]\n\ncommands:")
        for name, (settings, _) in commands.items():
            print(f"  {name:{width}}  {(settings.__doc__ or '').strip().splitlines()[0]}")
        print(f"\n{program} COMMAND --help lists a command's options.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"{program} {version('preceptor')}")
        return 0
    name, *options = arguments
    if name not in commands:
        print(f"{program}: unknown command {name!r}; one of {', '.join(commands)}", file=sys.stderr)
        return 2
    settings_cls, run = commands[name]
    prefix = settings_cls.model_config["env_prefix"]
    try:
        known = {f"{prefix}{field}".upper(): field for cls, _ in commands.values() for field in cls.model_fields}
        ours = {
            key
            for key, value in os.environ.items()
            if key.startswith(prefix) and not _SERVICE_LINK.fullmatch(f"{key}={value}")
        }
        _refuse_unknown(ours, known, "environment variable")
        parser = CliSettingsSource[Any](settings_cls, cli_prog_name=f"{program} {name}")
        parsed = CliApp.run(settings_cls, cli_args=options, cli_settings_source=parser)
    except ValidationError as error:
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else "options"
            given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
            print(f"{program} {name}: {key}: {problem['msg']}{given} (--{key.replace('_', '-')})", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"{program} {name}: {error}", file=sys.stderr)
        return 2
    return run(parsed) or 0


def _refuse_unknown(given: Any, known: Mapping[str, str], what: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists them"
            raise SettingsError(f"unknown {what}: {key}{hint}")
