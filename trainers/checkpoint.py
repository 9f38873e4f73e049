"""Checkpoints of trainings that rest at a rung: tensors as safetensors, the rest as JSON beside them with their hash.

Nothing is unpickled. A file is written aside and renamed, the JSON last, so that a half-written pair is never taken.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.loop import NotFinite, Track
from trainers.members import Member

FORMAT = 1
CHUNK_BYTES = 1 << 20


class Damaged(Exception):
    """A checkpoint that is missing, broken, or of something else; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint as it was read: what it says of itself, and its tensors by name, on the CPU."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def key_of(meaning: Mapping[str, Any]) -> str:
    """Thirty-two hexadecimal digits of everything that the training depends on, as plain JSON."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:32]


def place_of(directory: str, key: str, rung: int) -> Path:
    """The file of tensors; its JSON stands beside it."""
    return Path(directory).expanduser() / f"{key}-rung{rung}.safetensors"


def save(
    directory: str, key: str, rung: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint so that it is there whole or not at all; raises OSError where the disk says no."""
    place = place_of(directory, key, rung)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        try:
            save_file(dict(tensors), aside)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _settle(aside)
        digest = _sha256(aside)
        os.replace(aside, place)
        whole = {**header, "format": FORMAT, "key": key, "rung": rung, "sha256": digest}
        aside.write_text(json.dumps(whole, allow_nan=False), encoding="utf-8")
        _settle(aside)
        os.replace(aside, place.with_suffix(".json"))
        _settle(place.parent)
    finally:
        aside.unlink(missing_ok=True)


def load(directory: str, key: str, rung: int) -> Saved:
    """Read a checkpoint.

    Raises:
        Damaged: it is missing, not whole, or not of this training and rung.
    """
    place = place_of(directory, key, rung)
    try:
        header = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        digest = _sha256(place)
    except FileNotFoundError:
        raise Damaged(f"there is no checkpoint {place.name} in {place.parent}") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint {place.name} cannot be read: {error}") from None
    wanted = {"format": FORMAT, "key": key, "rung": rung, "sha256": digest}
    for name, value in wanted.items():
        if not isinstance(header, dict) or header.get(name) != value:
            raise Damaged(f"checkpoint {place.name} is damaged: its {name} is not the one that was written")
    try:
        return Saved(header=header, tensors=load_file(place))
    except (OSError, SafetensorError) as error:
        raise Damaged(f"checkpoint {place.name} cannot be read: {error}") from None


def forget(directory: str, key: str, rung: int) -> None:
    """Take a checkpoint away, if it is there."""
    place = place_of(directory, key, rung)
    # The JSON first: what is left of a removal that was cut off is then no checkpoint.
    place.with_suffix(".json").unlink(missing_ok=True)
    place.unlink(missing_ok=True)


def sweep(directory: str) -> None:
    """Take every checkpoint in a folder away, half-written ones too, and the folder if nothing else is in it."""
    folder = Path(directory).expanduser()
    for place in folder.glob("*-rung*.*"):
        if place.suffix in (".json", ".safetensors", ".part"):
            place.unlink(missing_ok=True)
    with suppress(OSError):
        # Not empty, or never made.
        folder.rmdir()


def _settle(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


def pack(
    prefix: str, lanes: Sequence[tuple[Sequence[Member], Track]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trainings of a task, group by group, as JSON and named tensors; of those that diverged only why."""
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    step = 0
    for members, track in lanes:
        for m, member in enumerate(members):
            end = track.ends.get(m)
            row: dict[str, Any] = {"taken": track.taken[m], "curve": track.curves[m]}
            if end is None:
                own = f"{prefix}/{len(rows)}"
                # A group that diverged whole stopped early, its batches with it.
                step = track.step
                tensors[f"{prefix}/rng/{member.seed}"] = track.rngs[member.seed].get_state()
                tensors[f"{own}/random_state"] = track.random_states[m]
                tensors.update(_tensors_of(own, member.model, track.optimisers[m]))
                row["extras"] = _extras_of(member.model)
            rows.append(row | {"end": None if end is None else str(end)})
    header = {
        "step": step,
        "members": rows,
        "train_s": sum(track.train_s for _, track in lanes),
        "prepare_s": sum(track.prepare_s for _, track in lanes),
    }
    # Members of a stack are views of one memory, which a file cannot hold.
    return header, {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def unpack(
    prefix: str, saved: Saved, places: Sequence[int], members: Sequence[Member], track: Track, share: float
) -> None:
    """Bring fresh members, which stood at these places when they were packed, and their track to where they were.

    `share` of the packed seconds is counted as theirs.

    Raises:
        Damaged: the checkpoint holds other models than these.
    """
    try:
        header = saved.header["tasks"][prefix]
        track.step = header["step"]
        track.train_s, track.prepare_s = share * header["train_s"], share * header["prepare_s"]
        for m, (place, member) in enumerate(zip(places, members, strict=True)):
            row = header["members"][place]
            track.taken[m], track.curves[m] = row["taken"], [(step, loss) for step, loss in row["curve"]]
            if row["end"] is not None:
                track.ends[m] = NotFinite(row["end"])
                continue
            own = f"{prefix}/{place}"
            track.rngs[member.seed].set_state(saved.tensors[f"{prefix}/rng/{member.seed}"])
            track.random_states[m] = saved.tensors[f"{own}/random_state"]
            _put_extras(member.model, row["extras"])
            _put_tensors(own, saved.tensors, member.model, track.optimisers[m])
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise Damaged(f"the checkpoint holds another model than the layout's: {error}") from None


def _tensors_of(own: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"{own}/weight/{name}": weight for name, weight in model.named_parameters()}
    # Those that no state_dict keeps count too: a resumed run must not tell.
    tensors |= {f"{own}/buffer/{name}": buffer for name, buffer in model.named_buffers()}
    for name, weight in model.named_parameters():
        for part, value in optimiser.state.get(weight, {}).items():
            tensors[f"{own}/optimiser/{part}/{name}"] = value
    return tensors


def _put_tensors(
    own: str, tensors: Mapping[str, Tensor], model: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    held = {
        name.removeprefix(f"{own}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{own}/")
    }
    weights = dict(model.named_parameters())
    for kind, fresh in (("weight", weights), ("buffer", dict(model.named_buffers()))):
        kept = {name.removeprefix(f"{kind}/") for name in held if name.startswith(f"{kind}/")}
        if kept != fresh.keys():
            raise KeyError(*sorted(kept ^ fresh.keys())[:1])
        for name, tensor in fresh.items():
            if tensor.shape != held[f"{kind}/{name}"].shape:
                raise KeyError(name)
            tensor.copy_(held[f"{kind}/{name}"])
    for full, value in held.items():
        kind, _, rest = full.partition("/")
        if kind == "optimiser":
            part, _, name = rest.partition("/")
            weight = weights[name]
            optimiser.state[weight][part] = value.to(weight.device)


def _counters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep something besides tensors, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _extras_of(model: nn.Module) -> dict[str, Any]:
    return {name: module.get_extra_state() for name, module in _counters(model).items()}


def _put_extras(model: nn.Module, extras: Mapping[str, Any]) -> None:
    modules = _counters(model)
    if modules.keys() != extras.keys():
        raise KeyError(*sorted(modules.keys() ^ extras.keys())[:1])
    for name, module in modules.items():
        module.set_extra_state(extras[name])


def plain(value: Any) -> Any:
    """A frozen value of ours as plain JSON."""
    return json.loads(json.dumps(asdict(value), default=str))
