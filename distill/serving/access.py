"""Who may ask the server: whoever has its token."""

from __future__ import annotations

import hmac
import ipaddress
import secrets

from distill.errors import UserError

FEWEST = 16  # characters of a token where others can reach the server


def is_local(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def choose_token(given: str | None, host: str) -> tuple[str, bool]:
    """The server's token, and whether it was made now.

    Raises:
        UserError: a token that cannot be sent, or that is too short to be reachable by others.
    """
    if given is None:
        return secrets.token_urlsafe(24), True
    if not given or not (given.isascii() and given.isprintable()) or " " in given:
        raise UserError(
            "--token must be printable ASCII without spaces; leave it out for a new one"
        )
    if len(given) < FEWEST and not is_local(host):
        raise UserError(
            f"--token has {len(given)} characters, and --host {host} is reachable by others; give "
            f"{FEWEST} or more, or leave it out for a new one"
        )
    return given, False


def allows(authorization: str, token: str) -> bool:
    """Whether a request's ``Authorization`` names the token; takes as long for any of a length."""
    kind, _, given = authorization.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(
        given.strip().encode("utf-8", "replace"), token.encode("ascii")
    )
