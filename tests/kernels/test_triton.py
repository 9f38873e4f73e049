"""What every Triton kernel owes, asked of every probe: in the interpreter where there is no GPU."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kernels.backend import INTERPRETER
from kernels.compile import ARCHITECTURES, DTYPES
from kernels.configurations import find, table, widest
from kernels.probe import Sizes, cast, converted, differentiable, fitting, noise
from kernels.probes import PROBES, probes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Around a chunk of 64 and of 16 tokens, odd lengths, several chunks; widths that are and are not powers of two.
FEW_SHAPES = (Sizes(time=17, key=60, value=20, batch=2),)
SHAPES = (
    *FEW_SHAPES,
    Sizes(time=1, key=16, value=32, heads=1),
    Sizes(time=64, key=32, value=16, groups=2),
    Sizes(time=130, key=12, value=16, heads=1),
)
# Of every probe: a chunk and a tail, and values of more than one tile, of which the last is not full.
TILED = Sizes(time=66, key=16, value=70, heads=1)
# Rounding is all that half precision adds: it grows with the chunks behind a token and with the sums of a product.
HALF_SHAPES = (Sizes(time=75, key=32, value=64, heads=1),)
WIDE_SHAPES = (Sizes(time=20, key=120, value=100, heads=1),)
WIDEST = 2**16
"""A table that serves more than this serves whatever there is."""
HALF_BOUNDS = {"output": 5e-3, "gradient": 8e-3, "loose": 2e-2}
every_probe = pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.id)


def served(probe, sizes, dtype):
    return find(probe.operator, probe.leading, probe.widths(sizes), dtype, INTERPRETER) is not None


def at(shapes, few, dtype):
    """The first probe of each operator at all of the shapes, the others at a few: at the rest where all is asked.

    In half precision also at wide ones, where they are too wide in float32.
    """
    pairs = []
    for probe in PROBES:
        first = probe is probes_of(probe.operator)[0]
        wide = [sizes for sizes in WIDE_SHAPES if dtype == "float32" or not served(probe, sizes, "float32")]
        for sizes in (*shapes, *wide):
            marks = () if first or sizes in few else pytest.mark.exhaustive
            if served(probe, sizes, dtype):
                pairs.append(pytest.param(probe, sizes, marks=marks, id=f"{probe.id}-{sizes}"))
    return pytest.mark.parametrize(("probe", "sizes"), pairs)


def draw(probe, sizes, dtype=torch.float32, seed=0):
    return cast(probe, probe.draw(sizes, torch.Generator().manual_seed(seed)), dtype, DEVICE)


def run(probe, backend, inputs, call=None, dtype=None):
    """Outputs, and the gradients of all inputs for arbitrary cotangents, by name."""
    leaves = {
        name: converted(x.detach(), dtype or x.dtype).requires_grad_(probe.backward)
        if differentiable(x)
        else x
        for name, x in inputs.items()
    }
    outputs = (call or probe.call)(backend, leaves)
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if probe.backward:
        asked = [x for x in outputs if x.requires_grad]
        draws = torch.Generator().manual_seed(7)
        cotangents = [noise(x, draws) for x in asked]
        named = {name: x for name, x in leaves.items() if x.requires_grad}
        gradients = torch.autograd.grad(asked, list(named.values()), cotangents, allow_unused=True)
        for (name, x), gradient in zip(named.items(), gradients, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return results


def compare(probe, actual, expected, bounds, near):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        kind = "output" if name.startswith("output") else "gradient"
        if name.removeprefix("gradient of ") in probe.loose:
            kind = "loose"
        if value.dtype in (torch.int32, torch.int64, torch.bool):
            assert torch.equal(actual[name], value), f"{probe.id}: {name}"
        else:
            # Where all cancels, as a gradient of one key's share does, the rounding of its terms is left: some 1e-7.
            floor = 1e-2 if bounds is EXACT and not value.any() else 1e-4
            near(actual[name], value, bounds[kind], floor=floor, name=f"{probe.id}: {name}")


EXACT = dict.fromkeys(("output", "gradient", "loose"), 1e-5)


@at(SHAPES, FEW_SHAPES, "float32")
def test_float32_equals_the_reference(probe, sizes, near):
    inputs = draw(probe, sizes)
    expected = run(probe, "reference", inputs, dtype=torch.float64)
    compare(probe, run(probe, "triton", inputs), expected, EXACT, near)


@at(HALF_SHAPES, HALF_SHAPES, "float16")
def test_float16_equals_the_reference(probe, sizes, near):
    inputs = draw(probe, sizes, torch.float16)
    expected = run(probe, "reference", inputs, dtype=torch.float64)
    actual = run(probe, "triton", inputs)
    for name, x in inputs.items():
        if probe.backward and differentiable(x):
            assert actual[f"gradient of {name}"].dtype == x.dtype
    compare(probe, actual, expected, HALF_BOUNDS, near)


@every_probe
def test_float32_equals_the_reference_to_the_same_bit_however_the_inputs_lie(probe, near):
    inputs = draw(probe, TILED)
    strided = {name: torch.stack([x, torch.full_like(x, 99)], dim=-1)[..., 0] for name, x in inputs.items()}
    assert not all(x.is_contiguous() for x in strided.values())
    actual = run(probe, "triton", inputs)
    compare(probe, actual, run(probe, "reference", inputs, dtype=torch.float64), EXACT, near)
    for name, value in run(probe, "triton", strided).items():
        assert torch.equal(value, actual[name]), name


def run_or_refuse(call):
    """What a call answers, or why it does not."""
    try:
        return call()
    except ValueError as error:
        return error


@every_probe
def test_growth_is_computed_or_refused(probe, near):
    """A log-decay above 0 is a state that grows: no form may take it for something else."""
    inputs = draw(probe, Sizes(time=33, heads=1))
    if "log_decay" not in inputs:
        pytest.skip("has no log-decay")
    signs = (
        torch.tensor([1.0, 1.0, -1.0])
        .repeat(11)
        .to(DEVICE)
        .unflatten(0, (1, -1, *[1] * (inputs["log_decay"].dim() - 2)))
    )
    gate = inputs["log_decay"]
    grown = signs * (gate.real if gate.is_complex() else gate).abs().clamp(max=0.2)
    inputs["log_decay"] = torch.complex(grown, gate.imag) if gate.is_complex() else grown
    expected = run(probe, "reference", inputs, dtype=torch.float64)
    for backend in ("chunked", "triton"):
        answer = run_or_refuse(lambda backend=backend: run(probe, backend, inputs))
        if isinstance(answer, ValueError):
            assert "log_decay" in str(answer)
        else:
            compare(probe, answer, expected, EXACT, near)


@every_probe
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_no_token_is_refused_or_changes_nothing(probe, backend):
    inputs = draw(probe, Sizes(time=1))
    inputs.update({name: inputs[name][:, :0] for name in probe.timed if name in inputs})
    answer = run_or_refuse(lambda: probe.call(backend, inputs))
    if isinstance(answer, ValueError):
        assert re.search(r"T(ime)?\b|token|empty|\b0\b", str(answer))
        return
    for name, place in probe.carried.items():
        if name in inputs:
            assert torch.equal(answer[place].to(inputs[name]), inputs[name]), name


@every_probe
def test_cut_anywhere(probe, near):
    """A first token alone, a whole chunk, a chunk and a tail, a tail: each goes on from the states before it."""
    if not probe.carried:
        pytest.skip("carries no state")
    inputs = draw(probe, Sizes(time=135, heads=1))
    whole = probe.call("reference", inputs)
    part, outputs = dict(inputs), []
    for start, end in pairwise((0, 1, 65, 131, 135)):
        part.update({name: inputs[name][:, start:end] for name in probe.timed if name in inputs})
        results = probe.call("triton", part)
        outputs.append(results[0])
        part.update({name: results[place] for name, place in probe.carried.items()})
    near(torch.cat(outputs, 1), whole[0])
    for name, place in probe.carried.items():
        near(part[name], whole[place], name=name)


@every_probe
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_equals_the_reference(probe, dtype, near):
    if probe.step is None:
        pytest.skip("has no step")
    for sizes in (
        Sizes(batch=2, time=1, key=12, value=70),
        Sizes(time=1, heads=4, groups=2, key=32, value=16),
    ):
        inputs = {
            name: x[:, 0] if name in probe.timed else x for name, x in draw(probe, sizes, dtype).items()
        }
        with torch.no_grad():
            expected = probe.step("reference", {n: converted(x, torch.float64) for n, x in inputs.items()})
            actual = probe.step("triton", inputs)
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            near(a, b, 1e-5 if dtype == torch.float32 else 5e-3, floor=1e-4, name=f"output {i}")


@every_probe
def test_packed_documents(probe, near):
    """Packed they are what they are apart, and one that changes leaves the others as they were, to the bit."""
    if probe.packed is None:
        pytest.skip("packs no documents")
    lengths = (5, 64, 1, 3)
    drawn = [draw(probe, Sizes(time=length), seed=length) for length in lengths]
    packed = {
        name: torch.cat([one[name] for one in drawn], dim=1 if name in probe.timed else 0)
        if name in probe.timed or name in probe.carried
        else drawn[0][name]
        for name in drawn[0]
    }
    for one in drawn:
        one.update({name: drawn[0][name] for name in one if name not in (*probe.timed, *probe.carried)})
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE)

    def call(backend, inputs):
        return probe.packed(backend, inputs, cu_seqlens)

    together = run(probe, "triton", packed, call)
    compare(probe, together, run(probe, "reference", packed, call, torch.float64), EXACT, near)
    apart = [probe.call("reference", one) for one in drawn]
    near(together["output 0"], torch.cat([outputs[0] for outputs in apart], 1))
    changed = {name: x.clone() for name, x in packed.items()}
    for name in probe.timed:
        if name in changed and differentiable(changed[name]):
            changed[name][:, 5:69] *= 0.5
    after = probe.packed("triton", changed, cu_seqlens)[0]
    for span in (slice(None, 5), slice(69, None)):
        assert torch.equal(after[:, span], together["output 0"][:, span])
    assert not torch.equal(after, together["output 0"])


@every_probe
def test_what_it_cannot_do_is_named(probe):
    with pytest.raises(ValueError, match=r"(float64|complex128).*take float32, float16 and bfloat16"):
        probe.call(
            "triton",
            {name: converted(x, torch.float64) for name, x in draw(probe, Sizes(time=4)).items()},
        )


@every_probe
def test_too_wide_is_named(probe):
    bounds = widest(probe.operator, probe.leading)
    width = max(2048, 2 * max(bounds, default=0))
    sizes = Sizes(time=2, key=width, value=width, heads=1)
    if width > WIDEST or probe.widths(sizes) == probe.widths(replace(sizes, key=16, value=16)):
        pytest.skip("takes any width")
    wide = max(probe.widths(sizes))
    with pytest.raises(
        ValueError, match=rf"no configuration serves .*={wide}.* the table goes up to .*backend='auto'"
    ):
        probe.call("triton", draw(probe, sizes))


def test_every_table_has_a_probe_and_every_probe_a_table():
    from pathlib import Path

    folders = {path.parent.name for path in Path("kernels").glob("*/triton.py")}
    assert folders == {probe.operator for probe in PROBES}
    assert folders == {path.parent.name for path in Path("kernels").glob("*/configurations.json")}
    for operator in folders:
        assert probes_of(operator)
        assert table(operator)


@every_probe
def test_kernels_of_one_call_have_one_chunk(probe):
    """What one kernel leaves at the edges of its chunks another one reads there."""
    rows = [row for row in table(probe.operator) if "CHUNK" in row.blocks and probe.asks(row.kernel)]
    for architecture in (*ARCHITECTURES, "any"):
        for dtype in DTYPES:
            for widths in {row.widths for row in rows}:
                found = [find(probe.operator, row.kernel, widths, dtype, architecture) for row in rows]
                assert len({row.blocks["CHUNK"] for row in found if row is not None}) <= 1


def narrower_types(probe):
    """The types in which a probe's table serves less than in another, and widths that only the other has."""
    for row in table(probe.operator):
        for dtype in ("float32", "float16"):
            if (
                row.kernel == probe.leading
                and find(probe.operator, probe.leading, row.widths, dtype, INTERPRETER) is None
            ):
                yield row.widths, DTYPES[dtype]


@every_probe
def test_what_one_type_cannot_do_goes_to_the_chunk_form(probe):
    """A call that `auto` would give to Triton must not fail there for want of a row."""
    for widths, dtype in narrower_types(probe):
        inputs = draw(probe, replace(fitting(probe, widths), time=2, heads=1), dtype)
        with pytest.raises(ValueError, match=r"in float\d\d on .*the table goes up to"):
            probe.call("triton", inputs)
