"""A trace, and tokens, as the tests of logs and spans use them."""

import hashlib

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def tokens(folder, **tenants):
    """A tokens file; `tenants`: for each the token of its admin."""
    file = folder / "tokens"
    lines = [f"{hashlib.sha256(token.encode()).hexdigest()} {tenant} admin\n" for tenant, token in tenants.items()]
    file.write_text("".join(lines))
    file.chmod(0o600)
    return file
