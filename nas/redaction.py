"""Secrets taken out of any text before others can read it: in addresses, beside telling names, or known by value."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

MASK = "***"
LEAST_LENGTH = 4
"""A shorter secret is masked where its place tells it, and not wherever its letters stand."""
LEAST_LENGTH_OF_ENVIRONMENT = 6
"""What stands in the environment under a telling name is often no secret if it is short: true, none, 4096."""
ANYWHERE_LENGTH = 12
"""A secret of this length is masked within longer words too; "postgres" as a password leaves postgresql:// alone."""

_TELLING = r"(?:pass(?:word|wd|phrase)?|pwd|secret|token|credentials?|api[-_]?key|access[-_]?key)"
_NAME = re.compile(_TELLING, re.IGNORECASE)
_VARIABLE = re.compile(r"(?:PASS(?:WORD|WD|PHRASE)?|TOKEN|SECRET|KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
_KEY_OF_VALUE = re.compile(rf"(?:^|[_-]|pg){_TELLING}$", re.IGNORECASE)

# What they look for is bounded, so that no text, however long, is searched again from each of its letters.
# Up to the last "@" of the word: a password that was not escaped may hold one too.
_ADDRESS = re.compile(r"""((?:[A-Za-z][A-Za-z0-9+.-]{0,30}:/{1,2}|//)[^\s:/?#@"'<>]*):([^\s"'<>]{0,1024})@""")
_QUERY_ITEM = re.compile(r"""([?&;])([^\s=&;?"'<>]+)=([^\s&;"'<>]*)""")
_ASSIGNMENT = re.compile(
    rf"""(?<![A-Za-z0-9])([A-Za-z0-9_.-]{{0,40}}{_TELLING})(["']?\s*=\s*)("[^"\n]*"|'[^'\n]*'|[^\s&;,"'<>)\]}}]+)""",
    re.IGNORECASE,
)
_QUOTED_KEY = re.compile(
    rf"""(["'][A-Za-z0-9_.-]{{0,40}}{_TELLING}["']\s*:\s*)("[^"\n]*"|'[^'\n]*')""", re.IGNORECASE
)
_HEADER = re.compile(r"""(\bauthorization["']?:\W{0,4}(?:bearer|basic)\s+)[^\s"',]+""", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Redactor:
    """Masks secrets: those whose place in a text tells them, and those that it knows by their value."""

    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str], texts: Iterable[str] = ()) -> "Redactor":
        """Knows the passwords of the addresses in the texts and in the environment, and its variables with telling names.

        Of texts that are a command line also what follows an option with a telling name, such as --token.
        """
        known: set[str] = set()
        texts = tuple(texts)
        for option, value in pairwise(texts):
            if option.startswith("--") and _NAME.search(option) and len(value) >= LEAST_LENGTH:
                known.add(value)
        for name, value in environment.items():
            if _VARIABLE.search(name) and len(value) >= LEAST_LENGTH_OF_ENVIRONMENT:
                known.add(value)
        for text in (*texts, *environment.values()):
            known.update(secret for secret in secrets_in(text) if len(secret) >= LEAST_LENGTH)
        return cls(secrets=tuple(sorted(known - {MASK}, key=lambda secret: (-len(secret), secret))))

    def text(self, text: str) -> str:
        """The text with every secret masked, and rather too much of it than too little."""
        for secret in self.secrets:
            text = _pattern(secret).sub(MASK, text) if secret in text else text
        if "=" in text:
            text = _QUERY_ITEM.sub(_masked_item, text)
            text = _ASSIGNMENT.sub(rf"\1\2{MASK}", text)
        if "@" in text:
            text = _ADDRESS.sub(rf"\1:{MASK}@", text)
        if ":" in text:
            text = _QUOTED_KEY.sub(rf'\1"{MASK}"', text)
            text = _HEADER.sub(rf"\1{MASK}", text)
        return text

    def value(self, value: Any) -> Any:
        """Nested mappings and lists with every text cleaned, and what stands under a telling key masked whole."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): MASK
                if isinstance(item, str) and _KEY_OF_VALUE.search(str(key))
                else self.value(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value


def secrets_in(text: str) -> set[str]:
    """The secrets of the addresses in a text, as they are written there and as they are meant."""
    found = {item.group(3) for item in _QUERY_ITEM.finditer(text) if _NAME.search(unquote(item.group(2)))}
    found |= {address.group(2) for address in _ADDRESS.finditer(text)}
    # A text that is one address as a whole may hold blanks and quotes in its password.
    scheme, _, rest = text.partition("://")
    user, colon, after = rest.partition(":")
    if scheme.isidentifier() and colon and "@" in after and "/" not in user:
        found.add(after.rpartition("@")[0])
    return {form for secret in found if secret for form in (secret, unquote(secret))}


def _pattern(secret: str) -> re.Pattern[str]:
    whole = re.escape(secret)
    return re.compile(whole if len(secret) >= ANYWHERE_LENGTH else rf"(?<![A-Za-z0-9]){whole}(?![A-Za-z0-9])")


def _masked_item(item: re.Match[str]) -> str:
    mark, key, value = item.groups()
    return f"{mark}{key}={MASK if value and _NAME.search(unquote(key)) else value}"
