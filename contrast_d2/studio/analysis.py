"""What a segmentation network costs, part by part, and what is left of it at test time.

Shape letters: K classes, H W an image, N queries, M keys, D their width, C that of values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.nn import functional as F

from ..contrast import MultiScaleProjector
from ..segmentor import ContrastiveSegmentor, inference_state_dict, is_training_only
from ..structures import SegOutput, decode

_ATTENTION = "aten::scaled_dot_product_attention"


class PartCost(NamedTuple):
    """What one part of a network costs for one image.

    Attributes:
        parameters: how many numbers it learns.
        flops: floating-point operations as fvcore counts them: a multiply-add once, those of
            convolutions, linear layers, matrix products, norms and resizes.
        activations: elements of the outputs of convolutions, linear layers and matrix products.
    """

    parameters: int
    flops: int
    activations: int


class ModelCost(NamedTuple):
    """What a segmentor costs for one image.

    Attributes:
        inference: by part what runs at test time: `backbone`, `decoder`, and `other`, which
            normalises, pads and resizes.
        training_only: by part what does not: `auxiliary head` and `contrast`, where the segmentor
            has them. Of the contrast method, the parameters are all, and the other two numbers are
            those of projecting whole maps: the rest depends on the labels.
        uncounted: how often operations occur at test time that `flops` leaves out.
    """

    inference: dict[str, PartCost]
    training_only: dict[str, PartCost]
    uncounted: dict[str, int]


class InferenceGraph(NamedTuple):
    """A segmentor in evaluation as a list of operations.

    Attributes:
        operations: each with its arguments, in the order of the graph; weights by name.
        state: names of the parameters and buffers that they read.
    """

    operations: tuple[str, ...]
    state: frozenset[str]


def capture_inference(segmentor: ContrastiveSegmentor, size: Sequence[int]) -> InferenceGraph:
    """Captures what a segmentor does with one image in evaluation.

    Args:
        segmentor: on the CPU; it is put into evaluation mode.
        size: height and width of the image.
    """
    with torch.no_grad():
        program = torch.export.export(_OneImage(segmentor), (_image(size),))
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.users]
    return InferenceGraph(
        operations=tuple(n.format_node() for n in program.graph.nodes if n.op != "placeholder"),
        state=frozenset(
            named[node.name].removeprefix("segmentor.") for node in inputs if node.name in named
        ),
    )


def inference_differences(
    method: ContrastiveSegmentor, baseline: ContrastiveSegmentor, size: Sequence[int]
) -> list[str]:
    """What a segmentor does otherwise at test time than the same one built without contrast.

    Compares the weights that are left, the operations of both graphs, their floating-point
    operations, and the scores for a random image bit for bit.

    Args:
        method: with a contrast method. Both are put into evaluation mode.
        baseline: built with `contrast=None`; takes over the weights of `method`.
        size: height and width of the image.

    Returns:
        A line for each difference; none where both are the same.
    """
    state = inference_state_dict(method)
    unfit = sorted(set(state) ^ set(baseline.state_dict()))
    if unfit:
        return [f"weights differ: {len(unfit)} are in one of the two only, such as {unfit[0]}"]
    baseline.load_state_dict(state)
    found = []
    graphs = [capture_inference(model, size) for model in (method, baseline)]
    leaked = sorted(name for name in graphs[0].state if is_training_only(name))
    if leaked:
        found.append(f"the contrast method runs: the graph reads {leaked[0]}")
    if graphs[0] != graphs[1]:
        numbers = [len(graph.operations) for graph in graphs]
        found.append(f"graphs differ: {numbers[0]} operations with contrast, {numbers[1]} without")
    image = _image(size)
    flops = [int(_counters(_OneImage(m), image)[0].total()) for m in (method, baseline)]
    if flops[0] != flops[1]:
        found.append(f"FLOPs differ: {flops[0]} with contrast, {flops[1]} without")
    with torch.no_grad():
        scores = [_OneImage(model)(image) for model in (method, baseline)]
    if not torch.equal(*scores):
        largest = (scores[0] - scores[1]).abs().max().item()
        found.append(f"scores differ by up to {largest:.1e}")
    return found


def analyze(segmentor: ContrastiveSegmentor, size: Sequence[int]) -> ModelCost:
    """Counts parameters, floating-point operations and activations of a segmentor.

    Args:
        segmentor: on the CPU; it is put into evaluation mode.
        size: height and width of one image.
    """
    graph = capture_inference(segmentor, size)
    inference, uncounted = _count_inference(segmentor, size)
    unread = [
        (name, parameter)
        for name, parameter in segmentor.named_parameters()
        if name.startswith("sem_seg_head.") and name not in graph.state
    ]
    auxiliary = sum(p.numel() for _, p in unread)
    decoder = inference["decoder"]
    inference["decoder"] = decoder._replace(parameters=decoder.parameters - auxiliary)
    training = _TrainingParts(segmentor, {id(p) for _, p in unread})
    flops, activations = _counters(training, _image(size)[None])
    training_only = {}
    if unread:
        training_only["auxiliary head"] = PartCost(
            auxiliary,
            _of(flops, "sem_seg_head") - decoder.flops,
            _of(activations, "sem_seg_head") - decoder.activations,
        )
    if segmentor.contrast is not None:
        training_only["contrast"] = PartCost(
            _parameters(segmentor.contrast),
            _of(flops, "projectors"),
            _of(activations, "projectors"),
        )
    segmentor.eval()
    return ModelCost(inference, training_only, uncounted)


def _count_inference(
    segmentor: ContrastiveSegmentor, size: Sequence[int]
) -> tuple[dict[str, PartCost], dict[str, int]]:
    """By part what runs at test time, with all parameters of the part; and what is not counted."""
    flops, activations = _counters(_OneImage(_with_called_head(segmentor)), _image(size))
    parts = {
        name: PartCost(
            _parameters(module),
            _of(flops, f"segmentor.{key}"),
            _of(activations, f"segmentor.{key}"),
        )
        for name, key, module in (
            ("backbone", "backbone", segmentor.backbone),
            ("decoder", "sem_seg_head", segmentor.sem_seg_head),
        )
    }
    parts["other"] = PartCost(
        0,
        int(flops.total()) - sum(part.flops for part in parts.values()),
        int(activations.total()) - sum(part.activations for part in parts.values()),
    )
    return parts, dict(flops.unsupported_ops())


def attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of fused attention, which fvcore does not know, as a handle for it.

    Queries (..., N, D) are multiplied with keys (..., M, D), and what that gives with values
    (..., M, C).

    Args:
        inputs, outputs: of the operation, as the tracer has them.
    """
    query, key, value = (get_shape(x) for x in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


class _OneImage(nn.Module):
    """A segmentor in evaluation from a tensor to a tensor: image (3, H, W), scores (K, H, W)."""

    def __init__(self, segmentor: ContrastiveSegmentor) -> None:
        super().__init__()
        self.segmentor = segmentor.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.segmentor([{"image": image}])[0]["sem_seg"]


class _Called(nn.Module):
    """A head whose `decode` is the call of a module, to which fvcore counts all that is in it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        return self(features)

    def forward(self, features: Mapping[str, Tensor]) -> SegOutput:
        return decode(self.head, features)


def _with_called_head(segmentor: ContrastiveSegmentor) -> ContrastiveSegmentor:
    shallow = copy.copy(segmentor)
    shallow._modules = {**segmentor._modules, "sem_seg_head": _Called(segmentor.sem_seg_head)}
    return shallow


class _TrainingParts(nn.Module):
    """The network with its auxiliary head and projectors, without labels and losses.

    All but the auxiliary head stay in evaluation mode: norms count alike in both, and one image is
    too few for some of them in training.
    """

    def __init__(self, segmentor: ContrastiveSegmentor, auxiliary: set[int]) -> None:
        super().__init__()
        segmentor.eval()
        self.backbone, self.sem_seg_head = segmentor.backbone, _Called(segmentor.sem_seg_head)
        self._divisibility = segmentor._size_divisibility
        for module in self.sem_seg_head.modules():
            parameters = list(module.parameters())
            if parameters and all(id(p) in auxiliary for p in parameters):
                module.train()
        self.projectors = _Projectors(segmentor.contrast)

    def forward(self, images: Tensor) -> list[Tensor]:
        bottom, right = (-side % self._divisibility for side in images.shape[-2:])
        features = self.backbone(F.pad(images, (0, right, 0, bottom)))
        output = self.sem_seg_head(features)
        aux_logits = [] if output.aux_logits is None else [output.aux_logits]
        return [
            output.logits,
            *aux_logits,
            *self.projectors({**features, **output.features}),
        ]


class _Projectors(nn.Module):
    """The heads of a contrast method, each once where several methods share it."""

    def __init__(self, contrast: nn.Module | None) -> None:
        super().__init__()
        modules = [] if contrast is None else contrast.modules()
        projectors = [m for m in modules if isinstance(m, MultiScaleProjector)]
        heads = {head: name for p in projectors for name, head in p.heads.items()}
        self.heads = nn.ModuleList(heads)
        self._features = list(heads.values())

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        pairs = zip(self._features, self.heads, strict=True)
        return [head(features[name]) for name, head in pairs]


def _counters(module: nn.Module, inputs: Tensor) -> tuple[JitModelAnalysis, JitModelAnalysis]:
    """fvcore's counters, which know nothing of fused attention, with it."""
    flops = FlopCountAnalysis(module, inputs).set_op_handle(_ATTENTION, attention_flops)
    activations = ActivationCountAnalysis(module, inputs)
    activations.set_op_handle(_ATTENTION, _output_elements)
    for counter in (flops, activations):
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
    return flops, activations


def _of(counter: JitModelAnalysis, module: str) -> int:
    return int(counter.by_module()[module])


def _output_elements(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return prod(get_shape(outputs[0]))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _image(size: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(3, *size, generator=generator)
