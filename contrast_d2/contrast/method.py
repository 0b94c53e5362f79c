"""What all contrast methods have in common: from feature maps and labels to terms, and to losses.

Shape letters: B images, C feature channels, K classes, H W the labels' size, h w a feature map,
h' w' the class scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .projector import MultiScaleProjector
from .sampling import Batch, Sampler
from .sets import PixelSet, draws_on_device
from .terms import ContrastOutput, OwnTerm, Statistics, Term, evaluate, loss_name

# What padding and unlabelled pixels have in the labels of most data sets.
IGNORE_LABEL = 255


class ContrastMethod(nn.Module):
    """A loss on embeddings, for training only. A method of your own overrides `terms`.

    Args:
        projector: heads for feature maps; those of maps that are not named in `features` go.
        num_classes: K.
        features: names of the feature maps that the method contrasts.
        names: of the terms that `terms` returns.
        needs_dense_embeddings: the method reads embeddings of whole maps.
        warmup_iters: steps without contrast, in which `terms` is not called.
        across_processes: contrast over the global batch: loss and gradients are those of one
            process that has all images. Otherwise each process contrasts its own.

    Attributes:
        memory: what `remember` stores into; None for methods without.
        inspection: an `Inspection` that each step fills with what it drew and how similar that is;
            None, as at first, for nothing of the kind.

    Raises:
        ValueError: an argument out of its range, or a map without projector.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        *,
        features: Sequence[str],
        names: Sequence[str],
        needs_dense_embeddings: bool = False,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: needs at least 1.")
        if warmup_iters < 0:
            raise ValueError(f"warmup_iters={warmup_iters}: needs 0 (none) or more.")
        if needs_dense_embeddings and projector.projection != "dense":
            raise ValueError(
                f"projection={projector.projection!r}: this {type(self).__name__} reads embeddings "
                "of whole maps. Set projection='dense'."
            )
        projector.keep(features)
        self.projector = projector
        self.num_classes = num_classes
        self.names = tuple(names)
        self.warmup_iters = warmup_iters
        self.across_processes = across_processes
        self.memory: Any = None
        self.inspection: Any = None
        # A buffer, so that a resumed run goes on where it was. The host keeps a copy, which it
        # reads off the device only once, after construction or loading.
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self._host_passes: int | None = None
        self.register_load_state_dict_post_hook(_forget_host_copy)

    def terms(self, batch: Batch) -> list[Term | OwnTerm]:
        """What to contrast in this step: one term for each of the method's names.

        Args:
            batch: with the maps of the projector, see `sample`.
        """
        raise NotImplementedError

    def remember(self, batch: Batch) -> None:
        """Called when the terms are computed, in steps without contrast too."""

    def forward(
        self,
        features: Mapping[str, Tensor],
        labels: Tensor,
        logits: Tensor | None = None,
        *,
        ignore_label: int = IGNORE_LABEL,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """Computes the contrast terms of one step.

        Args:
            features: feature maps (B, C, h, w) by name; those without a head are ignored.
            labels: (B, H, W) integer classes at full resolution, best on the host: draws are made
                there, and it waits for labels that are on a GPU.
            logits: (B, K, h', w') class scores of the segmentation head, at any resolution; for
                methods that look at predictions. They receive no gradient.
            ignore_label: label of pixels that do not count; negative ones do not count either.
            generator: source of random numbers, on the host; None for the default one.

        Returns:
            Losses by name, with their weights, and statistics by name.

        Raises:
            ValueError: input that is not as described, or a missing map.
        """
        check_input(features, self.projector.heads, labels, logits, self.num_classes)
        logits = None if logits is None else logits.detach()
        maps = self.projector(features)
        batch = Batch(maps, labels, logits, generator, self.across_processes)
        return compute({"": self}, {"": 1.0}, {"": maps}, batch, ignore_label, self.inspection)  # pyright: ignore[reportCallIssue]

    def sample(
        self, batch: Batch, features: Sequence[str], *samplers: Sampler | None
    ) -> list[dict[str, PixelSet]]:
        """Draws pixels from maps and embeds them, with one gather for all of them.

        Args:
            batch: of this step.
            features: names of maps.
            samplers: of which each draws from all maps; None draws nothing.

        Returns:
            For each sampler, its sets by name of the map.
        """
        drawn = [(i, x.draw(batch, features)) for i, x in enumerate(samplers) if x is not None]
        moved = draws_on_device([draw for _, draws in drawn for draw in draws], batch.device)
        # By map, and there by sampler.
        by_feature = {f: moved[i :: len(features)] for i, f in enumerate(features)}
        rows = self.projector.embed(batch.maps, by_feature)
        sets: list[dict[str, PixelSet]] = [{} for _ in samplers]
        for feature, draws in by_feature.items():
            parts: Sequence[Tensor] = [rows[feature]]
            if len(draws) > 1:
                parts = rows[feature].split([len(draw.labels) for draw in draws])
            for part, (i, _), draw in zip(parts, drawn, draws, strict=True):
                sets[i][feature] = PixelSet(part, draw.labels, draw.class_counts, feature, draw)
        return sets

    def count_step(self) -> bool:
        """Counts a step, and says whether it goes without contrast."""
        if self.warmup_iters == 0:
            return False
        if self._host_passes is None:
            self._host_passes = int(self.passes)
        warming_up = self._host_passes < self.warmup_iters
        if warming_up:
            self._host_passes += 1
            self.passes += 1
        return warming_up


def _forget_host_copy(method: ContrastMethod, _incompatible: object) -> None:
    method._host_passes = None


# How many pixels are drawn is known at run time only: a compiled step has one graph up to here.
@torch.compiler.disable
def compute(
    methods: Mapping[str, ContrastMethod],
    weights: Mapping[str, float],
    maps: Mapping[str, Mapping[str, Tensor]],
    batch: Batch,
    ignore_label: int,
    inspection: Any,
) -> ContrastOutput:
    """One step of several methods, whose terms are computed together.

    Args:
        methods: by what the names of their terms begin with.
        weights: of the methods.
        maps: of each method, as its projector returned them.
        batch: of the step, with the maps of all methods.
        ignore_label: as in `ContrastMethod.forward`.
        inspection: to fill, or None.
    """
    num_classes = next(iter(methods.values())).num_classes
    feature = next(iter(batch.maps))
    check_labels(batch.host_labels(feature), num_classes, ignore_label)
    if 0 <= ignore_label < num_classes:  # what is no class is ignored everywhere
        labels = batch.labels.int().masked_fill(batch.labels == ignore_label, num_classes)
        batch = Batch(batch.maps, labels, batch.logits, batch.generator, batch.across_processes)
    batches = {prefix: batch.with_maps(maps[prefix]) for prefix in methods}
    if inspection is not None:
        inspection.begin(batch)
    terms: list[Term | OwnTerm] = []
    losses: dict[str, Tensor] = {}
    labels = batch.host_labels(feature)
    ignored = 1 - float(((labels >= 0) & (labels < num_classes)).float().mean())
    ready = {"contrast/ignored_share": torch.full((), ignored, device=batch.device)}
    for prefix, method in methods.items():
        if method.memory is not None:
            ready[f"contrast/{prefix}bank_fill"] = method.memory.fill_fraction()
            if inspection is not None:
                inspection.see_memory(prefix, method.memory)
        if method.count_step():
            zero = connected_zero([*maps[prefix].values(), *method.parameters()])
            losses.update({loss_name(prefix + name): zero for name in method.names})
            continue
        found = method.terms(batches[prefix])
        assert [term.name for term in found] == list(method.names), "other terms than declared"
        terms += [
            term._replace(name=prefix + term.name, weight=weights[prefix] * term.weight)
            for term in found
        ]
    output = evaluate(
        terms, num_classes, across_processes=batch.across_processes, observer=inspection
    )
    for prefix, method in methods.items():
        method.remember(batches[prefix])
    statistics = Statistics(lambda: {**ready, **output.statistics})
    return ContrastOutput({**losses, **output.losses}, statistics)


def check_above_zero(**values: float) -> None:
    """Raises ValueError where one of the named values is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value}: must be above 0.")


def connected_zero(tensors: Iterable[Tensor]) -> Tensor:
    """A 0 on the graph of the given tensors, whatever their values: all get a gradient of zeros.

    In distributed training every process has to use every parameter in every step.
    """
    return torch.stack([x.flatten()[:0].float().sum() for x in tensors]).sum()


def check_input(
    features: Mapping[str, Tensor],
    names: Iterable[str],
    labels: Tensor,
    logits: Tensor | None,
    num_classes: int,
) -> None:
    """Raises ValueError where the named features, labels and class scores do not go together."""
    if not isinstance(features, Mapping):
        raise ValueError(
            f"features: a {type(features).__name__}; needs a dict of feature maps by name, such as "
            '{"res2": ..., "res5": ...}.'
        )
    if labels.is_floating_point() or labels.dim() != 3:
        raise ValueError(
            f"labels: a {tuple(labels.shape)} tensor of {labels.dtype}; needs (B, H, W) integer "
            "classes. One-hot labels become that by argmax(dim=1)."
        )
    # Others may be anything; that one is missing is told by the projector.
    tensors = {f"features[{name!r}]": features[name] for name in names if name in features}
    if logits is not None:
        tensors["logits"] = logits
        if logits.dim() == 4 and logits.shape[1] != num_classes:
            raise ValueError(
                f"logits of {logits.shape[1]} classes with num_classes={num_classes}: set it to "
                "that of the segmentation head."
            )
    height, width = labels.shape[-2:]
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(
                f"{name}: a {tuple(x.shape)} tensor; needs (B, C, h, w). Tokens (B, N, C) become "
                "that by transpose(1, 2).unflatten(2, (h, w))."
            )
        if len(x) != len(labels):
            raise ValueError(f"{name} has {len(x)} images, and labels have {len(labels)}.")
        h, w = x.shape[-2:]
        # Maps may be rounded up to whole pixels, at each of five halvings.
        if abs(height * w - width * h) >= 2 * max(height, width):
            raise ValueError(
                f"{name} is {h}x{w} and the labels are {height}x{width}: they must show the same "
                "image, so give both the same padding and aspect ratio."
            )


def check_labels(label_map: Tensor, num_classes: int, ignore_label: int) -> None:
    """Raises ValueError where a map on the host has labels >= K other than the ignore label."""
    values = label_map.numpy()
    unknown = values[(values >= num_classes) & (values != ignore_label)]
    if unknown.size:
        raise ValueError(
            f"labels hold {unknown[0]} with num_classes={num_classes} and "
            f"ignore_label={ignore_label}: map the labels to 0..{num_classes - 1}, or set both."
        )
