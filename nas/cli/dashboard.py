"""`nas dashboard`: the studies of a database in a browser, read-only and live, and as metrics for Prometheus."""

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import StorageOption, StudyOption

NAME = "dashboard"


def command(
    storage: StorageOption = None,
    study: StudyOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback unless told otherwise.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(help="Token that readers need; a new one is made if left out.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="File that holds the token, so that no list of processes shows it."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another host name that readers use, such as a proxy's. May be repeated."
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="PATH", help="What a proxy puts before every path, such as /nas.")
    ] = "",
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in this machine's browser.")
    ] = True,
) -> int:
    """Serve the dashboard until Ctrl-C."""
    import logging
    import os
    import secrets
    import signal
    import socket
    import sys
    import webbrowser
    from contextlib import suppress

    import uvicorn

    from dashboards import addresses
    from dashboards.app import create_app
    from nas.cli.output import print_openly, say
    from nas.errors import EXIT_USAGE, Refused
    from nas.logs import RedactedLines
    from nas.open_study import open_study, storage_url
    from nas.redaction import Redactor
    from nas.workshop import OwnProcess
    from storage.store import Store

    if study is not None:
        with open_study(storage, study):
            pass
    else:
        Store.open(storage_url(storage), read_only=True).close()
    if token is not None and token_file is not None:
        raise Refused("--token and --token-file name two tokens: give one of them")
    if token_file is not None:
        token = _read_token(token_file)
    if token is not None and len(token) < 8:
        raise Refused("the token is too short: use at least 8 characters, or leave it out and one is made")
    if token is None and not _is_loopback(host):
        raise Refused(
            f"{host} can be reached from other machines: choose the token yourself, with --token-file (or --token)"
        )
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        raise Refused(f"--root-path {root_path!r} is no path: write it like /nas")
    secret = token or secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on browsers wait rather than being refused: the address is printed before the server runs.
        listener.listen()
    except OSError as error:
        listener.close()
        raise Refused(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or --port 0 for a free one",
            EXIT_USAGE,
        ) from error
    taken = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    hosts = sorted({shown, "127.0.0.1", "localhost", "[::1]", *(allow_host or ())})
    workshop = OwnProcess(storage_url(storage))
    app = create_app(
        storage_url(storage), token=secret, allowed_hosts=hosts, workshop=workshop, root_path=root_path
    )
    base = f"http://{shown}:{taken}{root_path}"
    # Who keeps the token in a file does not want it in a terminal's or a service's log.
    print_openly(f"{base}/" + (f"?token={secret}" if token_file is None else "login"))
    if study is not None:
        say(f"then {base}{addresses.study(study)}")
    say("read-only and live; Ctrl-C stops it")
    lines = logging.StreamHandler()
    lines.setFormatter(RedactedLines(Redactor.of(os.environ, [storage_url(storage), "--token", secret])))
    logging.getLogger("uvicorn").addHandler(lines)
    settings = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=3
    )

    class Server(uvicorn.Server):
        """Tells open streams to end before it waits for them."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.closing.set()
            await super().shutdown(sockets)

    server = Server(settings)
    # Whoever looks at a terminal has a browser near; a service, a pipe or a test has none.
    if browser and token_file is None and sys.stderr.isatty() and _is_loopback(host):
        webbrowser.open(f"{base}/?token={secret}")
    # A service is stopped by SIGTERM: that ends the workshop's process and gives back what it holds, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Once it has stopped cleanly, uvicorn raises the signal that it caught.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        workshop.close()
    return 0


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost may be anybody's."""
    from ipaddress import ip_address

    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_token(path: Path) -> str:
    """The token that a file holds; raises Refused where it holds none, or it is no single line of ASCII."""
    from nas.errors import Refused

    try:
        token = path.expanduser().read_text(encoding="ascii").strip()
    except OSError as error:
        raise Refused(f"the token file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Refused(f"the token file {path} holds no ASCII text: write the token alone into it") from None
    if len(token.split()) > 1:
        raise Refused(f"the token file {path} holds several words: write the token alone into it")
    return token
