"""The configuration of a study: defaults, then a YAML file, then --set, then flags; unknown keys are refused."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nas import defaults
from nas.logs import Level
from nas.objectives import read_objectives
from nas.rules import read_rules
from search_space.entries import words_of
from search_space.frame import DTYPE_BYTES, Frame
from search_space.notation import nearest
from search_space.quantity import read_count


def _read_size(value: Any) -> Any:
    return read_count(value) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_read_size), Field(ge=1)]
"""A whole number from one up, which people may also write as 32k."""
SettingValue = bool | int | float | str
MOST_SEED = 2**63 - 1


def _default_settings(chosen: Mapping[str, Any]) -> dict[str, dict[str, tuple[SettingValue, ...]]]:
    """The values to try, for those mixers that the space allows by their name or their family."""
    allowed = chosen.get("mixers", ())
    settings: dict[str, dict[str, tuple[SettingValue, ...]]] = {
        "full": {"kv_heads": (2, 8)},
        "window": {"size": (256, 1024)},
        "linear": {"head_dim": (64, 128)},
        "mamba2": {"state": (32, 128)},
        "kda": {"head_dim": (64, 128)},
        "mla": {"rank": (256, 512), "rotary": (1.0, 0.0)},
    }
    words = {word for name in allowed for word in words_of(name)}
    return {name: values for name, values in settings.items() if name in words}


class Section(BaseModel):
    """A part of the configuration: frozen, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class TargetConfig(Section):
    """The network that will be deployed; costs are taken here."""

    width: Count = 1024
    depth: Count = 16
    train_length: Count = 4096
    context: Count = 32768
    batch: Count = 1
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    vocabulary: Count = 32000
    rotary_base: float = Field(default=10000.0, gt=1)
    rotary_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """How rotary angles are stretched for texts longer than those of the first training."""
    rotary_factor: float = Field(default=1.0, ge=1)
    rotary_length: Count | None = None
    """Tokens of the first training's texts, for yarn."""
    fill: Literal["stack", "stretch"] = "stack"
    """How a pattern becomes `depth` layers."""
    contexts: tuple[Count, Count] = (8192, 131072)
    """Where the front's table shows the cache."""
    device: str = "cpu"
    """Where latency is measured."""

    def frame(self) -> Frame:
        """The target frame; raises ValueError if its sizes are not valid."""
        return Frame(
            width=self.width,
            depth=self.depth,
            train_length=self.train_length,
            context=self.context,
            batch=self.batch,
            dtype=self.dtype,
            vocabulary=self.vocabulary,
            rotary_base=self.rotary_base,
            rotary_scaling=self.rotary_scaling,
            rotary_factor=self.rotary_factor,
            rotary_length=self.rotary_length,
            max_length=max(self.train_length, self.context, *self.contexts),
        )


class ProxyConfig(Section):
    """The small network that is trained instead; quality is taken here."""

    width: Count = 32
    length: Count = 32
    stem_taps: Annotated[int, Field(ge=0, le=8)] = 4
    weight_decay: float = Field(default=0.1, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"


class TaskConfig(Section):
    """How much of one proxy task, and what it weighs in the quality."""

    weight: float = Field(default=1.0, gt=0)
    steps: Count = 200
    batch: Count = 32
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-2,), min_length=1)
    pairs: tuple[Count, ...] = ()
    """For mqar: how many pairs are to be recalled, four times as many tokens at least; its own numbers if left out."""


class SpaceConfig(Section):
    """Which layers may stand where."""

    layers: Count = 4
    mixers: tuple[str, ...] = ("full", "window", "linear", "mamba2", "kda", "mla")
    """Mixer names, family names, or whole layers such as window[size=512]|mamba2."""
    settings: dict[str, dict[str, tuple[SettingValue, ...]]] = Field(default_factory=_default_settings)
    """By mixer and setting, the values to try; a mixer that is left out tries its own."""
    channels: tuple[str, ...] = ("swiglu",)
    sharing: Literal["layer", "study"] = "layer"
    """Whether every layer chooses its own settings, or all layers of a mixer share them."""
    constraints: tuple[str, ...] = ()


class RungsConfig(Section):
    """Where trainings are scored before their end, and who goes on from there."""

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.33,)
    """Shares of every task's steps, rising; none: every layout is trained to the end and scored there alone."""
    keep: float = Field(default=0.1, gt=0, le=1)
    """The share of those at a rung that goes on by its rank; 1 stops nobody and records all rungs in one go."""
    chance: float = Field(default=0.1, ge=0.1, le=1)
    """The share that goes on by chance, whatever its rank, so that the rungs can be judged."""
    trust: float = Field(default=0.1, ge=-1, le=1)
    """The least Kendall τ between a rung and the end at which the rung is heeded."""

    @property
    def stop(self) -> bool:
        """Whether anybody may be stopped."""
        return bool(self.shares) and self.keep < 1

    @model_validator(mode="after")
    def _rise(self) -> "RungsConfig":
        if any(low >= high for low, high in pairwise(self.shares)):
            raise ValueError("the shares must rise")
        return self


