"""What a program that tests start imports: lbg's launcher layer through its C interface, with no tensor behind it."""

from __future__ import annotations

import ctypes

import lbg

# Told apart in a launch's recorded parameters, and 16-byte aligned.
X, WEIGHT, SCALE, SHIFT, OUT, STREAM = 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x77
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}

_run = ctypes.CDLL(lbg._C.__file__).lbg_run


def launch(
    m: int,
    n: int,
    k: int,
    *,
    x: str = "float16",
    weight: str = "float16",
    out: str = "float16",
    fp16_accumulate: bool = False,
    strides: tuple[int, ...] | None = None,
    addresses: tuple[int, ...] = (X, WEIGHT, SCALE, SHIFT, OUT),
    device: int = 0,
    stream: int = STREAM,
) -> str:
    """lbg_run's text, empty on success; strides (xm, xk, wn, wk, scale, shift, om, on) are contiguous unless given."""
    text = ctypes.create_string_buffer(2048)
    code = _run(
        *(DTYPES[x], DTYPES[weight], DTYPES[out], int(fp16_accumulate)),
        (ctypes.c_int64 * 3)(m, n, k),
        (ctypes.c_int64 * 8)(*(strides or (k, 1, k, 1, 1, 1, n, 1))),
        *map(ctypes.c_void_p, addresses),
        device,
        ctypes.c_void_p(stream),
        text,
        ctypes.c_size_t(len(text)),
    )
    assert (code == 0) == (text.value == b""), f"code {code} with text {text.value!r}"
    return text.value.decode()
