"""The centre regulariser against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from contrast_d2.contrast import CentreRegulariser, MultiScaleProjector, info_nce

K, WIDTH, CHANNELS = 4, 6, 3


def build(**options) -> CentreRegulariser:
    torch.manual_seed(0)
    projector = MultiScaleProjector({"x": CHANNELS}, WIDTH, num_hidden=0)
    return CentreRegulariser(projector, K, feature="x", **options).double()


def random_batch(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = {"x": torch.randn(2, CHANNELS, 5, 6, generator=generator).double()}
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, 5, 6), generator=generator)]
    labels[1] = torch.where(labels[1] == 2, 0, labels[1])  # class 2 is in one image
    return features, labels


def loss_of(method: CentreRegulariser, batch: tuple) -> Tensor:
    return method(*batch).losses["loss_contrast_x"]


def means_of(method: CentreRegulariser, batch: tuple) -> dict[int, Tensor]:
    rows = normalize(method.projector(batch[0])["x"], dim=1).movedim(1, 3)
    found = {c: rows[batch[1] == c] for c in range(K)}
    return {c: normalize(x.sum(dim=0), dim=0) for c, x in found.items() if len(x)}


def test_losses_gradients_and_the_prior_are_those_of_loops() -> None:
    method = build(weight=0.3, scale=5.0)
    images = [1.0] * K
    for seed in range(3):
        batch = random_batch(seed)
        means, losses = means_of(method, batch), []
        for c, mean in means.items():
            scores = [
                5 * torch.dot(mean, corner) + torch.tensor(n / sum(images)).double().log()
                for corner, n in zip(method.corners, images, strict=True)
            ]
            losses.append(torch.stack(scores).logsumexp(dim=0) - scores[c])
        expected = 0.3 * sum(losses) / len(losses)
        loss, parameters = loss_of(method, batch), list(method.parameters())
        torch.testing.assert_close(
            [loss, *torch.autograd.grad(loss, parameters)],
            [expected, *torch.autograd.grad(expected, parameters)],
        )
        for c in range(K):
            images[c] += sum(bool((image == c).any()) for image in batch[1])
        assert method.images.tolist() == images
    assert images[3] == 1 < images[2] < images[0]


def test_without_a_prior_it_is_the_engines_infonce() -> None:
    method, batch = build(weight=1.0), random_batch()
    means = means_of(method, batch)
    expected = info_nce(
        torch.stack(list(means.values())),
        torch.tensor(list(means)),
        method.corners,
        torch.arange(K),
        temperature=1 / 5,
    )
    torch.testing.assert_close(loss_of(method, batch), expected)


def test_area_does_not_matter() -> None:
    features, labels = random_batch()
    twice = {"x": torch.cat([features["x"], features["x"]], dim=3)}
    again = torch.cat([labels, torch.where(labels == 1, 1, 255)], dim=2)
    torch.testing.assert_close(
        loss_of(build(), (twice, again)), loss_of(build(), (features, labels))
    )


def test_a_rare_class_has_to_win_by_more() -> None:
    method, batch = build(), random_batch()
    plain = loss_of(method, (batch[0], torch.where(batch[1] == 2, 2, 255)))
    method.images[2] = 0.01
    assert loss_of(method, (batch[0], torch.where(batch[1] == 2, 2, 255))) > plain


def test_no_class_gives_0_and_one_does_not() -> None:
    features, labels = random_batch()
    assert loss_of(build(), (features, torch.full_like(labels, 255))) == 0
    assert loss_of(build(), (features, torch.zeros_like(labels))) > 0


def test_wrong_arguments_are_named() -> None:
    for options, message in (({"weight": 0}, "weight=0"), ({"scale": -1}, "scale=-1")):
        with pytest.raises(ValueError, match=message):
            build(**options)
