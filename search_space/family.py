"""Families of mixers: one colour and one mark each, the same in the terminal, the report and the pages."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family is told apart: by colour, and by a mark for grey prints and colour-blind eyes."""

    name: str
    title: str
    colour: str
    mark: str
    """One character, full block for the densest reading of the past, light for the thinnest."""


FAMILIES = {
    family.name: family
    for family in (
        Family(name="attention", title="full attention", colour="#c94254", mark="█"),
        Family(name="latent", title="latent attention", colour="#8f5fbf", mark="▓"),
        Family(name="sparse", title="sparse attention", colour="#e39d3b", mark="▚"),
        Family(name="linear_attention", title="linear attention", colour="#3a9d8f", mark="░"),
        Family(name="state_space", title="state-space model", colour="#2b76b4", mark="▒"),
        Family(name="delta", title="delta rule", colour="#3d4fa8", mark="▞"),
        Family(name="recurrent", title="gated recurrence", colour="#7a8b2f", mark="▄"),
        Family(name="memory", title="segment memory", colour="#ad5f1a", mark="▙"),
        Family(name="convolution", title="convolution", colour="#a3708f", mark="▖"),
    )
}
UNKNOWN_FAMILY = Family(name="unknown", title="unknown", colour="#888888", mark="?")
