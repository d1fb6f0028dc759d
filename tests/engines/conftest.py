"""Where the engines' own classes come from, and what makes their Triton kernels an oracle on a CPU.

`make engines` fills build/engines and runs these tests; they are no part of `make test`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

PLACE = Path(__file__).parents[2] / "build" / "engines"
FOLDERS = [PLACE / name for name in ("vllm", "sglang", "packages")]

for folder in FOLDERS:
    if not folder.is_dir():
        pytest.exit(f"{folder} is not there: `make engines` makes it, and then runs these tests", returncode=4)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as vLLM gives up Triton where it finds no driver and no sign that one may come
sys.path += map(str, FOLDERS)  # at the end: what the environment has stays what it is

# Triton's interpreter cuts fp32 off where it makes bf16 of it, and rounds half up where it makes e4m3. GPUs and torch round
# to the nearest, ties to even.
ROUNDED = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8)}
CONVERT = interpreter._convert_float


def convert(value: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
    if source != tl.float32 or target not in ROUNDED:
        return CONVERT(value, source, target, rounding_mode)
    dtype, same_width, bits = ROUNDED[target]
    numbers = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.float32).copy())
    return numbers.to(dtype).view(same_width).numpy().view(bits).reshape(value.shape)


interpreter._convert_float = convert
