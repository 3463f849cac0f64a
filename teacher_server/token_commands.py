"""What `teacher-server token` does. Raises OSError and ValueError."""

import sys
from typing import TextIO

from teacher_server.token_settings import ListTokensSettings, NewTokenSettings, RevokeTokenSettings
from teacher_server.tokens import add_token, new_token, read_tokens, remove_token


def new(settings: NewTokenSettings, out: TextIO) -> None:
    secret, token = new_token(settings.tenant, settings.role, settings.token_name)
    add_token(settings.tokens_file, token)
    print(secret, file=out)  # alone, so that it can be piped into a file or a secret store
    print(
        f"token {token.id} of tenant {token.tenant}, role {token.role}. It is shown this once: keep it where only its\n"
        "owner reads it (a file for --token-file, or STUDENT_TOKEN)",
        file=sys.stderr,
    )


def revoke(settings: RevokeTokenSettings, out: TextIO) -> None:
    token = remove_token(settings.tokens_file, settings.which)
    print(f"revoked {token.id} of tenant {token.tenant}, role {token.role}", file=out)


def show(settings: ListTokensSettings, out: TextIO) -> None:
    tokens = read_tokens(settings.tokens_file).values()
    rows = [("id", "tenant", "role", "name"), *((t.id, t.tenant, t.role, t.name) for t in tokens)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip(), file=out)
