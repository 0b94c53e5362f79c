"""Maps of a network in evaluation, by the names of backbone, decoder and projectors."""

from __future__ import annotations

import pytest
import torch

from contrast_d2.contrast import ContrastSum
from contrast_d2.studio.embeddings import LayerTap, projection_heads

from ...tiny import tiny_contrast, tiny_segmentor

IMAGE = {"image": torch.randint(0, 256, (3, 45, 70), generator=torch.Generator().manual_seed(0))}


def test_every_kind_of_layer() -> None:
    model = tiny_segmentor(tiny_contrast()).eval()
    images = model.preprocess_image([IMAGE])
    maps = model.backbone(images)
    output = model.sem_seg_head.decode(maps)
    expected = {
        "res3": maps["res3"],
        "pre_logits": output.features["pre_logits"],
        "contrast/res2": model.contrast.projector.heads["res2"](maps["res2"]),
    }
    for layer, features in expected.items():
        found = LayerTap(model, layer)(IMAGE)
        torch.testing.assert_close(found.features, features[0].detach())
        torch.testing.assert_close(found.logits, output.logits[0].detach())
        # Filled up to a multiple of 8.
        assert found.padded_size == (48, 72)


def test_projectors_of_a_sum_of_methods_carry_its_name() -> None:
    model = tiny_segmentor(ContrastSum({"near": tiny_contrast(), "far": tiny_contrast()})).eval()
    heads = projection_heads(model)
    assert set(heads) == {f"contrast/{m}/{f}" for m in ("near", "far") for f in ("res2", "res3")}
    assert LayerTap(model, "contrast/far/res2")(IMAGE).features.shape[1:] == (12, 18)
    assert projection_heads(tiny_segmentor()) == {}


def test_a_layer_that_there_is_not() -> None:
    model = tiny_segmentor(tiny_contrast()).eval()
    with pytest.raises(ValueError, match="no layer 'res9': the model has res2, res3.*pre_logits"):
        LayerTap(model, "res9")(IMAGE)
    with pytest.raises(ValueError, match="has contrast/res2, contrast/res3"):
        LayerTap(model, "contrast/res4")
    with pytest.raises(ValueError, match="has none of its kind"):
        LayerTap(tiny_segmentor().eval(), "contrast/res2")
    with pytest.raises(ValueError, match="training mode"):
        LayerTap(model.train(), "res2")
