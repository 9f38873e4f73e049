"""Secrets never come through: in addresses, beside telling names, in the environment, in nested values."""

import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.cli import session
from nas.config import Config
from nas.redaction import MASK, Redactor

CANARY = "canary7f3e"
PLAIN = Redactor()


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach postgresql://nas:{}@db:5432/nas now",
        "two: a://u:{}@h/x and b://u:{}@h/y",
        "postgresql://nas:p@{}/q@db/nas",
        "postgresql://db/nas?sslmode=off&password={}&application_name=nas",
        "see https://x/?access_token={};b=c",
        "connection to host=db password={} user=nas failed",
        "connection to host=db password='{} with blanks' user=nas failed",
        "PGPASSWORD={} nas search",
        "--token={}",
        "{{'password': '{}'}}",
        '{{"api_key": "{}"}}',
        "Authorization: Bearer {}",
        "redis://:{}@cache/0",
    ],
)
def test_what_stands_where_secrets_stand_is_masked(text: str) -> None:
    cleaned = PLAIN.text(text.format(CANARY, CANARY))
    assert CANARY not in cleaned and MASK in cleaned
    assert PLAIN.text(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "trial 3 2*kda mla: quality 0.512 at 4096 tokens; tokens=12800, tokens_per_s=512",
        "nas search --storage postgresql://user@host/name",
        "http://127.0.0.1:8765/studies/quick?page=2&x=kv_bytes",
        "window[size=512]|mamba2 full/moe[experts=16,top_k=2]",
        "the token is too short: use at least 8 characters",
        "/tmp/a:b@c",
    ],
)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert PLAIN.text(text) == text


def test_the_environment_and_the_command_line_are_known_by_value() -> None:
    environment = {
        "PGPASSWORD": "from-environment",
        "RAY_AUTH_TOKEN": "ray-token-0815",
        "WANDB_API_KEY": "wandb-4711",
        "DATABASE_URL": f"postgresql://nas:{CANARY}@db/nas",
        "TOKENIZERS_PARALLELISM": "disabled",
        "SOME_KEY": "1",
    }
    known = Redactor.of(
        environment, ["postgresql://u:b%40d word'@h/d", "--token", "dashboard-1", "--seed", "7"]
    )
    said = "from-environment ray-token-0815 wandb-4711 canary7f3e b@d word' b%40d word' dashboard-1"
    assert set(known.text(said).split()) == {MASK}
    assert known.text("disabled 1 7") == "disabled 1 7"
    assert "canary" not in repr(known)


def test_a_password_that_is_an_everyday_word_spares_the_longer_ones() -> None:
    known = Redactor.of({}, ["postgresql://me:postgres@db/nas"])
    assert known.text("postgresql://me@db: user postgres") == f"postgresql://me@db: user {MASK}"


def test_nested_values_are_cleaned_and_numbers_stay() -> None:
    value = {
        "storage": f"a://b:{CANARY}@c",
        "password": CANARY,
        "tokens": 12,
        "list": [f"?token={CANARY}", 1.5],
    }
    cleaned = PLAIN.value(value)
    assert cleaned == {"storage": "a://b:***@c", "password": MASK, "tokens": 12, "list": ["?token=***", 1.5]}


@given(st.text("abcXYZ019-_.%!$/@?#&:=+ '", max_size=12), st.sampled_from(["{}", "said {} again", "({})"]))
def test_a_given_address_is_masked_however_odd_its_password(middle: str, frame: str) -> None:
    secret = f"{CANARY}{middle}{CANARY}"
    address = f"postgresql://user:{secret}@host/nas"
    known = Redactor.of({}, ["--storage", address])
    assert CANARY not in known.text(frame.format(address))
    assert CANARY not in known.text(frame.format(secret))


@pytest.mark.parametrize(
    "piece", ["a", "a.", "a_", "//", "x:", "&", "password", "a://", "?a=", "'", "-token="]
)
def test_a_long_text_is_no_burden(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    assert len(PLAIN.text(f"{text} at a@b")) > 0


@given(st.text(max_size=80))
def test_any_text_is_cleaned_once_and_for_all(text: str) -> None:
    cleaned = PLAIN.text(text)
    assert PLAIN.text(cleaned) == cleaned
    assert re.sub(r"\W", "", MASK) == ""


@pytest.mark.parametrize(
    ("address", "argument", "warned"),
    [
        ("10.0.0.5:6379", f"postgresql://me:{CANARY}@db/nas", True),
        ("10.0.0.5:6379", f"--storage=postgresql://db/nas?password={CANARY}", True),
        ("10.0.0.5:6379", "postgresql://me@db/nas", False),
        (None, f"postgresql://me:{CANARY}@db/nas", False),
    ],
)
def test_a_cluster_that_would_show_the_command_line_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str | None,
    argument: str,
    warned: bool,
) -> None:
    """Ray keeps the command line of whoever joins a cluster, for all who list its jobs."""
    pools = SimpleNamespace(RayPool=lambda *_, **_more: None)
    monkeypatch.setitem(sys.modules, "nas.workers.ray_pool", pools)
    monkeypatch.setattr(sys, "argv", ["nas", "search", argument])
    session._make_pool(Config(pool="ray", ray_address=address))
    said = capsys.readouterr().err
    assert ("PGPASSWORD" in said) == warned and CANARY not in said
