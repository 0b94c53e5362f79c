"""How far rounding takes an InfoNCE from its exact value, from the arithmetic: no BLAS decides it.

With unit roundoff u, temperature T and width D, to first order in u:

- A similarity of unit vectors is a sum of D products. In whatever order it is summed, its error is
  about sqrt(D) u and at most D u; Higham and Mary, "A New Approach to Probabilistic Rounding Error
  Analysis", SIAM Journal on Scientific Computing, 2019. A logit is 1 / T times that, and the few
  operations on it, which is 1 / T at most, cost u / T each: it is off by d = (sqrt(D) + 4) u / T.
- n_i - s_ij is off by 2 d. So is, relative to its value, softplus(n_i - s_ij), since the slope of
  the softplus is no larger than its value.
- A weight in the gradient is a sigmoid(n_i - s_ij) times an exp(s_ik - n_i), each of which is off
  by 2 d of its value.

Sums over samples add a few u, without 1 / T. All these errors would have to point the same way for
the bound to be met: kernels and plain PyTorch were seen to stay below a fifth of it, whichever BLAS
they used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounding(width: int, temperature: float, dtype: torch.dtype = torch.float32) -> float:
    """Largest error of loss and gradient that rounding explains, relative to the largest element.

    Args:
        width: D.
        temperature: T.
        dtype: in which the loss is computed.
    """
    return 4 * (math.sqrt(width) + 4) * torch.finfo(dtype).eps / 2 / temperature


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference of an element, relative to the largest element; 0 where both are 0."""
    difference = (found.double() - exact).abs().max()
    return (difference / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)).item()
