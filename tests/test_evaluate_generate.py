import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eqm_dist import rng
from eqm_dist.core.corruption import corrupt
from eqm_dist.core.guidance import blind_to_time
from eqm_dist.core.ode import Euler
from eqm_dist.core.samplers import GradientDescent, NesterovGradientDescent
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod
from eqm_dist.evaluate.generate import Generated, generate
from eqm_dist.evaluate.labels import balanced_labels
from eqm_dist.models import SiT
from eqm_dist.models.autoencoder import IdentityAutoencoder

SHAPE = (1, 8, 8)


def pull_to_label(x: Tensor, labels: Tensor) -> Tensor:
    """A field whose only rest point is the constant image of the label's value."""
    return labels.to(x.dtype)[:, None, None, None] / 10 - x


def run(
    field,
    indices: Tensor,
    *,
    batch: int = 4,
    seed: int = 3,
    nfe: int = 5,
    stop: GradientNormStop | None = None,
    **options,
) -> Generated:
    return generate(
        blind_to_time(field),
        indices=indices,
        labels=balanced_labels(indices, 10),
        latent_shape=SHAPE,
        method=SamplingMethod(GradientDescent(0.1), nfe, stop),
        seed=seed,
        decode=IdentityAutoencoder().decode,
        batch=batch,
        **options,
    )


@given(start=st.integers(0, 2**40), count=st.integers(1, 60), num_classes=st.integers(1, 20))
def test_any_range_of_indices_is_balanced(start, count, num_classes):
    labels = balanced_labels(torch.arange(start, start + count), num_classes)
    counts = torch.bincount(labels, minlength=num_classes)
    assert counts.sum() == count
    assert counts.max() - counts.min() <= 1


def test_images_are_the_descent_from_the_noise_of_their_index():
    indices = torch.tensor([5, 0, 123456789012])
    generated = run(pull_to_label, indices)
    start = rng.normal(3, rng.Stream.START_NOISE, indices, SHAPE)
    goal = (indices % 10).view(3, 1, 1, 1) / 10
    closed_form = goal + (1 - 0.1) ** 5 * (start - goal)
    assert torch.equal(generated.images, IdentityAutoencoder().decode(closed_form))
    assert generated.nfe.tolist() == [5, 5, 5]


@given(batch=st.integers(1, 12), workers=st.integers(1, 4), seed=st.integers(0, 2**63))
def test_batch_and_workers_change_nothing(batch, workers, seed):
    indices = torch.arange(10)
    whole = run(pull_to_label, indices, batch=10, seed=seed)
    shares = [run(pull_to_label, indices[worker::workers], batch=batch, seed=seed) for worker in range(workers)]
    for worker, share in enumerate(shares):
        assert torch.equal(share.images, whole.images[worker::workers])


def test_seeds_and_indices_differ():
    images = run(pull_to_label, torch.tensor([0, 10])).images  # one label, two indices
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images, run(pull_to_label, torch.tensor([0, 10]), seed=4).images)


def trained_looking_model() -> SiT:
    model = SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the zero layers of a fresh model would hide the network
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_network_gives_the_same_images_in_any_batch(batch):
    model, indices = trained_looking_model(), torch.arange(13)
    difference = run(model, indices, batch=batch).images.int() - run(model, indices, batch=13).images.int()
    # float32 sums in another order may move a value over the edge between two grey levels, hardly ever
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.01


def test_no_indices_give_no_images():
    generated = run(trained_looking_model(), torch.arange(0))
    assert generated.images.shape == (0, 8, 8, 1)
    assert generated.images.dtype == torch.uint8
    assert generated.nfe.shape == (0,)


def test_no_graph_is_kept():
    model = trained_looking_model()
    seen = []

    def watched(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(model(x, labels))
        return seen[-1]

    generate(
        blind_to_time(watched),
        indices=torch.arange(2),
        labels=torch.tensor([0, 1]),
        latent_shape=SHAPE,
        method=SamplingMethod(NesterovGradientDescent(0.01, 0.3), 3),
        seed=0,
        decode=IdentityAutoencoder().decode,
        batch=2,
    )
    assert len(seen) == 3
    assert not any(field.requires_grad for field in seen)


@given(batch=st.integers(1, 12), workers=st.integers(1, 3))
def test_adaptive_compute_changes_no_image_with_batch_or_workers(batch, workers):
    def field(x: Tensor, labels: Tensor) -> Tensor:
        return pull_to_label(x, labels) * (1 + labels[:, None, None, None] % 4)

    indices, options = torch.arange(11), {"nfe": 60, "stop": GradientNormStop(ratio=0.1)}
    whole = run(field, indices, batch=11, **options)
    assert whole.nfe.unique().numel() > 2
    assert whole.complete.all()
    for worker in range(workers):
        share = run(field, indices[worker::workers], batch=batch, **options)
        assert torch.equal(share.images, whole.images[worker::workers])
        assert torch.equal(share.nfe, whole.nfe[worker::workers])


def test_starts_may_be_partly_noised_latents_and_the_field_may_know_time():
    latents = torch.tensor([-0.9, -0.3, 0.1, 0.5, 0.8]).view(5, 1, 1, 1).expand(5, *SHAPE)
    noise = torch.full_like(latents, 0.3)
    generated = generate(
        lambda x, labels, time: (latents[labels] - x) / (1 - time).view(-1, 1, 1, 1),  # straight to the datum
        indices=torch.tensor([7, 3, 9, 1, 0]),
        labels=torch.arange(5),
        latent_shape=SHAPE,
        method=SamplingMethod(Euler(), 8),
        seed=0,
        decode=IdentityAutoencoder().decode,
        batch=2,
        start=lambda rows: corrupt(latents[rows], noise[rows], torch.full((len(rows),), 0.6)),
        start_time=0.6,
    )
    assert torch.equal(generated.images, IdentityAutoencoder().decode(latents))


def test_samples_that_are_not_finite_are_told_and_blank():
    def field(x: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels[:, None, None, None] == 1, float("inf"), pull_to_label(x, labels))

    generated = run(field, torch.arange(4))
    assert generated.finite.tolist() == [True, False, True, True]
    assert torch.equal(generated.images[1], IdentityAutoencoder().decode(torch.zeros(1, *SHAPE))[0])
    assert torch.equal(generated.images[2], run(pull_to_label, torch.arange(4)).images[2])
