"""Who comes in: a known host, a same-origin sender, and the token, or nobody. Everything is denied by default."""

import hashlib
import hmac
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from markupsafe import Markup
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashboards import addresses, assets
from dashboards.pages import LoginPage, render

OPEN = {"/health": ("GET", "HEAD"), "/login": ("GET", "HEAD", "POST")}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Keeper:
    """Knows the token, and the cookie that stands for it in a browser."""

    def __init__(self, token: str) -> None:
        if not token:
            raise ValueError("the dashboard's token is empty: anybody could come in")
        self._token = token.encode()
        # The cookie is derived, so that the token itself is not stored by browsers; and browsers share cookies
        # between ports, so that two dashboards on one machine need two names.
        self.cookie_value = hmac.new(self._token, b"dashboard session", hashlib.sha256).hexdigest()
        self.cookie_name = f"nas_{hashlib.sha256(self.cookie_value.encode()).hexdigest()[:8]}"

    def knows_token(self, offered: str) -> bool:
        """True for the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(offered.encode(errors="replace"), self._token)

    def admits(self, headers: Headers) -> bool:
        """True where a request carries the token or the cookie."""
        scheme, _, offered = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows_token(offered.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie_name)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(
            cookie.value.encode(errors="replace"), self.cookie_value.encode()
        )


class Door:
    """ASGI middleware before every route."""

    def __init__(self, app: ASGIApp, keeper: Keeper, allowed_hosts: Sequence[str], root: str = "") -> None:
        self.app = app
        self.root = root
        self.keeper = keeper
        self.allowed_hosts = frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            if self.root:
                # A proxy may have taken the root away, or left it there.
                path = str(scope["path"])
                bare = path.removeprefix(self.root) if path.startswith(f"{self.root}/") else path
                scope = {**scope, "root_path": self.root, "path": self.root + bare}
            root = addresses.ROOT.set(self.root)
            try:
                refusal = self._refusal(Request(scope))
                await (refusal or self.app)(scope, receive, _with_headers(send))
            finally:
                addresses.ROOT.reset(root)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self.allowed_hosts:
            return refuse(request, 421, "This dashboard does not answer to that host name.")
        origin = request.headers.get("origin")
        if request.method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != hosts[0]:
            return refuse(request, 403, "The request came from another site.")
        path = request.scope["path"].removeprefix(addresses.root())
        offered = request.query_params.get("token")
        if path == "/" and request.method == "GET" and offered is not None:
            return let_in(request, self.keeper, offered)
        if request.method in OPEN.get(path, ()) or self.keeper.admits(request.headers):
            return None
        wrong = "authorization" in request.headers
        return refuse(request, 401, "That token is not the right one." if wrong else MISSING_TOKEN)


MISSING_TOKEN = (
    "`nas dashboard` printed an address with the token in it: open that one, or paste the token here."
)


WRONG_TOKEN = "That token is not the right one. `nas dashboard` printed the right one when it started."


def let_in(request: Request, keeper: Keeper, offered: str) -> Response:
    """The token becomes a cookie, and the address loses it; or a refusal."""
    if not keeper.knows_token(offered):
        return refuse(request, 401, WRONG_TOKEN)
    answer = RedirectResponse(addresses.root() + "/", 303)
    answer.set_cookie(
        keeper.cookie_name,
        keeper.cookie_value,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path=addresses.root() or "/",
    )
    return answer


def refuse(request: Request, status: int, line: str) -> Response:
    """One clear line, as a page or as JSON, whichever was asked for."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    if status == 401 and "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(login_form(line), status, headers)
    return JSONResponse({"detail": line}, status, headers)


def login_form(line: str) -> str:
    """The page that asks for the token."""
    return render(LoginPage(line=line, style=Markup(assets.stylesheet())))


def host_name(host: str) -> str:
    """A Host header without its port; brackets stay around an IPv6 address."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _with_headers(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sender
