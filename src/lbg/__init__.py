"""relu(gelu(batch_norm(linear(x)))) at inference in one kernel launch, compiled ahead of time.

`fused` is the operator (also `torch.ops.lbg.fused`), `fold` prepares its scale and shift, and
`LinearBatchNormGELUReLU` is the module that does both. `configs` and `explain` tell what is shipped and what would run.
"""

from lbg._inspect import Candidate, Config, Explanation, configs, explain, override, warmup
from lbg._module import LinearBatchNormGELUReLU
from lbg._ops import fold, fused
from lbg._ops import version as __version__

__all__ = [
    "Candidate",
    "Config",
    "Explanation",
    "LinearBatchNormGELUReLU",
    "__version__",
    "configs",
    "explain",
    "fold",
    "fused",
    "override",
    "warmup",
]
