"""What a published model is to us: its network at its own frame, and the repeating idea of it for any other."""

from dataclasses import dataclass

from search_space.cost import embedding_params, layout_cost
from search_space.frame import Frame
from search_space.layout import Layout
from search_space.vocabulary import read


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: its network at its own frame, and the repeating idea of it in the frame's own sizes."""

    name: str
    title: str
    network: str
    frame: Frame
    pattern: str
    source: str
    tied: bool = False
    """Whether the head is the embedding once more."""
    note: str = ""

    @property
    def layout(self) -> Layout:
        """The published network, layer by layer."""
        return read(self.network)

    @property
    def params(self) -> int:
        """Parameters of the whole model, embedding and head included."""
        around = embedding_params(self.frame) - (self.frame.vocabulary * self.frame.width if self.tied else 0)
        return layout_cost(self.layout, self.frame).params + around


def published_frame(
    width: int,
    vocabulary: int,
    *,
    train_length: int = 4096,
    context: int = 131072,
    rotary_base: float = 1e4,
    yarn: tuple[float, int] | None = None,
) -> Frame:
    """The frame of a published model, at 131,072 tokens unless it has a limit; `yarn`: its stretch, and from what length."""
    factor, length = yarn or (1.0, None)
    return Frame(
        width=width,
        train_length=train_length,
        context=context,
        vocabulary=vocabulary,
        rotary_base=rotary_base,
        rotary_scaling="yarn" if yarn else "none",
        rotary_factor=factor,
        rotary_length=length,
    )
