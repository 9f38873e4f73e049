"""What a call may ask for beyond plain causal or windowed attention.

Letters: B batch, H heads.
"""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options:
    """Terms of the scores and of the denominator, in the order in which they come: scale, cap, slopes, sinks."""

    soft_cap: float | None = None
    """The scaled scores become soft_cap · tanh(score / soft_cap) (Gemma 2, arXiv:2408.00118)."""
    slopes: Tensor | None = None
    """[H]: each score loses slope · distance in tokens (ALiBi, arXiv:2108.12409)."""
    sinks: int = 0
    """The first keys, which stay visible besides the window (StreamingLLM, arXiv:2309.17453)."""
    skipped: int = 0
    """Tokens between the sinks and the other keys whose keys were not handed over."""
    sink_logits: Tensor | None = None
    """[H], or [B, H]: a logit that joins the denominator and carries no value (gpt-oss, arXiv:2508.10925)."""

    @property
    def plain(self) -> bool:
        """Whether it asks for nothing. Tokens left out matter only to slopes, and beside sinks."""
        return self.soft_cap is None and self.slopes is None and self.sink_logits is None and not self.sinks

    def of(self, heads: slice | list[int]) -> "Options":
        """The same for some of the heads."""
        return replace(
            self,
            slopes=None if self.slopes is None else self.slopes[heads],
            sink_logits=None if self.sink_logits is None else self.sink_logits[..., heads],
        )
