"""How both programs read their knobs: one definition is config field, flag, environment variable and TOML key."""

import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
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
_USER_INFO = re.compile(r"://\S*@")  # of a URL; there may be a password in it
_POSITIONAL = get_args(CliPositionalArg[str])[1]  # what marks such a field in its metadata


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
        own: Mapping[str, Any] = self.settings_cls.model_fields
        foreign: Mapping[str, Any] = getattr(self.settings_cls, "keys_of_others", {})
        _refuse_unknown(values, {name: name for name in (*own, *foreign)}, f"key in {config}")
        return {name: value for name, value in values.items() if name in own}


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    keys_of_others: ClassVar[Mapping[str, Any]] = {}
    """Keys that may stand in the same TOML file for another command."""

    never_flags: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold a secret: a process list shows every flag."""

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
    """Parses `program COMMAND [OPTIONS]`, runs the command and returns its exit status (2: unusable arguments).

    A command may have two words, "ledger show"; those with the same first one are a group with a --help of its own,
    unless that word is a command by itself, as "launch" is beside "launch stop".
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"{program} {version('preceptor')}")
        return 0
    group = next((f"{word} " for word in arguments[:1] if any(name.startswith(f"{word} ") for name in commands)), "")
    if group.strip() in commands and all(option.startswith("-") for option in arguments[1:2]):
        group = ""
    known = {name.removeprefix(group): name for name in commands if name.startswith(group)}
    words = arguments[1:] if group else arguments
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, known))
        print(f"usage: {program} {group}COMMAND [OPTIONS]\n\ncommands:")
        for word, name in known.items():
            print(f"  {word:{width}}  {(commands[name][0].__doc__ or '').strip().splitlines()[0]}")
        print(f"\n{program} {group}COMMAND --help lists a command's options.")
        return 0 if words else 2
    word, *options = words
    if word not in known:
        print(f"{program}: unknown command {group + word!r}; one of {', '.join(known.values())}", file=sys.stderr)
        return 2
    name = known[word]
    settings_cls, run = commands[name]
    prefix = settings_cls.model_config["env_prefix"]
    try:
        variables = {f"{prefix}{field}".upper(): field for cls, _ in commands.values() for field in cls.model_fields}
        ours = {
            key
            for key, value in os.environ.items()
            if key.startswith(prefix) and not _SERVICE_LINK.fullmatch(f"{key}={value}")
        }
        _refuse_unknown(ours, variables, "environment variable")
        _refuse_secrets(options, settings_cls)
        parser = CliSettingsSource[Any](settings_cls, cli_prog_name=f"{program} {name}")
        parsed = CliApp.run(settings_cls, cli_args=options, cli_settings_source=parser)
    except ValidationError as error:
        for problem in error.errors():
            print(f"{program} {name}: {_say(problem, settings_cls)}", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"{program} {name}: {error}", file=sys.stderr)
        return 2
    return run(parsed) or 0


def _say(problem: ErrorDetails, settings: type[Settings]) -> str:
    if not problem["loc"]:  # of several fields together; all that was given may hold a password
        return problem["msg"].removeprefix("Value error, ")
    key = str(problem["loc"][0])
    flag = f"--{key.replace('_', '-')}"
    if key in settings.model_fields and _POSITIONAL in settings.model_fields[key].metadata:
        flag = key.upper()
    given = "" if problem["type"] == "missing" else f", got {_USER_INFO.sub('://...@', repr(problem['input']))}"
    return f"{key}: {problem['msg']}{given} ({flag})"


def _refuse_secrets(options: list[str], settings: type[Settings]) -> None:
    for option in options:
        field = option.partition("=")[0].removeprefix("--").replace("-", "_")
        if option.startswith("--") and field in settings.never_flags:
            variable = f"{settings.model_config['env_prefix']}{field}".upper()
            raise SettingsError(
                f"{field}: a process list shows every flag, so this is none; set {variable}, or give --{field}-file"
            )


def _refuse_unknown(given: Any, known: Mapping[str, str], what: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists them"
            raise SettingsError(f"unknown {what}: {key}{hint}")
