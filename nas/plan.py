"""A configuration made concrete: frames, space, budget, starting layouts. Nothing is trained or written here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from nas.bounds import Bounds
from nas.config import Config, check, hash_of
from nas.letters import Latency, Letters
from nas.objectives import Objective, Quantity, read_objectives
from nas.rules import Rules, read_rules
from nas.widths import Widths, make_widths
from search_space.entries import make_channels, make_entries
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from search_space.presets import PRESETS, pattern_for
from search_space.space import Size, Space
from search_space.vocabulary import VOCABULARY, plain, shrink_layout
from search_space.vocabulary import check as check_layout
from trainers.evaluate import Budget, Job, TaskBudget
from trainers.measure import check_device
from trainers.tasks.bytes import Bytes
from trainers.tasks.registry import make_task

UNIFORM = "uniform"
"""The origin of layouts of one kind of layer; a preset's is its name."""
PRESET_EVERY = 5
"""One trial in so many is a preset, after the uniform layouts and until all presets were tried."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A layout that is tried before the sampler is asked, and why."""

    layout: Layout
    origin: str

    @property
    def at_once(self) -> bool:
        """Whether it is tried before all others: the layouts of one kind of layer are."""
        return self.origin == UNIFORM

    def due(self, number: int) -> bool:
        """Whether it is to be trial `number`, counted from 0: uniform layouts at once, presets among the sampler's.

        It follows from the number alone, so that a search in parts tries what one in one part does.
        """
        return self.at_once or number % PRESET_EVERY == 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search will do."""

    config: Config
    target: Frame
    proxy: Frame
    space: Space
    size: Size
    budget: Budget
    starts: tuple[Start, ...]
    data: Mapping[str, Any]
    """Source and SHA-256 of the text, if a task reads text."""
    objectives: tuple[Objective, ...]
    rules: Rules
    letters: Letters
    widths: Widths | None
    """Where every layout has a width of its own."""
    smaller: dict[tuple[Layer, int], Layer] = field(default_factory=dict, compare=False, repr=False)
    """Layers at the proxy's sizes, by layer and width of the target."""

    def bounds(self, latency: Latency | None = None) -> Bounds:
        """The rules as one question; without latencies those of the rules that are exact."""
        return Bounds(
            space=self.space, rules=self.rules, letters=self.letters_by(latency), widths=self.widths
        )

    def letters_by(self, latency: Latency | None) -> Letters:
        """The prices of layers, with latencies from there."""
        return replace(self.letters, latency=latency, times={})

    def target_of(self, layout: Layout) -> Frame:
        """The frame that a layout is priced in and shrunk from: the target, at the layout's own width if it has one."""
        return self.target if self.widths is None else self.letters.frame(self.widths.width_of(layout))

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What must be known of a layout's costs: what objectives and bounds name."""
        named = [objective.quantity for objective in self.objectives]
        named += [limit.quantity for limit in self.rules.limits]
        return tuple(dict.fromkeys(one for one in named if one.kind.source != "training"))

    def job(self, layout: Layout) -> Job:
        """The evaluation of a pattern at the proxy frame."""
        return Job(
            layers=tuple(self._shrunk(layout).to_json()),
            frame=self.proxy,
            budget=self.budget,
            seed=self.config.seed,
            time_limit_s=self.config.time_limit_s,
            device=self.config.proxy.device,
        )

    def _shrunk(self, layout: Layout) -> Layout:
        """The pattern at the proxy's sizes; a search asks for the same few layers again and again."""
        target = self.target_of(layout)
        for layer in dict.fromkeys(layout.layers):
            if (layer, target.width) not in self.smaller:
                [small] = shrink_layout(Layout((layer,)), target, self.proxy).layers
                self.smaller[layer, target.width] = small
        return Layout(tuple(self.smaller[layer, target.width] for layer in layout.layers))

    def evaluation_key(self, layout: Layout, seed: int | None = None) -> str:
        """Equal for two trials that would train the very same thing, with the study's own seed if no other is given."""
        job, proxy = self.job(layout), self.proxy
        scaling = [proxy.rotary_scaling, proxy.rotary_factor, proxy.rotary_length]
        if proxy.rotary_scaling == "none":
            # What was trained before there were scalings keeps its key.
            scaling = []
        return hash_of(
            {
                "layers": list(job.layers),
                "frame": [proxy.width, proxy.train_length, proxy.rotary_base, *scaling],
                "budget": budget_json(self.budget),
                "data": self.data.get("sha256"),
                "seed": job.seed if seed is None else seed,
                "device": job.device,
            }
        )


