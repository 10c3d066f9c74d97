"""Derives the polynomial of the epilogue (aot/kernels.py, relu_gelu): python3 tests/fit_epilogue.py prints it.

relu_gelu(r) = r * (1 - Q(r)) for r > 0, with Q = 1 - Phi the normal distribution's upper tail, and p(r) is fitted to
log2 Q(r), with p(0) = -1 exact. An error e in p changes the result by r * Q(r) * ln 2 * e, and what counts is that
change over the result: hence the weight. The best fit in that measure is found by Remez exchange.
"""

from __future__ import annotations

import math

import numpy as np

DEGREES = (5, 3)  # of float32 results, and of 16-bit ones
LAST = 8.0  # past it r * Q(r) is below 1e-14, and p only has to keep falling


def tail(r: np.ndarray) -> np.ndarray:
    """Q(r) = 1 - Phi(r), to float64's relative precision."""
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in r])


def fit(degree: int, points: int = 40001, rounds: int = 20) -> tuple[np.ndarray, float]:
    """(coefficients from the constant up, the largest relative error) in float64."""
    r = np.linspace(0, LAST, points)[1:]
    q = tail(r)
    target, weight = np.log2(q) + 1, q * math.log(2) / (1 - q)
    powers = r[:, None] ** np.arange(1, degree + 1)
    # degree + 1 points at which the error alternates in sign, begun where Chebyshev's polynomial does
    chosen = np.unique(((1 - np.cos(np.linspace(0.03, 0.8, degree + 1) * np.pi)) / 2 * len(r)).astype(int))
    signs = (-1.0) ** np.arange(degree + 1)
    for _ in range(rounds):
        system = np.column_stack([powers[chosen], signs / weight[chosen]])
        coefficients = np.linalg.solve(system, target[chosen])[:-1]
        error = weight * (target - powers @ coefficients)
        runs = np.split(np.arange(len(r)), np.flatnonzero(np.diff(np.sign(error))) + 1)  # of one sign each
        peaks = [run[np.argmax(np.abs(error[run]))] for run in runs]
        while len(peaks) > degree + 1:  # keep the largest that alternate
            peaks.pop(0 if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else -1)
        if len(peaks) < degree + 1 or np.array_equal(peaks, chosen):
            break
        chosen = np.array(peaks)
    return np.concatenate([[-1.0], coefficients]), float(np.abs(error).max())


def main() -> None:
    for degree in DEGREES:
        coefficients, error = fit(degree)
        for power, coefficient in enumerate(coefficients):
            print(f"r^{power}  {float(np.float32(coefficient))!r}")
        print(f"largest relative error of relu_gelu(r), degree {degree}: {error:.3g}")


if __name__ == "__main__":
    main()
