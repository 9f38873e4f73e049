"""`nas tune`: choose how the kernels are launched on the GPU that is here."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "tune"


def command(
    operator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One operator; all if left out. May be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, …")] = "cuda",
    most: Annotated[
        int, typer.Option(min=1, help="Candidates that are tried for each row of the table.")
    ] = 48,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the tables here; in place if left out.")
    ] = None,
) -> int:
    """Try block sizes, warps and stages of every kernel, check each, and write those that are faster to the table."""
    import torch

    from kernels.backend import architecture
    from kernels.probes import PROBES
    from kernels.tune import DTYPES, save, tune
    from nas.errors import reading_input
    from trainers.measure import check_device

    with reading_input():
        known = sorted({probe.operator for probe in PROBES})
        for name in operator or []:
            if name not in known:
                raise ValueError(
                    f"--operator {name!r} has no Triton kernel; those that have are {', '.join(known)}"
                )
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
        check_device(device)
        if not architecture(torch.device(device)):
            raise ValueError(f"no kernel runs on {device!r}: tune on a machine with a GPU")
    won = tune(
        operator or known,
        DTYPES[dtype],
        torch.device(device),
        toy=False,
        most=most,
        say=lambda line: print(line, flush=True),
    )
    for path in save(won, output):
        print(f"wrote {path}")
    return 0