class Config(Section):
    """Everything that a search needs to know."""

    study: Annotated[str, Field(min_length=1, max_length=200)] = defaults.STUDY
    storage: str = Field(default=defaults.STORAGE, repr=False)
    """Kept out of what is printed of a configuration, as it may hold a password."""
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    trials: Count = 24
    workers: Count = 2
    pool: Literal["auto", "inline", "ray"] = "auto"
    ray_address: str | None = None
    gpus: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of a GPU that a trial holds on Ray, 1 for a whole one; null: none where the proxy is trained on the CPU,
    else an equal part for each worker."""
    time_limit_s: float = Field(default=600.0, gt=0)
    repeats: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    """Trainings with new seeds, of layouts near the front, once all trials are there; null: one for four trials."""
    attempts: Count = 3
    """How often in a row a trial may be lost before it is not tried again."""
    lease_s: float = Field(default=60.0, ge=1)
    """How long a driver on a server that says nothing is believed to be alive."""
    checkpoints: str | None = None
    """The folder where stopped trials rest; null: beside a SQLite file, or in ~/.cache/nas. Workers on several machines
    need one that all of them see."""
    latency_cache: str | None = "~/.cache/nas/latency.db"
    """Latencies of this machine's devices, shared by all studies; null for none."""
    log_file: str | None = None
    """Where the search writes what happens, a JSON object a line; null: beside a SQLite file, or in ~/.cache/nas."""
    log_level: Level = "info"
    sampler: str = "layout"
    objectives: tuple[str, ...] = ("quality", "latency_ms", "kv_bytes")
    data: str = "stdlib"
    rungs: RungsConfig = RungsConfig()
    target: TargetConfig = TargetConfig()
    proxy: ProxyConfig = ProxyConfig()
    space: SpaceConfig = SpaceConfig()
    tasks: dict[str, TaskConfig] = Field(
        default_factory=lambda: {"mqar": TaskConfig(steps=220), "bytes": TaskConfig(steps=30)}, min_length=1
    )

    @property
    def most_repeats(self) -> int:
        """Trainings with new seeds that the study shall have in all."""
        return self.trials // 4 if self.repeats is None else self.repeats


RUNNING_KEYS = (
    "study", "storage", "trials", "repeats", "workers", "pool", "ray_address", "gpus", "time_limit_s", "attempts",
    "lease_s", "checkpoints", "latency_cache", "log_file", "log_level",
)  # fmt: skip
"""What may change when a study goes on: where and how long it runs, not what it means."""


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The configuration of the layers, later ones over earlier ones.

    Raises:
        ValueError: a key is unknown or a value is not valid; the message names it.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        # A default that another field's error leaves without its ground says nothing of its own.
        wrong = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
        raise ValueError("\n".join(_explain(item) for item in wrong[:4])) from None


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"configuration: unknown key {place}{nearest(str(item['loc'][-1]), _known_keys(item['loc'][:-1]))}"
    why = item["msg"].removeprefix("Value error, ")
    return f"configuration: {place} = {item['input']!r} is not valid: {why}"


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else TaskConfig
    return list(getattr(model, "model_fields", {}))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; lists, and the tables of tasks and of settings, are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(old, Mapping) and key not in ("tasks", "settings")
        merged[key] = merge(old, value) if nested and isinstance(old, Mapping) else value
    return merged


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises ValueError if it cannot be read as one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"configuration file {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"configuration file {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"configuration file {path} must hold a mapping of keys to values")
    return content


def assign(below: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """A configuration in which each text such as `a.b=c` sets one key; values are read as YAML.

    A table that is replaced whole elsewhere keeps its other keys here, so that tasks.mqar.steps=100 leaves bytes alone.

    Raises:
        ValueError: a text has no "=", its value is not YAML, or a table that it changes is not valid.
    """
    result = dict(below)
    for path, value in sorted(map(_read_assignment, texts), key=lambda item: _in_table(item[0])):
        if _in_table(path):
            whole = resolve(result).model_dump(mode="json")
            table = (
                {"tasks": whole["tasks"]}
                if path[0] == "tasks"
                else {"space": {"settings": whole["space"]["settings"]}}
            )
            result = merge(result, table)
        result = _put(result, path, value)
    return result


def _read_assignment(text: str) -> tuple[list[str], Any]:
    key, equals, raw = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ValueError(f"--set {text!r} is not understood: write it like target.width=2048")
    try:
        return path, yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ValueError(f"--set {text!r} is not understood: {raw!r} is not valid YAML") from None


def _in_table(path: Sequence[str]) -> bool:
    return (path[0] == "tasks" and len(path) > 1) or (
        list(path[:2]) == ["space", "settings"] and len(path) > 2
    )


def _put(mapping: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    key, *rest = path
    if not rest:
        return {**mapping, key: value}
    inner = mapping.get(key)
    return {**mapping, key: _put(inner if isinstance(inner, Mapping) else {}, rest, value)}


def check(config: Config) -> None:
    """What the types alone cannot see; raises ValueError."""
    target = config.target.frame()
    if config.space.layers > config.target.depth:
        raise ValueError(
            f"space.layers = {config.space.layers} is more than target.depth = {config.target.depth}: "
            "a pattern is at most as deep as its network"
        )
    read_rules(config.space.constraints, config.tasks, target)
    assert config.target.dtype in DTYPE_BYTES
    read_objectives(config.objectives, config.tasks, target)


def of_study(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a study keeps; a key that is younger than the study has its default, but no rungs."""
    return {"rungs": {"shares": []}} | {key: value for key, value in stored.items() if key != "data_sha256"}


def meaning(config: Config) -> dict[str, Any]:
    """The part of a configuration that may not change while a study lives, as plain JSON.

    Objectives are written in the one way that each has: kv_bytes@128k is kv_bytes@131072.
    """
    plain = config.model_dump(mode="json")
    # What is not valid is refused by `check`, after it was said in what a study differs.
    with suppress(ValueError):
        objectives = read_objectives(config.objectives, config.tasks, config.target.frame())
        plain["objectives"] = [objective.text for objective in objectives]
    return {key: value for key, value in plain.items() if key not in RUNNING_KEYS}


def hash_of(values: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of plain JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines such as "proxy.width: 64, now 96" for every leaf that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_shown(before)}, now {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)
