"""What a run's settings become when the run is another machine's: paths that hold there, and no secret among them."""

import json
from collections.abc import Collection
from pathlib import Path

from student_worker.config import TeacherConfig, TrainSettings


def variables(settings: TrainSettings, leave_out: Collection[str] = ("config",)) -> dict[str, str]:
    """STUDENT_... of all that was set for `train`, by whatever way; what was not is left to the other machine.

    The TOML file stays here, its values go along. Fields that hold a secret never do (`never_flags`).
    """
    ours = TrainSettings.model_fields.keys() & settings.model_fields_set - settings.never_flags - set(leave_out)
    values = settings.model_dump(mode="json", include=ours)
    prefix = settings.model_config["env_prefix"]
    return {
        f"{prefix}{name}".upper(): value if isinstance(value, str) else json.dumps(value)
        for name, value in sorted(values.items())
        if value is not None
    }


def absolute_paths(settings: TeacherConfig) -> dict[str, Path]:
    """Those that were given, by their fields: a worker has a working directory of its own."""
    return {name: value.absolute() for name, value in settings if isinstance(value, Path)}


def refuse_token(settings: TeacherConfig) -> None:
    """Raises ValueError for a token that would have to be sent along, where a cluster's pages would show it."""
    if settings.token and not settings.token_file:
        raise ValueError(
            "token: STUDENT_TOKEN is not handed on to workers, where a cluster's pages would show it; put it in a file "
            "that all nodes can read, and give that as --token-file"
        )
