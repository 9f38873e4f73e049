"""Models of one layout as one: their weights, gradients and AdamW's moments side by side in one memory each.

Every operation serves all members at once, the optimiser's and the clipping's too: the weights of a member are a row,
so that a step is ten operations for the whole stack instead of some hundreds. The members' own models and optimisers
see the same memory, so that a checkpoint or another stack takes them up wherever this one leaves them.

Letters: M members, P numbers of a member, B batch, T time, N asked positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from trainers.loop import loss_at
from trainers.model import ProxyModel

APART = 64
"""Every tensor begins at a multiple of so many numbers, as one of its own would: kernels are compiled for such addresses."""


class _Loss(nn.Module):
    """The model and its loss as one module, since vmap wants one function of parameters and inputs."""

    def __init__(self, model: ProxyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        return loss_at(self.model, tokens, places, wanted)


class Stack:
    """The members' parameters and buffers on a leading axis; each model's own become views of it.

    Raises:
        ValueError: the parameters are not of one number format.
    """

    def __init__(self, models: Sequence[ProxyModel]) -> None:
        self.models = list(models)
        self.loss = _Loss(self.models[0])
        holders = [_Loss(model) for model in models]
        self.names = _names(self.loss)
        self.own = _columns([dict(holder.named_parameters()) for holder in holders])
        formats = {parameter.dtype for column in self.own.values() for parameter in column}
        if len(formats) != 1:
            named = ", ".join(sorted(str(one).removeprefix("torch.") for one in formats))
            raise ValueError(f"parameters in {named} cannot be stacked: they must be of one number format")
        self.weights = lay_out([[column[m] for column in self.own.values()] for m in range(len(models))])
        self.gradients = torch.zeros_like(self.weights)
        self.parameters: dict[str, Tensor] = {}
        places = _places([column[0] for column in self.own.values()])
        for (name, column), place in zip(self.own.items(), places, strict=True):
            self.parameters[name] = _part(self.weights, place, column[0]).detach().requires_grad_()
            gradients = _part(self.gradients, place, column[0])
            for member, parameter in enumerate(column):
                parameter.data, parameter.grad = self.parameters[name].data[member], gradients[member]
        columns = _columns([dict(holder.named_buffers()) for holder in holders])
        self.buffers = {name: _share(tensors) for name, tensors in columns.items()}

    def losses(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        """One loss for each member [M]: of tokens [B, T], places and wanted [N] that all share, or of [M, …] each."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *batch: Tensor) -> Tensor:
            own = {**parameters, **buffers}
            named = {name: own[first] for name, first in self.names.items()}
            # What is tied is known by all of its names, which would be looked for at every step.
            loss: Tensor = functional_call(self.loss, named, batch, tie_weights=False)
            return loss

        own = 0 if tokens.dim() == 3 else None
        each = vmap(one, in_dims=(0, 0, own, own, own))
        losses: Tensor = each(self.parameters, self.buffers, tokens, places, wanted)
        return losses

    def backward(self, losses: Tensor) -> None:
        """Hand every member its gradients: those of the sum of all losses, since none depends on another member."""
        columns = list(self.parameters.values())
        found = torch.autograd.grad(losses.sum(), columns, allow_unused=True)
        parts = []
        for weight, gradient in zip(columns, found, strict=True):
            parts.append((torch.zeros_like(weight) if gradient is None else gradient).flatten(1))
            if weight[0].numel() % APART:
                parts.append(self.weights.new_zeros(len(weight), -weight[0].numel() % APART))
        torch.cat(parts, dim=1, out=self.gradients)

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Shorten every member's gradient to at most this norm; the norms before [M]."""
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        # As torch.nn.utils.clip_grad_norm_ does for one model.
        self.gradients.mul_((most / (norms + 1e-6)).clamp(max=1.0)[:, None])
        return norms


