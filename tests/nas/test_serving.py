"""`nas dashboard` as a process: loopback, a token, one line with the address, and a clean end on Ctrl-C."""

import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DASHBOARD = "import sys; from nas.cli.main import main; sys.exit(main(sys.argv[1:]))"
TOKEN = "correct-horse-battery"


@pytest.fixture
def served(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
) -> tuple[subprocess.Popen[str], str]:
    """A running dashboard and its address."""
    run("search", "--config", config_file(), "--storage", url, "--trials", 2)
    process = start("-c", DASHBOARD, "dashboard", "--storage", url, "--port", "0", "--token", TOKEN)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"(http://127\.0\.0\.1:\d+)/\?token={TOKEN}\n", line)
    assert found, line
    assert process.stderr is not None
    process.stderr.readline()
    return process, found.group(1)


def answer(address: str, token: str | None = None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_dashboard_asks_for_its_token_and_stops_on_ctrl_c(
    served: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = served
    assert answer(f"{address}/health") == (200, '{"status":"ok"}')
    assert answer(f"{address}/")[0] == 401
    assert answer(f"{address}/", "another-token-altogether")[0] == 401
    status, page = answer(f"{address}/", TOKEN)
    assert status == 200 and "tiny" in page
    assert answer(f"{address}/studies/tiny", TOKEN)[0] == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err and TOKEN not in err


def test_a_dashboard_of_one_study_begins_there(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    process = start("-c", DASHBOARD, "dashboard", "--storage", url, "--study", "tiny", "--port", "0")
    assert process.stdout is not None and process.stderr is not None
    first, second = process.stdout.readline(), process.stderr.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}\n", first), first
    assert re.fullmatch(r"then http://127\.0\.0\.1:\d+/studies/tiny\n", second), second
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_service_that_is_stopped_leaves_nothing_behind(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served
    # A price starts the process that works prices out.
    status, told = answer(f"{address}/api/v1/studies/tiny/trials/0/price", TOKEN)
    assert status == 200 and json.loads(told)["stored_bytes"] > 0
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_prometheus_scrapes_with_a_token_from_a_file(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 2)
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    process = start("-c", DASHBOARD, "dashboard", "--storage", url, "--port", "0", "--token-file", str(path))
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/login\n", line)
    assert found, line
    assert answer(f"{found.group(1)}/metrics")[0] == 401
    status, text = answer(f"{found.group(1)}/metrics", TOKEN)
    assert status == 200 and 'nas_trials{state="done",study="tiny"} 2.0\n' in text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and TOKEN not in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"", "the token is too short"),
        (b"short", "the token is too short"),
        (b"two words and more", "holds several words"),
        ("größer-als-acht".encode(), "holds no ASCII text"),
    ],
)
def test_a_token_file_without_a_token_is_refused(
    refused: Callable[..., str],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
    content: bytes | None,
    said: str,
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    assert said in refused("dashboard", "--storage", url, "--token-file", path)
    assert "give one of them" in refused(
        "dashboard", "--storage", url, "--token-file", path, "--token", TOKEN
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_address_than_loopback_needs_a_token_of_ones_own(
    refused: Callable[..., str], run: Callable[..., Any], config_file: Callable[..., str], url: str, host: str
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    assert "choose the token yourself" in refused("dashboard", "--storage", url, "--host", host)


def test_behind_a_proxy_every_address_has_the_root(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    refused: Callable[..., str],
    config_file: Callable[..., str],
    url: str,
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    assert "write it like /nas" in refused("dashboard", "--storage", url, "--root-path", "nas/")
    arguments = ("--root-path", "/nas", "--allow-host", "proxy.example", "--no-browser", "--token", TOKEN)
    process = start("-c", DASHBOARD, "dashboard", "--storage", url, "--port", "0", *arguments)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"(http://127\.0\.0\.1:\d+)/nas/\?token={TOKEN}\n", line)
    assert found, line
    for path in ("", "/nas"):
        # A proxy may take the root away before it passes a request on, or leave it.
        status, page = answer(f"{found.group(1)}{path}/", TOKEN)
        assert status == 200 and 'href="/nas/studies/tiny"' in page and 'href="/studies' not in page
        assert answer(f"{found.group(1)}{path}/studies/tiny")[0] == 401
        assert answer(f"{found.group(1)}{path}/health")[0] == 200
    process.send_signal(signal.SIGTERM)
    process.wait(60)


BROKEN = """
from dashboards import routes
def studies_page(desk):
    raise RuntimeError("postgresql://me:canary-7f3e@db/nas and canary-of-the-environment")
routes.studies_page = studies_page
"""


def test_fault_42_secret_in_a_servers_traceback(
    start: Callable[..., subprocess.Popen[str]],
    run: Callable[..., Any],
    config_file: Callable[..., str],
    url: str,
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    arguments = ("dashboard", "--storage", url, "--port", "0", "--token", TOKEN)
    process = start("-c", BROKEN + DASHBOARD, *arguments, PGPASSWORD="canary-of-the-environment")
    assert process.stdout is not None
    address = process.stdout.readline().partition("/?token")[0]
    status, page = answer(f"{address}/", TOKEN)
    assert status == 500 and "canary" not in page
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "RuntimeError: postgresql://me:***@db/nas and ***" in err and "Traceback" in err
    assert "canary-7f3e@" not in err and TOKEN not in err
