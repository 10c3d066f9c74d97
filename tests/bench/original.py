"""The program that lbg replaces, as a peer: its kernel compiled ahead of time from its own file, given by path.

    python -m tests.bench.original model_new.py --arch 89 --run-on 90 --out FOLDER

compiles with no GPU, where triton is; the benchmark takes FOLDER, or the program itself where triton is at hand.
Nothing of the program is part of this project.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.records import Shape

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute


@dataclass(frozen=True)
class Image:
    """One autotune config of the original, compiled."""

    symbol: str
    compiled_arch: int
    arch: int  # what it was assembled for
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    shared_bytes: int
    scratch_pointers: int  # trailing parameters that this triton appends
    triton: str

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}, triton {self.triton}"


def compile_images(program: Path, compiled_arch: int, arch: int) -> list[tuple[Image, bytes]]:
    """The original's configs compiled for one arch and assembled for another, such as 89 and 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("original", program)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuned = module.fused_linear_bn_gelu_relu_kernel
    names = tuned.fn.arg_names
    compiled_images = []
    for config in tuned.configs:
        types = ["*fp16", "*fp16", *["*fp32"] * 4, *["i32"] * 9, *["constexpr"] * 3]
        constants = {"stride_xk": 1, "stride_wtn": 1, "stride_yn": 1, **config.kwargs}  # as its JIT specialises them
        signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
        hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
        source = ASTSource(fn=tuned.fn, signature=signature, constexprs=constants, attrs=hints)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", compiled_arch, 32), options=options)
        metadata = compiled.metadata
        same = compiled_arch == arch
        image = compiled.asm["cubin"] if same else assemble(compiled.asm["ptx"], arch)
        blocks = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
        scratch = sum(hasattr(metadata, f"{kind}_scratch_size") for kind in ("global", "profile"))
        facts = Image(metadata.name, compiled_arch, arch, *blocks, config.num_warps, config.num_stages,
                      metadata.shared, scratch, triton.__version__)  # fmt: skip
        compiled_images.append((facts, image))
    return compiled_images


def assemble(ptx: str, arch: int) -> bytes:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, image = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        subprocess.run([tool, f"--gpu-name=sm_{arch}", source, "-o", image], check=True, capture_output=True)
        return image.read_bytes()


def images(where: Path, compiled_arch: int, arch: int) -> list[tuple[Image, bytes]]:
    """From the program itself, or from a folder that `main` wrote."""
    if where.is_file():
        return compile_images(where, compiled_arch, arch)
    found = [Image(**json.loads(path.read_text())) for path in sorted(where.glob("*.json"))]
    wanted = [image for image in found if (image.compiled_arch, image.arch) == (compiled_arch, arch)]
    return [(image, (where / f"{file_name(image)}.cubin").read_bytes()) for image in wanted]


def file_name(image: Image) -> str:
    return f"sm_{image.compiled_arch}-on-{image.arch}-{image.block_m}x{image.block_n}x{image.block_k}"


class Kernel:
    """A loaded image, launched as the original launches it: grid (M tiles, N tiles), the weight transposed."""

    def __init__(self, facts: Image, image: bytes) -> None:
        self.facts = facts
        self._cuda = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream().synchronize()  # makes the context that the image is loaded into
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image))
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, facts.symbol.encode()))
        self._check(self._cuda.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, facts.shared_bytes))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"the original's kernel {self.facts.label}: CUresult {code}")

    def __call__(self, x: Tensor, weight_t: Tensor, vectors: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        (m, k), n = x.shape, weight_t.shape[1]
        values: list[Any] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight_t, *vectors, out)]
        values += [ctypes.c_int32(size) for size in (m, n, k, x.stride(0), weight_t.stride(0), out.stride(0))]
        values += [ctypes.c_void_p(None)] * self.facts.scratch_pointers
        params = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid = (-(-m // self.facts.block_m), -(-n // self.facts.block_n), 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (self.facts.warps * 32, 1, 1)
        self._check(
            self._cuda.cuLaunchKernel(self._function, *grid, *block, self.facts.shared_bytes, stream, params, None)
        )


def load(path: Path | None, compiled_arch: int, arch: int) -> tuple[list[Kernel], str]:
    """Its kernels compiled for one arch and assembled for the GPU's; or none, and why."""
    if path is None:
        return [], "no --original given"
    if path.is_file() and importlib.util.find_spec("triton") is None:
        return [], f"{path} has to be compiled by triton, which is not installed"
    kernels = [Kernel(*image) for image in images(path, compiled_arch, arch)]
    return kernels, "" if kernels else f"{path} holds no kernel compiled for sm_{compiled_arch} to run on sm_{arch}"


def check_sizes(shape: Shape) -> None:
    """Raises ValueError for sizes that the compiled kernels were not specialised for."""
    if shape.m % 16 or shape.n % 16 or shape.k % 16:
        raise ValueError("its kernels are compiled for sizes divisible by 16; any other has it compile again")


def fused(kernel: Kernel, x: Tensor, weight_t: Tensor, vectors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One launch. x [M, K] and weight_t [K, N] in float16; vectors: bias, scale, shift, [N]; the result in float32."""
    result = torch.empty(x.shape[0], weight_t.shape[1], device=x.device)
    kernel(x, weight_t, vectors, result)
    return result


def module(kernel: Kernel, x: Tensor, weight: Tensor, vectors: tuple[Tensor, ...], eps: float) -> Tensor:
    """What its module does on every call: casts, a transposed copy of the weight, the fold, the launch.

    x [M, K] and weight [N, K] in float32; vectors: bias, mean, variance, gamma, beta, [N].
    """
    bias, mean, variance, gamma, beta = vectors
    scale = gamma * torch.rsqrt(variance + eps)
    shift = beta - mean * scale
    return fused(kernel, x.half(), weight.half().t().contiguous(), (bias, scale, shift))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--arch", type=int, required=True, help="to compile for, such as 89")
    parser.add_argument("--run-on", type=int, required=True, help="to assemble for, such as 90")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for facts, image in compile_images(arguments.program, arguments.arch, arguments.run_on):
        arguments.out.joinpath(f"{file_name(facts)}.json").write_text(json.dumps(asdict(facts), indent=1) + "\n")
        arguments.out.joinpath(f"{file_name(facts)}.cubin").write_bytes(image)
        print(facts.label)


if __name__ == "__main__":
    main()