@dataclass(frozen=True, kw_only=True)
class StackedAdamW:
    """The members' AdamW optimisers as one, each member at its own rate: torch's step, decoupled decay first.

    The rates that `set_learning_rate` writes into the members' optimisers, and their states, are views of what is here.
    """

    stack: Stack
    steps: Tensor
    """Of every parameter, of which AdamW keeps it [M, parameters]; all of a row are alike."""
    moments: Tensor
    """First moments [M, P]."""
    squares: Tensor
    """Second moments [M, P]."""
    rates: Tensor
    """Learning rates [M], in float64."""
    decays: Tensor
    """Weight decay of every number [P]."""
    betas: tuple[float, float]
    epsilon: float

    @classmethod
    def of(cls, stack: Stack, optimisers: Sequence[torch.optim.Optimizer]) -> "StackedAdamW":
        """From where the members' optimisers are; their states and rates become views."""
        columns = list(stack.own.values())
        first = optimisers[0].param_groups
        decay_of = {id(weight): group["weight_decay"] for group in first for weight in group["params"]}
        decays = lay_out([[torch.full_like(column[0], decay_of[id(column[0])]) for column in columns]])[0]
        made = cls(
            stack=stack,
            steps=torch.zeros(len(stack.models), len(columns), device=stack.weights.device),
            moments=torch.zeros_like(stack.weights),
            squares=torch.zeros_like(stack.weights),
            rates=torch.zeros(len(stack.models), dtype=torch.float64, device=stack.weights.device),
            decays=decays,
            betas=first[0]["betas"],
            epsilon=first[0]["eps"],
        )
        made._take(optimisers)
        return made

    @torch.no_grad()
    def _take(self, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        columns = list(self.stack.own.values())
        places = _places([column[0] for column in columns])
        for m, optimiser in enumerate(optimisers):
            states = [optimiser.state[column[m]] for column in columns]
            # One that no gradient has reached yet has no state, and will be as old as the others.
            self.steps[m] = max((float(state["step"]) for state in states if state), default=0.0)
            for i, (state, place, column) in enumerate(zip(states, places, columns, strict=True)):
                views = {
                    "exp_avg": _part(self.moments, place, column[m])[m],
                    "exp_avg_sq": _part(self.squares, place, column[m])[m],
                }
                for name, view in views.items():
                    if name in state:
                        view.copy_(state[name])
                state.update(views, step=self.steps[m, i])
            self.rates[m] = optimiser.param_groups[0]["lr"]
            for group in optimiser.param_groups:
                group["lr"] = self.rates[m]

    @torch.no_grad()
    def step(self) -> None:
        """Move all members' weights."""
        first, second = self.betas
        weights, gradients, rates = self.stack.weights, self.stack.gradients, self.rates[:, None]
        self.steps.add_(1.0)
        # In float64, since rounding here would be a member's other rate.
        age = self.steps[:, :1].double()
        size = (rates / (1.0 - first**age)).to(weights.dtype)
        root = (1.0 - second**age).sqrt().to(weights.dtype)
        weights.addcmul_(weights, rates.to(weights.dtype) * self.decays, value=-1.0)
        self.moments.lerp_(gradients, 1.0 - first)
        self.squares.mul_(second).addcmul_(gradients, gradients, value=1.0 - second)
        weights.addcdiv_(self.moments * size, self.squares.sqrt().div_(root).add_(self.epsilon), value=-1.0)


@torch.no_grad()
def lay_out(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """The tensors of each row end to end, with zeros between them that keep their addresses even [rows, P]."""
    places = _places(rows[0])
    ends = [*(place for place in places[1:]), _even(places[-1] + rows[0][-1].numel())]
    whole = rows[0][0].new_zeros(len(rows), ends[-1])
    for row, line in zip(whole, rows, strict=True):
        for place, tensor in zip(places, line, strict=True):
            row[place : place + tensor.numel()] = tensor.detach().flatten()
    return whole


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins in a row."""
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end = _even(end + tensor.numel())
    return places


def _even(count: int) -> int:
    return math.ceil(count / APART) * APART


def _part(rows: Tensor, place: int, like: Tensor) -> Tensor:
    """A view of the rows that holds one tensor of each member [M, …]."""
    return rows[:, place : place + like.numel()].view(len(rows), *like.shape)


def _names(module: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer each of its names, and the first of these."""
    first: dict[int, str] = {}
    every = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in every}


def _columns(rows: Sequence[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """The members' tensors by name."""
    return {name: [row[name] for row in rows] for name in rows[0]}


@torch.no_grad()
def _share(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked, after which each is a view of its part."""
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked
