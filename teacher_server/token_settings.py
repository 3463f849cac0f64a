"""What `teacher-server token` understands."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from protos.settings import Settings
from teacher_server.config import ServeSettings
from teacher_server.tokens import Role


class _TokenSettings(Settings, env_prefix="TEACHER_"):
    keys_of_others = ServeSettings.model_fields
    tokens_file: Path
    """The file that `teacher-server serve` reads; a running server notices every change."""


class NewTokenSettings(_TokenSettings):
    """Make a token, print it once, and write its hash into the tokens file."""

    tenant: CliPositionalArg[str]
    """Whose it is."""
    role: Role = "student"
    """student: asks. viewer: sees what everybody spends, asks nothing. admin: sets budgets, sees and asks."""
    token_name: str = Field(default="", max_length=64)
    """What to call it by, such as who has it; it is not secret. (Plain --name is the teacher's.)"""


class RevokeTokenSettings(_TokenSettings):
    """Take a token out of the tokens file: its next call is refused."""

    which: CliPositionalArg[str]
    """Its id, as `token list` shows it, or its name."""


class ListTokensSettings(_TokenSettings):
    """Show id, tenant, role and name of every token."""
