"""Where a cluster's head answers, whether it asks for a token, and whether one may trust it without."""

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from nas.errors import Refused
from storage.errors import redacted

HERE = "http://127.0.0.1:8265"
"""A head on this machine, or the near end of a tunnel to one."""
ANSWER_S = 10.0
"""How long a head may take to say whether it asks for a token; the SDK itself would wait for minutes."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head that answered."""

    address: str
    guarded: bool
    """It asks for a token."""
    loopback: bool


def read_address(given: str | None) -> str:
    """The address of the head's job server: what was given, what Ray's own variables say, or this machine's.

    Raises:
        Refused: it is no address of a job server.
    """
    address = given or next(
        (
            value
            for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
            if (value := os.environ.get(name, "")).startswith(("http://", "https://"))
        ),
        HERE,
    )
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise Refused(
            f"--address {redacted(address)!r} is no job server: write it like http://head:8265 (the dashboard's port, "
            "not that of ray start --port)"
        )
    if "@" in parts.netloc:
        raise Refused(
            f"--address {redacted(address)!r} holds a user: leave it out, and set RAY_AUTH_TOKEN to the token"
        )
    return address.rstrip("/")


def find_head(given: str | None) -> Head:
    """Ask a head whether it wants a token.

    Raises:
        Refused: nothing answers there, or something else than a head of Ray.
    """
    address = read_address(given)
    host = str(urlsplit(address).hostname)
    return Head(address=address, guarded=_mode_of(address) != "disabled", loopback=_is_loopback(host))


def refuse_open(head: Head, *, insecure: bool) -> None:
    """Raise Refused for a head that anybody who reaches it may command, unless the person says that this is meant."""
    if head.guarded or head.loopback or insecure:
        return
    raise Refused(
        f"{head.address} takes jobs from everybody: start its Ray with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN,\n"
        "or say --insecure if nobody else can reach it"
    )


def _mode_of(address: str) -> Literal["disabled"] | str:
    request = urllib.request.Request(f"{address}/api/authentication_mode")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            said = json.loads(answer.read(4096))
            return str(said["authentication_mode"])
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            # Before Ray 2.52 there were no tokens, and no such question.
            return "disabled"
        if error.code in (401, 403):
            return "token"
        raise Refused(f"{address} answers with {error.code}: is it the head of a Ray cluster?") from None
    except (OSError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        words = str(getattr(why, "strerror", None) or why or type(why).__name__)
        raise Refused(
            f"no head of Ray answers at {address}: {words}\n"
            "name the dashboard's address with --address, such as http://head:8265; "
            "on Kubernetes first kubectl port-forward service/…-head-svc 8265"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise Refused(
            f"{address} answers, but not as a head of Ray: name its dashboard, such as http://head:8265"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
