"""Before anything imports Triton: where there is no GPU its kernels run in the interpreter, so that every test can run."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # The operators' tests ask torch for deterministic algorithms, which cuBLAS grants with a workspace of its own alone.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