def make_plan(config: Config) -> Plan:
    """Resolve a configuration.

    Raises:
        ValueError: something in it is not valid, the space is empty, or the data cannot be read.
    """
    check(config)
    for device in (config.target.device, config.proxy.device):
        # A cluster's head seldom has a GPU; its nodes do.
        if config.ray_address is None or not device.startswith("cuda"):
            check_device(device)
    target = config.target.frame()
    proxy = proxy_frame(config)
    rules = read_rules(config.space.constraints, config.tasks, target)
    space = Space(
        layers=config.space.layers,
        entries=make_entries(config.space.mixers, config.space.settings, target),
        channels=make_channels(config.space.channels),
        sharing=config.space.sharing,
        constraints=rules.of_space,
        frame=target,
        fill=config.target.fill,
    )
    letters = Letters(target=target, fill=config.target.fill)
    widths = make_widths(rules.params, letters, space.alphabet, space.weights) if rules.params else None
    Bounds(space=space, rules=rules, letters=letters, widths=widths).check()
    size = space.size()
    if size.count == 0:
        texts = ", ".join(config.space.constraints)
        raise ValueError(
            f"the space is empty: no pattern of {space.layers} layers keeps {texts}; loosen one of them"
        )
    return Plan(
        config=config,
        target=target,
        proxy=proxy,
        space=space,
        size=replace(size, exact=False) if rules.beyond_space else size,
        budget=make_budget(config),
        starts=tuple(_starts(space)),
        data=_data(config),
        objectives=read_objectives(config.objectives, config.tasks, target),
        rules=rules,
        letters=letters,
        widths=widths,
    )


def proxy_frame(config: Config) -> Frame:
    """The frame that is trained; raises ValueError if its sizes are not valid."""
    return Frame(
        width=config.proxy.width,
        train_length=config.proxy.length,
        context=config.proxy.length,
        dtype="float32",
        rotary_base=config.target.rotary_base,
        rotary_scaling=config.target.rotary_scaling,
        rotary_factor=config.target.rotary_factor,
        rotary_length=config.target.rotary_length,
    )


def make_budget(config: Config) -> Budget:
    """The budget of every trial; raises ValueError for an unknown task, or text or lengths that do not do for it."""
    tasks = []
    for name, task in config.tasks.items():
        make_task(name, config.data, task.pairs).check(config.proxy.length)
        if task.pairs and 4 * max(task.pairs) > config.proxy.length:
            raise ValueError(
                f"tasks.{name}.pairs: {max(task.pairs)} pairs do not fit a length of {config.proxy.length}: "
                f"raise proxy.length to {4 * max(task.pairs)}, or ask for fewer"
            )
        tasks.append(
            TaskBudget(
                name=name,
                weight=task.weight,
                steps=task.steps,
                batch=task.batch,
                learning_rates=task.learning_rates,
                pairs=task.pairs,
            )
        )
    return Budget(
        tasks=tuple(tasks),
        length=config.proxy.length,
        data=config.data,
        stem_taps=config.proxy.stem_taps,
        weight_decay=config.proxy.weight_decay,
        precision=config.proxy.precision,
        rungs=config.rungs.shares,
    )


def budget_json(budget: Budget) -> dict[str, Any]:
    """A budget as plain JSON. The data is left out, since its hash stands for it, and the rungs, which change no bit."""
    return {
        "tasks": [
            [task.name, task.weight, task.steps, task.batch, list(task.learning_rates), list(task.pairs)]
            for task in budget.tasks
        ],
        "length": budget.length,
        "stem_taps": budget.stem_taps,
        "weight_decay": budget.weight_decay,
        "precision": budget.precision,
    }


def _starts(space: Space) -> list[Start]:
    """Uniform layouts, then presets of the space's mixers that keep its constraints.

    Of the presets those come first that bring together mixers which none before them did.
    """
    starts = [Start(layout=layout, origin=UNIFORM) for layout in space.uniform()]
    known, left = {start.layout for start in starts}, []
    for start in _presets(space):
        if start.layout not in known:
            known.add(start.layout)
            left.append(start)
    met: set[tuple[str, str]] = set()
    while left:
        following = max(left, key=lambda start: len(_meetings(start.layout) - met))
        met |= _meetings(following.layout)
        left.remove(following)
        starts.append(following)
    return starts


def _presets(space: Space) -> Iterator[Start]:
    """Those of whose layers the space allows the mixers, and that keep its constraints."""
    allowed = {_mixers(entry.layer) for entry in space.entries}
    for preset in PRESETS.values():
        pattern = pattern_for(preset, space.frame, space.layers)
        if pattern is None or not {_mixers(layer) for layer in pattern.layers} <= allowed:
            continue
        pattern = plain(pattern, space.frame)
        if space.why_not(pattern) is None:
            check_layout(pattern, space.frame)
            yield Start(layout=pattern, origin=preset.name)


def _meetings(layout: Layout) -> set[tuple[str, str]]:
    """The pairs of different mixers that stand in a layout."""
    mixers = sorted({branch.mixer for layer in layout.layers for branch in layer.branches})
    return set(combinations(mixers, 2))


def _mixers(layer: Layer) -> tuple[str, ...]:
    """The mixers side by side in a layer, which a space allows together or not at all."""
    return tuple(sorted(branch.mixer for branch in layer.branches))


def _data(config: Config) -> dict[str, Any]:
    if "bytes" not in config.tasks:
        return {}
    corpus = Bytes(data=config.data).corpus
    return {"source": corpus.source, "sha256": corpus.sha256, "files": corpus.files}


def families() -> dict[str, str]:
    """Mixer name to family."""
    return {name: spec.family for name, spec in VOCABULARY.items()}
