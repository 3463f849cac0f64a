"""How many at once, in all and from one address: so that one peer cannot have all that there is."""

import ipaddress
from collections import Counter


class Places:
    """`take` before, and `leave` after. For the event loop's thread."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._taken: Counter[str] = Counter()
        self._all = 0

    def take(self, address: str) -> str:
        """Takes one for that address; or says what there is none of: "full", or "address" for the one's own share."""
        peer = _peer(address)
        if self._all >= self._most:
            return "full"
        if self._taken[peer] >= self._most_of_one:
            return "address"
        self._taken[peer] += 1
        self._all += 1
        return ""

    def leave(self, address: str) -> None:
        peer = _peer(address)
        self._all -= 1
        self._taken[peer] -= 1
        if not self._taken[peer]:
            del self._taken[peer]


def _peer(address: str) -> str:
    """Of IPv6 its first half: whoever has one such address has all of them."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address
