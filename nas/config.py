"""The configuration of a study: defaults, then a YAML file, then --set, then flags; unknown keys are refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search_space.constraint import read_constraints
from search_space.frame import DTYPE_BYTES, Frame
from search_space.notation import nearest
from search_space.quantity import read_count

Count = Annotated[int, Field(ge=1)]
SettingValue = bool | int | float | str


def _default_settings() -> dict[str, dict[str, tuple[SettingValue, ...]]]:
    return {
        "full": {"kv_heads": (2, 8)},
        "window": {"size": (256, 1024)},
        "linear": {"head_dim": (64, 128)},
        "mamba2": {"state": (32, 128)},
        "kda": {"head_dim": (64, 128)},
        "mla": {"rank": (128, 256), "rotary": (1.0, 0.0)},
    }


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
        )


class ProxyConfig(Section):
    """The small network that is trained instead; quality is taken here."""

    width: Count = 64
    length: Count = 48
    stem_taps: Annotated[int, Field(ge=0, le=8)] = 4
    weight_decay: float = Field(default=0.1, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"


class TaskConfig(Section):
    """How much of one proxy task, and what it weighs in the quality."""

    weight: float = Field(default=1.0, gt=0)
    steps: Count = 200
    batch: Count = 64
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-2,), min_length=1)


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


class Config(Section):
    """Everything that a search needs to know."""

    study: Annotated[str, Field(min_length=1, max_length=200)] = "quick"
    storage: str = "sqlite:///nas.db"
    seed: Annotated[int, Field(ge=0)] = 0
    trials: Count = 32
    workers: Count = 2
    pool: Literal["auto", "inline", "ray"] = "auto"
    ray_address: str | None = None
    time_limit_s: float = Field(default=600.0, gt=0)
    attempts: Count = 3
    """How often a trial that the machine lost is tried in all."""
    latency_cache: str | None = "~/.cache/nas/latency.db"
    """Latencies of this machine's devices, shared by all studies; null for none."""
    sampler: str = "tpe"
    objectives: tuple[str, ...] = ("quality", "latency_ms", "kv_bytes")
    data: str = "stdlib"
    target: TargetConfig = TargetConfig()
    proxy: ProxyConfig = ProxyConfig()
    space: SpaceConfig = SpaceConfig()
    tasks: dict[str, TaskConfig] = Field(
        default_factory=lambda: {"mqar": TaskConfig(steps=240), "bytes": TaskConfig(steps=100)}, min_length=1
    )


RUNNING_KEYS = (
    "study", "storage", "trials", "workers", "pool", "ray_address", "time_limit_s", "attempts", "latency_cache",
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
        raise ValueError("\n".join(_explain(item) for item in error.errors()[:4])) from None


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"configuration: unknown key {place}{nearest(str(item['loc'][-1]), _known_keys(item['loc'][:-1]))}"
    return f"configuration: {place} = {item['input']!r} is not valid: {item['msg']}"


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


def read_assignments(texts: list[str]) -> dict[str, Any]:
    """`a.b=c` texts as a nested mapping; values are read as YAML, sizes like 32k as numbers.

    Raises:
        ValueError: a text has no "=".
    """
    result: dict[str, Any] = {}
    for text in texts:
        path, equals, raw = text.partition("=")
        if not equals or not all(path.split(".")):
            raise ValueError(f"--set {text!r} is not understood: write it like target.width=2048")
        value = yaml.safe_load(raw)
        if isinstance(value, str) and value[:1].isdigit() and value[-1:] in "kK":
            value = read_count(value)
        nested: Any = value
        for part in reversed(path.split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def check(config: Config) -> None:
    """What the types alone cannot see; raises ValueError."""
    config.target.frame()
    read_constraints(config.space.constraints)
    assert config.target.dtype in DTYPE_BYTES
    known = ("quality", "latency_ms", "kv_bytes", "params", "flops_prefill", "flops_decode")
    for name in config.objectives:
        if name not in known:
            raise ValueError(f"no objective {name!r}{nearest(name, known)} (there are {', '.join(known)})")
    if len(set(config.objectives)) != len(config.objectives) or "quality" not in config.objectives:
        raise ValueError(
            f"objectives {', '.join(config.objectives)} are not valid: name quality, and each one once"
        )


def meaning(config: Config) -> dict[str, Any]:
    """The part of a configuration that may not change while a study lives, as plain JSON."""
    plain = config.model_dump(mode="json")
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
