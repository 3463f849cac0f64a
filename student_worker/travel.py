"""What a run's settings become when the run is another machine's: environment variables, and no secret among them."""

import json
from collections.abc import Collection

from student_worker.config import TrainSettings


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
