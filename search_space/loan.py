"""Keys and values that one layer keeps and later ones read, by way of the pass's stream.

Letters: B batch, S keys, G key heads, K key width, V value width.
"""

from dataclasses import dataclass

from torch import Tensor

from search_space.spec import Stream


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a layer keeps that reads another's cache: how many tokens were seen."""

    length: int


@dataclass(frozen=True, kw_only=True)
class Loan:
    """Where in the stream a mixer of some settings leaves its cache; a later one takes its place."""

    mixer: str
    key: str

    def _name(self, part: str) -> str:
        return f"{self.mixer}{self.key}.{part}"

    def lend(self, stream: Stream, keys: Tensor, values: Tensor) -> Stream:
        """The stream with the keys [B, S, G, K] and values [B, S, G, V] in it."""
        return stream.with_value(self._name("keys"), keys).with_value(self._name("values"), values)

    def borrow(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The keys and values that were left last.

        Raises:
            ValueError: no layer before has left any.
        """
        if self._name("keys") not in stream.values:
            raise ValueError(
                f"{self.mixer}: the stream holds no keys of an earlier layer; run it within its network, or build it for a "
                "place with no such layer before"
            )
        return stream.values[self._name("keys")], stream.values[self._name("values")]
