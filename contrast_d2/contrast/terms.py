"""The terms of a contrastive loss, and the one place where all of them are computed.

A method returns `Term`s; `evaluate` turns them into losses and statistics. For anchor i with
positives P(i), of its class, and negatives N(i), of others, with s = z.z / temperature,

    l(i, j) = -log( e^s_ij / (e^s_ij + sum_{n in N(i)} e^s_in) ) = softplus( n_i - s_ij )
    n_i     = logsumexp_{n in N(i)} s_in
    L       = mean_i mean_{j in P(i)} l(i, j)

Only the one positive stands in each denominator, unlike in SupCon. The softplus form never leaves
the range of fp32, at any temperature.

Shape letters: A anchors, C contrast samples, D embedding width, K classes, R anchors of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .kernels.grouped import grouped_info_nce, is_available
from .kernels.masked import PairSelector, masked_info_nce
from .kernels.sorted import is_exact, sorted_info_nce
from .sets import (
    ClassSums,
    KernelResult,
    PixelDraw,
    PixelSet,
    at_least_fp32,
    class_sums,
    gathered_set,
    joined_sets,
    mean_similarities,
    on_device,
    refuse_second_derivative,
    world_size,
)

Role = Literal["both", "positives", "negatives"]


class Side(NamedTuple):
    """A part of a contrast set, and what its samples may be: positives, negatives, or both."""

    set: PixelSet
    role: Role = "both"


class Term(NamedTuple):
    """The InfoNCE of anchors against a contrast set.

    Attributes:
        name: of the loss and its statistics.
        anchors: (A, D).
        contrast: parts of the contrast set. Where the first part is `anchors` itself, no anchor is
            its own positive.
        temperature: divides the similarities.
        weight: of the term in the loss.
        pairs: chooses which positives and negatives of each anchor count; None for all.
        count_empty: average over all anchors, of which those without a positive give 0, and not
            only over those with one.
    """

    name: str
    anchors: PixelSet
    contrast: Sequence[Side]
    temperature: float
    weight: float = 1.0
    pairs: PairSelector | None = None
    count_empty: bool = False

    @property
    def holds_anchors(self) -> bool:
        """Whether the anchors are the first rows of the contrast set."""
        return self.contrast[0].set is self.anchors


class PairSample(NamedTuple):
    """Some of the pairs of a term, for an observer.

    Attributes:
        cosines: (R, S) similarities.
        positive, negative: (R, S) bool, which pairs count as what.
        anchor_labels: (R,) classes.
        contrast_labels: (S,) classes.
    """

    cosines: Tensor
    positive: Tensor
    negative: Tensor
    anchor_labels: Tensor
    contrast_labels: Tensor


class OwnTerm(NamedTuple):
    """A term with a loss function of its own.

    Attributes:
        name: of the loss and its statistics.
        share: 0-dim, this process's share of the loss: those of all processes add up to it.
        weight: of the term in the loss.
        statistics: 0-dim tensors by name.
        draws: what was drawn from the feature map of that name, by what for; for an observer.
        pairs: at most so many pairs, for an observer.
        anchor_pixels: (K,) number of pixels whose mean is the anchor of each class; None where
            anchors are no such means.
    """

    name: str
    share: Tensor
    weight: float
    statistics: Mapping[str, Tensor]
    draws: Callable[[], Mapping[str, PixelDraw]]
    pairs: Callable[[int], PairSample]
    anchor_pixels: Tensor | None = None


class Observer(Protocol):
    """Looks at terms as they are evaluated."""

    def see_term(self, term: Term, contrast: Sequence[Side]) -> None:
        """A term with its contrast set, which is that of all processes."""

    def see_own_term(self, term: OwnTerm) -> None:
        """A term with a loss of its own."""


class ContrastOutput(NamedTuple):
    """Result of a contrast method's forward.

    Attributes:
        losses: 0-dim fp32 tensors by name, `loss_contrast_<term>`, weights included: their sum
            joins the segmentation loss.
        statistics: 0-dim detached tensors by name, `contrast/<term>/<quantity>`, for logging only.
            They are computed when they are first looked at.
    """

    losses: dict[str, Tensor]
    statistics: Mapping[str, Tensor]


class Statistics(Mapping[str, Tensor]):
    """Statistics that cost nothing until someone looks at them.

    Args:
        compute: returns them by name; is called once at most.
    """

    def __init__(self, compute: Callable[[], Mapping[str, Tensor]]) -> None:
        self._compute: Callable[[], Mapping[str, Tensor]] | None = compute
        self._found: Mapping[str, Tensor] = {}

    def _values(self) -> Mapping[str, Tensor]:
        if self._compute is not None:
            self._found, self._compute = self._compute(), None
        return self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, Tensor]]]:
        return dict, (dict(self._values()),)  # what a copied or pickled model holds


def evaluate(
    terms: Sequence[Term | OwnTerm],
    num_classes: int,
    *,
    across_processes: bool = False,
    observer: Observer | None = None,
) -> ContrastOutput:
    """Computes all terms of a step, and what there is to say about them.

    Args:
        terms: with names of their own.
        num_classes: K.
        across_processes: pixels are contrasted with those of all processes, and means run over all
            of them: loss and gradients are those of one process with the global batch. Every
            process has to make the call, with the same terms.
        observer: is shown every term.

    Returns:
        Losses, and per term the statistics `anchors`, `classes`, `positive_similarity` and
        `negative_similarity` over all pairs of the sets, `negatives` where they are a set of their
        own, and `hard_share` of the anchors where it is known; or those of an `OwnTerm`.
    """
    processes = world_size() if across_processes else 1
    own = [term for term in terms if isinstance(term, Term)]
    sides = _sides_of_all(own) if processes > 1 else [term.contrast for term in own]
    losses = _losses(own, sides, processes)
    ready: dict[str, dict[str, Tensor]] = {}
    for term in terms:
        if isinstance(term, OwnTerm):
            losses[term.name] = term.weight * processes * term.share
            ready[term.name] = {name: value.detach() for name, value in term.statistics.items()}
    if observer is not None:
        for term, contrast in zip(own, sides, strict=True):
            observer.see_term(term, contrast)
        for term in terms:
            if isinstance(term, OwnTerm):
                observer.see_own_term(term)
    names = [term.name for term in terms]
    sets = _detached(own, sides)

    def statistics() -> dict[str, Tensor]:
        found = {**ready, **_statistics(*sets, num_classes)}
        return {f"contrast/{n}/{quantity}": x for n in names for quantity, x in found[n].items()}

    return ContrastOutput({loss_name(name): losses[name] for name in names}, Statistics(statistics))


def loss_name(term: str) -> str:
    """The name of a term's loss."""
    return f"loss_contrast_{term.replace('/', '_')}"


