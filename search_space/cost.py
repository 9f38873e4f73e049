"""Prices: a layer's and a whole layout's cost in a frame, exact and without building anything."""

from dataclasses import replace

from search_space.frame import Frame, Place, Written
from search_space.layout import Layer, Layout, stack, stretch
from search_space.parallel import build_parallel, parallel_cost
from search_space.spec import Cost, Mixer, total
from search_space.vocabulary import VOCABULARY, branch_frames, channel_of, mixer_of

FILLS = ("stack", "stretch")


def at_depth(pattern: Layout, frame: Frame, fill: str = "stack") -> Layout:
    """The network that a pattern stands for: as it is, or stacked or stretched to the frame's depth.

    Raises:
        ValueError: `fill` is neither "stack" nor "stretch".
    """
    if fill not in FILLS:
        raise ValueError(f"fill {fill!r} is unknown: use one of {', '.join(FILLS)}")
    if frame.depth is None:
        return pattern
    return stack(pattern, frame.depth) if fill == "stack" else stretch(pattern, frame.depth)


def layer_cost(layer: Layer, frame: Frame) -> Cost:
    """A layer with its branches, its channel mixer and its norms."""
    own = zip(layer.branches, branch_frames(layer, frame), strict=True)
    branches = total(mixer_of(branch).cost(inside) for branch, inside in own)
    norms = Cost(params=frame.width * (1 if layer.channel.mixer == "none" else 2))
    return total((branches, channel_of(layer.channel).cost(frame), parallel_cost(layer, frame), norms))


def frames_of(network: Layout, frame: Frame) -> list[Frame]:
    """The frame of each layer: the same sizes, and the layer's own place in the network."""
    earlier: frozenset[str] = frozenset()
    before: tuple[Written, ...] = ()
    frames = []
    for index, layer in enumerate(network.layers):
        place = Place(index=index, depth=len(network), earlier=earlier, before=before)
        frames.append(replace(frame, place=place))
        earlier |= {branch.mixer for branch in layer.branches}
        before += tuple((branch.mixer, branch.settings) for branch in layer.branches if not branch.share)
    return frames


def inner_frame(layer: Layer, frame: Frame) -> Frame:
    """The frame of a layer with one like it before."""
    return frames_of(Layout((layer, layer)), frame)[1]


def layout_cost(network: Layout, frame: Frame) -> Cost:
    """All layers of a network as written, each at its place; embeddings, final norm and head are not among them."""
    price: dict[tuple[Layer, Place | None], Cost] = {}
    costs = []
    for layer, own in zip(network.layers, frames_of(network, frame), strict=True):
        # Only a mixer that asks for something from beyond its layer has a price that depends on its place.
        asks = any({"depth", "stream"} & VOCABULARY[branch.mixer].needs for branch in layer.branches)
        key = (layer, own.place if asks else None)
        if key not in price:
            price[key] = layer_cost(layer, own)
        costs.append(price[key])
    return total(costs)


def cache_bytes(network: Layout, frame: Frame, context: int) -> int:
    """Bytes that the network keeps for the frame's batch at another context."""
    return layout_cost(network, replace(frame, context=context)).stored_bytes


def embedding_params(frame: Frame) -> int:
    """Parameters around the layers: token embedding, final norm and an untied head."""
    return 2 * frame.vocabulary * frame.width + frame.width


def build_mixer(layer: Layer, frame: Frame) -> Mixer:
    """The sequence mixer of a layer, its branches side by side if there are several."""
    if len(layer.branches) == 1:
        return mixer_of(layer.branches[0]).build(frame)
    return build_parallel(layer, frame)


def costs_by_name(layer: Layer, frame: Frame) -> dict[str, float]:
    """A layer's exact costs by the names that objectives and bounds use.

    Where they depend on the place, the higher of those of the first layer of its kind and of the next: never too low.
    """
    first, later = (_by_name(layer_cost(layer, own)) for own in (frame, inner_frame(layer, frame)))
    return {name: max(value, later[name]) for name, value in first.items()}


def _by_name(cost: Cost) -> dict[str, float]:
    return {
        "kv_bytes": cost.stored_bytes,
        "params": cost.params,
        "active_params": cost.active_params,
        "flops_prefill": cost.flops_prefill,
        "flops_decode": cost.flops_decode,
        "serial_steps": cost.serial_steps,
    }
