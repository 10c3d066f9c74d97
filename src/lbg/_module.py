"""LinearBatchNormGELUReLU: the operator behind the parameters and checkpoints of the four PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lbg._ops import fold, fused, vector_jacobian

LINE_BYTES = 128  # of L2


class LinearBatchNormGELUReLU(nn.Module):
    """relu(gelu(batch_norm(linear(x)))): `nn.Linear`, `nn.BatchNorm1d`, exact GELU, ReLU.

    In eval mode on CUDA it is one kernel launch; in training mode and on the CPU it is the PyTorch modules. The weight
    in 16 bits (a copy of its own where it is made of another dtype, or in_features is no multiple of 8) and the folded
    BatchNorm are kept, and made anew when a parameter or a running statistic has changed (by an optimizer step,
    load_state_dict, .to(), any in-place operation). Writes through `tensor.data` alone leave no trace that PyTorch
    shows: call `refold` after them.

    state_dict keys: gemm.weight, gemm.bias, batch_norm.weight, .bias, .running_mean, .running_var,
    .num_batches_tracked.

    Args:
        in_features: K.
        out_features: N.
        compute_dtype: what a float32 x and the weight are rounded to on CUDA, float16 or bfloat16. A 16-bit x is
            multiplied in its own dtype.
        fp16_accumulate: as for `lbg.fused`.
        device, dtype: where and in what the parameters are made, as for `nn.Linear`.

    Shape:
        x [M, in_features] to [M, out_features], in x's dtype on CUDA.

    Raises:
        ValueError: compute_dtype is neither float16 nor bfloat16; from forward, x is not 2-D.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        compute_dtype: torch.dtype = torch.float16,
        fp16_accumulate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if compute_dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"compute_dtype must be float16 or bfloat16; got {compute_dtype}")
        self.gemm = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.batch_norm = nn.BatchNorm1d(out_features, device=device, dtype=dtype)
        self.compute_dtype = compute_dtype
        self.fp16_accumulate = fp16_accumulate
        self._folded: _Folded | None = None

    @classmethod
    def from_modules(
        cls,
        linear: nn.Linear,
        batch_norm: nn.BatchNorm1d,
        *,
        compute_dtype: torch.dtype = torch.float16,
        fp16_accumulate: bool = False,
    ) -> LinearBatchNormGELUReLU:
        """The module over two existing ones, which it shares; its training mode is batch_norm's.

        Raises:
            ValueError: the feature counts differ, or batch_norm keeps no running statistics to fold.
        """
        if linear.out_features != batch_norm.num_features:
            raise ValueError(
                f"linear gives {linear.out_features} features and batch_norm takes {batch_norm.num_features}"
            )
        if batch_norm.running_mean is None or batch_norm.running_var is None:
            raise ValueError("batch_norm has no running statistics (track_running_stats=False), so it cannot be folded")
        module = cls(1, 1, compute_dtype=compute_dtype, fp16_accumulate=fp16_accumulate, device="meta")
        module.gemm, module.batch_norm = linear, batch_norm
        module.training = batch_norm.training
        return module

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"x must have 2 dimensions, [M, {self.gemm.in_features}]; got shape {list(x.shape)}")
        if self.training or self.batch_norm.training or not x.is_cuda:
            return self._forward_modules(x)
        if torch.is_grad_enabled():
            parameters = self._sources()
            if x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in parameters):
                result: Tensor = _Differentiable.apply(self, x, *parameters)  # type: ignore[no-untyped-call]
                return result
        return self._forward_fused(x)

    def refold(self) -> None:
        """Forgets the kept weight and fold: for changes made through `tensor.data`, which nothing else shows."""
        self._folded = None

    def _forward_modules(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.gelu(self.batch_norm(self.gemm(x))))

    def _forward_fused(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else self.compute_dtype
        folded = self._folded
        if folded is None or not folded.holds(self, dtype):
            folded = _Folded(self, dtype)
            # What is computed under capture exists only when the graph is replayed.
            if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
                self._folded = folded
        return fused(x, folded.weight, folded.scale, folded.shift, fp16_accumulate=self.fp16_accumulate)

    def _sources(self) -> tuple[Tensor | None, ...]:
        """What the fold is made of: linear weight and bias, then BatchNorm's gamma, beta, mean and variance."""
        norm = self.batch_norm
        return self.gemm.weight, self.gemm.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}  # copies and pickles fold for themselves


def _identity(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Equal for a tensor only while it has the same memory, dtype and contents; None if there is no telling."""
    if tensor is None:
        return ()
    if tensor.is_inference():
        return None  # counts no versions
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device


def _watched(module: LinearBatchNormGELUReLU) -> tuple[Tensor | None, ...]:
    """What shows that a fold is out of date: its sources, and the count of batches.

    A forward in training mode updates the running statistics inside an operator that counts no version for them.
    """
    return *module._sources(), module.batch_norm.num_batches_tracked


class _Folded:
    """Weight, scale and shift for the operator, and what they were made from."""

    def __init__(self, module: LinearBatchNormGELUReLU, dtype: torch.dtype) -> None:
        self._watched = _watched(module)
        self._identities = tuple(map(_identity, self._watched))
        # Aliases, so that no later tensor can be given the memory of one of these: `.half()` then `.float()` might.
        self._memory = [None if tensor is None else tensor.detach() for tensor in self._watched]
        self._dtype, self._eps = dtype, module.batch_norm.eps
        weight, bias, gamma, beta, mean, var = module._sources()
        if weight is None or mean is None or var is None:
            raise ValueError("batch_norm has no running statistics (track_running_stats=False), so it cannot be folded")
        with torch.no_grad():
            self.weight = _on_lines(weight.to(dtype))
            self.scale, self.shift = fold(bias, mean, var, gamma, beta, self._eps)

    def holds(self, module: LinearBatchNormGELUReLU, dtype: torch.dtype) -> bool:
        if dtype != self._dtype or module.batch_norm.eps != self._eps:
            return False
        return all(
            now is then and identity is not None and _identity(now) == identity
            for now, then, identity in zip(_watched(module), self._watched, self._identities)
        )


def _on_lines(weight: Tensor) -> Tensor:
    """A 16-bit weight itself, if its rows start on 16 bytes; else a copy whose rows start on LINE_BYTES, so that the
    kernels for rows that start anywhere have those of x alone to shift."""
    if weight.shape[1] % 8 == 0:
        return weight.contiguous()
    elements = LINE_BYTES // weight.element_size()
    rows = weight.new_zeros(weight.shape[0], -(-weight.shape[1] // elements) * elements)
    view = rows[:, : weight.shape[1]]
    view.copy_(weight)
    return view


class _Differentiable(torch.autograd.Function):
    """The fused forward, with the derivative of the PyTorch modules in eval mode."""

    @staticmethod
    def forward(ctx: Any, module: LinearBatchNormGELUReLU, x: Tensor, *sources: Tensor | None) -> Tensor:
        ctx.eps = module.batch_norm.eps
        ctx.save_for_backward(x, *sources)
        return module._forward_fused(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def modules(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            gamma: Tensor | None,
            beta: Tensor | None,
            mean: Tensor,
            var: Tensor,
        ) -> Tensor:
            product = nn.functional.linear(x.to(weight.dtype), weight, bias)
            normed = nn.functional.batch_norm(product, mean, var, gamma, beta, training=False, eps=ctx.eps)
            return torch.relu(nn.functional.gelu(normed)).to(grad.dtype)

        function: Callable[..., Tensor] = modules
        return None, *vector_jacobian(function, ctx.saved_tensors, ctx.needs_input_grad[1:], grad)
