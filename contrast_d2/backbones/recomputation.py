"""Activation checkpointing: blocks keep their input only, and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_SEQUENCES = (nn.Sequential, nn.ModuleList)


def recompute_blocks(model: nn.Module) -> int:
    """Lets each block of a network recompute its activations, instead of keeping them.

    A block is what a network repeats in sequence: a residual or a transformer block. Outputs,
    gradients and running statistics are those of the network without it; a training step takes
    about one more forward pass of the blocks. Names of weights stay as they are.

    Args:
        model: changed in place.

    Returns:
        The number of blocks; 0 where the network has none, and nothing is changed.

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4.
    """
    blocks = _blocks(model)
    for block in blocks:
        # A partial, and no closure: a deep copy of the model calls its own block.
        block.forward = partial(_forward, block)
    return len(blocks)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost members of sequences that are made of parts."""
    members = [
        child
        for module in model.modules()
        if isinstance(module, _SEQUENCES)
        for child in module.children()
        if not isinstance(child, (*_SEQUENCES, _BatchNorm))
        and next(child.children(), None) is not None
        and next(child.parameters(), None) is not None
    ]
    known = set(members)
    return [m for m in members if not any(p in known for p in m.modules() if p is not m)]


def _forward(block: nn.Module, *args: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args)
    # The re-entrant kind gives no gradients to a block behind frozen ones.
    run = partial(checkpoint, forward, *args, use_reentrant=False)
    if torch.compiler.is_compiling():
        return run()  # compiled, only values are computed again and buffers are written once
    return run(context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _without_running_statistics(block)


@contextmanager
def _without_running_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps a second run on the same batch from moving the running statistics a second time.

    It moves copies of them: what is saved for the gradient must not differ between the two runs,
    and would, without running statistics.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    own = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