def info_nce(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    anchors_lead_contrast: bool = False,
    count_empty_anchors: bool = False,
    pairs: PairSelector | None = None,
) -> Tensor:
    """Supervised InfoNCE of anchors against a contrast set, exact and in linear memory.

    Everything is computed block by block of the similarity matrix, so neither an A x C matrix nor a
    graph over one is ever held. Gradients reach both sets. The result cannot be differentiated
    twice. Similarities are fp32 (fp64 for fp64 input), whatever autocast says; but see `grouped`
    for GPUs.

    Args:
        anchors: (A, D) unit vectors. Much longer ones leave the range of fp32, and the loss is then
            not finite.
        labels: (A,) integer classes. A negative label is padding: no anchor.
        contrast: (C, D) unit vectors; None contrasts the anchors among themselves, each without
            itself.
        contrast_labels: (C,) integer classes, required with `contrast`. A sample with a negative
            label, such as an empty slot of a memory bank, is neither positive nor negative.
        temperature: divides the similarities; above 0.
        anchors_lead_contrast: the first A contrast samples are the anchors, in their order: an
            anchor is then not its own positive.
        count_empty_anchors: average over all anchors, of which those without a positive give 0, and
            not only over those with one.
        pairs: chooses which positives and negatives of each anchor count; None for all of them.
            An anchor whose positives are all left out counts as one without a positive.

    Returns:
        The loss, 0-dim fp32 (or fp64). It is 0, still connected to the graph, where no anchor has a
        positive or no anchor has a negative.

    Raises:
        ValueError: shapes, temperature, or a missing argument.

    Reference: Pissas et al., ECCV 2022, equations (1), (2) and, with another scale's anchors as
        contrast set, (4); Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic
        Segmentation", ICCV 2021, equation (3).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0.")
    _check_set("anchors", anchors, labels)
    if contrast is not None and contrast_labels is not None:
        _check_set("contrast", contrast, contrast_labels)
        if anchors.shape[1] != contrast.shape[1]:
            raise ValueError(
                f"anchors are {anchors.shape[1]} wide and contrast samples {contrast.shape[1]}: "
                "both must come from projectors of the same embed_dim."
            )
        if anchors_lead_contrast and len(contrast) < len(anchors):
            raise ValueError(
                f"anchors_lead_contrast: {len(contrast)} contrast samples cannot begin with "
                f"{len(anchors)} anchors."
            )
        everything = PixelSet(contrast, contrast_labels)
    elif contrast is not None or contrast_labels is not None or anchors_lead_contrast:
        raise ValueError("contrast, contrast_labels and anchors_lead_contrast go together.")
    else:
        everything = None
    own = PixelSet(anchors, labels)
    everything = everything or own
    lead = own if anchors_lead_contrast else everything
    term = Term("", own, [Side(lead)], temperature, pairs=pairs)
    ((total, valid),) = _sums_of_losses([term], [[Side(everything)]])
    count = (labels >= 0).sum() if count_empty_anchors else valid
    return (total / count.clamp(min=1)).to(at_least_fp32(anchors).dtype)


def _check_set(name: str, embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected (N, D) embeddings with (N,) labels, got "
            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}."
        )


def _sides_of_all(terms: Sequence[Term]) -> list[Sequence[Side]]:
    """The contrast sets with the pixels of all processes, each gathered once."""
    gathered: dict[int, PixelSet] = {}
    for side in [side for term in terms for side in term.contrast]:
        # What is not drawn, such as a memory, is the same on all processes.
        if side.set.draw is not None and id(side.set) not in gathered:
            gathered[id(side.set)] = gathered_set(side.set)
    return [
        [side._replace(set=gathered.get(id(side.set), side.set)) for side in term.contrast]
        for term in terms
    ]


def _losses(
    terms: Sequence[Term], sides: Sequence[Sequence[Side]], processes: int
) -> dict[str, Tensor]:
    """The weighted losses by term, in a few operations for all.

    Those of all processes add up to the loss times their number, by which DistributedDataParallel
    divides the gradients, and the trainer the losses that it logs.
    """
    if not terms:
        return {}
    totals, valid = zip(*_sums_of_losses(terms, sides), strict=True)
    counts = [
        ((term.anchors.labels >= 0).sum() if term.count_empty else number).float()
        for term, number in zip(terms, valid, strict=True)
    ]
    counts = torch.stack(counts)
    if processes > 1:
        dist.all_reduce(counts)
    means = torch.stack(totals) / counts.clamp(min=1)
    weights = torch.from_numpy(np.array([term.weight * processes for term in terms]))
    losses = means * on_device(weights.to(means.dtype), means.device)
    return {
        term.name: loss.to(at_least_fp32(term.anchors.embeddings).dtype)
        for term, loss in zip(terms, losses.unbind(), strict=True)
    }


def _sums_of_losses(
    terms: Sequence[Term], sides: Sequence[Sequence[Side]]
) -> list[tuple[Tensor, Tensor]]:
    """Per term the sum over its anchors of the mean loss over their positives, and their number."""
    together = {
        number: part
        for number, (term, part) in enumerate(zip(terms, sides, strict=True))
        if term.pairs is None and is_available(term.anchors.embeddings, term.temperature)
    }
    sums = grouped_info_nce([terms[number] for number in together], list(together.values()))
    found = dict(zip(together, sums, strict=True))
    return [
        found[number] if number in found else _info_nce(term, part)
        for number, (term, part) in enumerate(zip(terms, sides, strict=True))
    ]


def _info_nce(term: Term, sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """As `_sums_of_losses`, of one term."""
    contrast, pairs = joined_sets([side.set for side in sides]), term.pairs
    if any(side.role != "both" for side in sides):
        pairs = _by_role(sides)
    elif contrast is term.anchors:
        contrast = None
    return _sum_of_losses(term.anchors, contrast, term.temperature, term.holds_anchors, pairs)


def _by_role(sides: Sequence[Side]) -> PairSelector:
    """Counts samples in their roles only."""
    device = sides[0].set.labels.device

    def serves_as(role: Role) -> Tensor:
        parts = [(len(side.set.labels), side.role in ("both", role)) for side in sides]
        return torch.cat([torch.full((n,), serves, device=device) for n, serves in parts])

    positives, negatives = serves_as("positives"), serves_as("negatives")

    def select(similarities: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        return positive & positives, negative & negatives

    return select


def _sum_of_losses(
    anchors: PixelSet,
    contrast: PixelSet | None,
    temperature: float,
    holds_anchors: bool,
    pairs: PairSelector | None,
) -> tuple[Tensor, Tensor]:
    """As `_info_nce`, by the kernel for such sets; None contrasts the anchors with each other.

    On the CPU one that sorts by class; and plain PyTorch for all else: fp64 on CUDA, GPUs without
    Triton, temperatures below about 0.03, chosen pairs.
    """
    rows, samples = at_least_fp32(anchors.embeddings), anchors if contrast is None else contrast
    kernel: Callable[..., KernelResult] = masked_info_nce
    if pairs is not None:
        kernel = partial(masked_info_nce, pairs=pairs)
    elif rows.device.type == "cpu" and is_exact(temperature, len(samples.labels)):
        kernel = sorted_info_nce

    def run(rows: Tensor, columns: Tensor | None, needs_gradient: tuple[bool, bool]):
        return kernel(
            anchors._replace(embeddings=rows),
            None if contrast is None else contrast._replace(embeddings=columns),
            temperature=temperature,
            holds_anchors=holds_anchors,
            needs_gradient=needs_gradient,
        )

    with torch.autocast(rows.device.type, enabled=False):
        columns = None if contrast is None else contrast.embeddings.to(rows.dtype)
        return _InfoNCE.apply(rows, columns, run)


class _InfoNCE(Function):
    """Computes the sum of the losses and, where asked for, its gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx, anchors: Tensor, contrast: Tensor | None, kernel: Callable[..., KernelResult]
    ) -> tuple[Tensor, Tensor]:
        result = kernel(anchors, contrast, (ctx.needs_input_grad[0], ctx.needs_input_grad[1]))
        ctx.save_for_backward(result.d_anchors, result.d_contrast)
        ctx.mark_non_differentiable(result.num_valid)
        return result.total, result.num_valid

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative("info_nce")
        d_anchors, d_contrast = (
            None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors
        )
        return d_anchors, d_contrast, None


