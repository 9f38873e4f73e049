"""Everything that a GPU can tell of the kernels: ceilings, correctness, times beside peers, and the proxies' training loop.

`python -m benchmarks.gpu` from a checkout; torch, triton and numpy are all it needs, and ten minutes of one GPU. A
kernel that fails its check is given no time. `--device cpu --toy` runs the same program at toy sizes in Triton's
interpreter and says nothing about speed.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes for the interpreter; times mean nothing")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="stop starting new measurements after so long"
    )
    parser.add_argument("--operator", action="append", help="all of them if left out")
    parser.add_argument("--output", type=Path, help="the JSON; benchmarks/results/gpu_NAME.json if left out")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        # Before anything imports Triton: it decides then whether its kernels are interpreted.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    import torch
    import triton

    from benchmarks import gpu_operators, gpu_training
    from kernels.backend import architecture

    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --toy tries the program itself")
    began = time.perf_counter()

    def left_s() -> float:
        left: float = options.minutes * 60 - (time.perf_counter() - began)
        return left

    name = "interpreter" if options.device == "cpu" else torch.cuda.get_device_name(device)
    measured: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).date().isoformat(),
        "device": name,
        "architecture": architecture(device),
        "toy": options.toy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    output = (
        options.output or Path(__file__).parent / "results" / f"gpu_{name.lower().replace(' ', '_')}.json"
    )

    def keep(section: str, found: Any) -> None:
        """Written after every section: a run that is cut short has told what it knew."""
        measured[section] = found
        measured["seconds"] = round(time.perf_counter() - began, 1)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(measured, indent=1) + "\n")

    calls = gpu_operators.plan(options.operator, device, toy=options.toy)
    if device.type == "cuda":
        keep("ceilings", gpu_operators.ceilings(device))
        keep("compile_s", gpu_operators.precompile(calls, device))
    checks = gpu_operators.check(calls, device, left_s)
    keep("checks", checks)
    good = {row["probe"] for row in checks if row["ok"]} - {row["probe"] for row in checks if not row["ok"]}
    keep("times", gpu_operators.times(calls, good, device, left_s, measured.get("ceilings")))
    keep("training", gpu_training.rows(device, left_s, toy=options.toy))
    gpu_operators.print_tables(measured)
    print(f"wrote {output} after {measured['seconds']} s")
    return 0 if all(row["ok"] for row in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
