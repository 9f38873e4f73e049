"""Latencies of a network as rows: every distinct layer, their sums, and the network run as one."""

from typing import Any

from dashboards import quantities
from nas.cli.output import console
from nas.prices import LatencyBook
from search_space.frame import Frame
from search_space.layout import Layout


def measure_rows(
    network: Layout, frame: Frame, prompt_frame: Frame, book: LatencyBook, *, whole: bool
) -> dict[str, Any]:
    """Measure; raises ValueError if the machine is too small for it."""
    rows, decode_sum, prefill_sum = [], 0.0, 0.0
    for layer in dict.fromkeys(network.layers):
        decode, prefill = book.layer(layer, frame, "decode"), book.layer(layer, prompt_frame, "prefill")
        count = network.layers.count(layer)
        decode_sum, prefill_sum = (
            decode_sum + count * decode.latency_ms,
            prefill_sum + count * prefill.latency_ms,
        )
        rows.append(
            {
                "layer": str(layer),
                "count": count,
                "decode_ms": decode.latency_ms,
                "decode_spread_ms": decode.spread_ms,
                "prefill_ms": prefill.latency_ms,
                "prefill_spread_ms": prefill.spread_ms,
            }
        )
    answer: dict[str, Any] = {
        "layout": str(network),
        "layers": len(network),
        "width": frame.width,
        "context": frame.context,
        "batch": frame.batch,
        "dtype": frame.dtype,
        "prompt": prompt_frame.context,
        "star_block": prompt_frame.star_block,
        "by_layer": rows,
        "decode_ms": decode_sum,
        "prefill_ms": prefill_sum,
    }
    if whole:
        answer["decode_whole_ms"] = book.network(network, frame, "decode").latency_ms
        answer["prefill_whole_ms"] = book.network(network, prompt_frame, "prefill").latency_ms
    return answer


def print_rows(answer: dict[str, Any]) -> None:
    """The rows for people."""
    out = console()

    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{answer['layout']}  on {answer['device']}")
    line(
        f"width {answer['width']}, batch {answer['batch']}, {answer['dtype']}; decode: one step at "
        f"{quantities.tokens(answer['context'])}; prefill: a prompt of {quantities.tokens(answer['prompt'])}"
    )
    if answer["star_block"]:
        line(
            f"full attention is prefilled by Star Attention, in blocks of {quantities.tokens(answer['star_block'])}"
        )
    for row in answer["by_layer"]:
        decode = f"{quantities.milliseconds(row['decode_ms'])} ± {row['decode_spread_ms']:.2g}"
        prefill = f"{quantities.milliseconds(row['prefill_ms'])} ± {row['prefill_spread_ms']:.2g}"
        line(f"  {row['count']:>3} ×  decode {decode:<20} prefill {prefill:<20} {row['layer']}")
    line(
        f"  sum    decode {quantities.milliseconds(answer['decode_ms']):<20} prefill {quantities.milliseconds(answer['prefill_ms'])}"
    )
    if "decode_whole_ms" in answer:
        line(
            f"  run    decode {quantities.milliseconds(answer['decode_whole_ms']):<20} prefill {quantities.milliseconds(answer['prefill_whole_ms'])}"
            "   (all layers end to end)"
        )