def _detached(
    terms: Sequence[Term], sides: Sequence[Sequence[Side]]
) -> tuple[list[Term], list[list[Side]]]:
    """The same terms without a graph, which statistics would keep alive."""
    known: dict[int, PixelSet] = {}

    def detached(x: PixelSet) -> PixelSet:
        if id(x) not in known:
            known[id(x)] = x._replace(embeddings=x.embeddings.detach())
        return known[id(x)]

    def all_of(part: Sequence[Side]) -> list[Side]:
        return [side._replace(set=detached(side.set)) for side in part]

    found = [x._replace(anchors=detached(x.anchors), contrast=all_of(x.contrast)) for x in terms]
    return found, [all_of(part) for part in sides]


@torch.no_grad()
def _statistics(
    terms: Sequence[Term], sides: Sequence[Sequence[Side]], num_classes: int
) -> dict[str, dict[str, Tensor]]:
    """Statistics by term, in few operations for all: sums of each set once, then of all terms."""
    if not terms:
        return {}
    cache: dict[int, ClassSums] = {}

    def sums(sets: Sequence[PixelSet]) -> ClassSums:
        for x in sets:
            if id(x) not in cache:
                cache[id(x)] = class_sums(at_least_fp32(x.embeddings), x.labels, num_classes)
        first, *others = [cache[id(x)] for x in sets]
        for other in others:
            first = ClassSums(*(a + b for a, b in zip(first, other, strict=True)))
        return first

    def stacked(parts: Sequence[ClassSums]) -> ClassSums:
        return ClassSums(*(torch.stack(values) for values in zip(*parts, strict=True)))

    def with_role(role: Role) -> ClassSums:
        return stacked([sums([s.set for s in part if s.role in ("both", role)]) for part in sides])

    anchors = stacked([sums([term.anchors]) for term in terms])
    positives = with_role("positives")
    roles = any(side.role != "both" for part in sides for side in part)
    negatives = with_role("negatives") if roles else positives
    numbers = anchors.counts.sum(dim=1)
    zero = numbers.new_zeros(())
    holds = [term.holds_anchors for term in terms]
    own = [
        torch.stack([x if held else zero for x, held in zip(values, holds, strict=True)])
        for values in (anchors.squares, numbers)
    ]
    positive, negative = mean_similarities(anchors, positives, *own)
    if roles:
        negative = mean_similarities(anchors, negatives)[1]
    quantities = {
        "anchors": numbers,
        "classes": (anchors.counts > 0).sum(dim=1).to(numbers.dtype),
        "positive_similarity": positive,
        "negative_similarity": negative,
    }
    found = {
        term.name: {quantity: values[number] for quantity, values in quantities.items()}
        for number, term in enumerate(terms)
    }
    for number, (term, part) in enumerate(zip(terms, sides, strict=True)):
        if any(side.role == "negatives" for side in part):
            found[term.name]["negatives"] = negatives.counts[number].sum()
        if term.anchors.draw is not None and term.anchors.draw.wrong is not None:
            found[term.name]["hard_share"] = term.anchors.draw.wrong.float().mean()
    return found
