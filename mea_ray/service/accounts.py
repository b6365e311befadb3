"""Access control of a service: its owner has a secret, and each client a token derived from it.

Nothing is stored: a restarted ledger or replica that knows the secret can check every token. A new start of a service
has another secret, which invalidates old tokens.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any, NamedTuple

from mea_ray.core.errors import WrongToken


class Account(NamedTuple):
    """A client's name and its token: 64 hexadecimal digits, which only the service's owner can compute."""

    client: str
    token: str


def new_secret() -> str:
    """Draw a service's secret from the system's randomness: 64 hexadecimal digits."""
    return secrets.token_hex(32)


def account(secret: str, client: str) -> Account:
    """Return the account of a client: its token is HMAC-SHA256 of its name under the service's secret."""
    return Account(client, hmac.new(secret.encode(), client.encode(), "sha256").hexdigest())


def check_account(secret: str, given: Any) -> str:
    """Return the name of a client with a valid token.

    Raises:
        WrongToken: The token is invalid for this name. The message does not reveal whether the client exists.
    """
    client, token = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if isinstance(client, str) and isinstance(token, str):
        expected = account(secret, client.encode(errors="replace").decode()).token
        if hmac.compare_digest(token.encode(errors="replace"), expected.encode()):
            return client
    raise WrongToken(
        f"client {str(client)[:200]!r} has no valid token of this service; use the account that its owner opened"
    )


def check_owner(secret: str, given: Any) -> None:
    """Reject a caller without the service's secret.

    Raises:
        WrongToken: The secret is wrong.
    """
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(errors="replace"), secret.encode()):
        raise WrongToken("only the service's owner can open accounts, charge them and read their queries")
