"""Before anything imports Triton: where there is no GPU its kernels run in the interpreter, so that every test can run."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
