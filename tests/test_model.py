"""The model and its loss: shapes, formulas, known numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

import cvae_mnist
from cvae_mnist import CVAE, negative_elbo


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize("shape", [(5, 784), (5, 1, 28, 28)])
def test_shapes_and_ranges(num_classes, shape):
    model = CVAE(h_dim=40, z_dim=7, num_classes=num_classes)
    x, c = torch.rand(shape), torch.eye(10, num_classes)[:5]
    mu, log_var = model.encode(x, c)
    assert mu.shape == log_var.shape == model.reparameterize(mu, log_var).shape == (5, 7)
    recon, mu, log_var = model(x, c)
    assert recon.shape == (5, 784) and mu.shape == log_var.shape == (5, 7)
    assert recon.min() >= 0 and recon.max() <= 1
    assert torch.equal(model.decode(mu, c), torch.sigmoid(model.decode_logits(mu, c)))


def test_flat_and_square_images_are_the_same():
    model, x, c = CVAE(), torch.rand(3, 1, 28, 28), torch.eye(10)[:3]
    assert torch.equal(model.encode(x, c)[0], model.encode(x.view(3, 784), c)[0])


def test_layers_are_the_tutorials():
    sizes = {"fc1": (794, 600), "fc2": (600, 50), "fc3": (600, 50), "fc4": (60, 600), "fc5": (600, 784)}
    expected = {f"{name}.weight": (o, i) for name, (i, o) in sizes.items()}
    expected |= {f"{name}.bias": (o,) for name, (i, o) in sizes.items()}
    assert {name: tuple(value.shape) for name, value in CVAE().state_dict().items()} == expected
    plain = CVAE(784, 400, 20, num_classes=0).state_dict()
    assert plain["fc1.weight"].shape == (400, 784) and plain["fc4.weight"].shape == (400, 20)


def test_the_label_reaches_encoder_and_decoder():
    model, x, z = CVAE(), torch.rand(1, 784), torch.randn(1, 50)
    three, four = torch.eye(10)[3:4], torch.eye(10)[4:5]
    assert not torch.equal(model.encode(x, three)[0], model.encode(x, four)[0])
    assert not torch.equal(model.decode(z, three), model.decode(z, four))


def test_reparameterize_has_the_right_mean_and_deviation():
    model = CVAE(h_dim=8, z_dim=2, num_classes=0)
    mu, log_var = torch.tensor([[1.5, -2.0]]), torch.tensor([[0.0, 2.0]])
    z = model.reparameterize(mu.expand(200_000, 2), log_var.expand(200_000, 2))
    assert torch.allclose(z.mean(0), mu[0], atol=0.03)
    assert torch.allclose(z.std(0), torch.exp(log_var[0] / 2), atol=0.03)


def test_reparameterize_passes_the_gradient_on():
    model, mu, log_var = CVAE(z_dim=4), torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    z = model.reparameterize(mu, log_var)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
    assert torch.allclose(log_var.grad, (z - mu).detach() / 2, atol=1e-5)  # d/dv exp(v/2) noise = exp(v/2) noise / 2


@pytest.mark.parametrize("num_classes", [10, 0])
def test_loss_is_the_negative_elbo(num_classes):
    model, x, c = CVAE(num_classes=num_classes), torch.rand(9, 784).round(), torch.eye(10, num_classes)[:9]
    torch.manual_seed(1)
    reconstruction, kl = negative_elbo(model, x, c)
    torch.manual_seed(1)  # the same noise again
    recon, mu, log_var = model(x, c)
    assert torch.allclose(reconstruction, -Bernoulli(recon).log_prob(x).sum(), rtol=1e-5)
    assert torch.allclose(reconstruction, F.binary_cross_entropy(recon, x, reduction="sum"), rtol=1e-5)
    expected = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum()
    assert torch.allclose(kl, expected, rtol=1e-4) and kl > 0


def test_average_loss_counts_every_image_once():
    model, codes = CVAE(h_dim=8, z_dim=2, num_classes=0), torch.eye(10, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # now every image costs 784 ln 2 nats, and the code nothing
    images, labels = torch.randint(256, (2345, 784), dtype=torch.uint8), torch.zeros(2345, dtype=torch.long)
    assert cvae_mnist.average_loss(model, images, labels, codes) == pytest.approx(784 * 0.693147, rel=1e-5)


BFLOAT16, NOTHING = {"avx512_bf16": True}, {}  # what a processor can do


@pytest.fixture
def processor(monkeypatch):
    """processor(BFLOAT16) pretends that this machine's processor can do that, and no more."""
    return lambda able: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)


def products(device="cpu"):
    with cvae_mnist.half_products(torch.device(device)):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_products_are_halved_where_the_processor_can(processor, monkeypatch):
    processor(BFLOAT16)
    assert products() == torch.bfloat16 and products("cuda") == torch.float32
    processor(NOTHING)
    assert products() == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert products() == torch.float32


def test_half_products_leave_the_loss_as_it_was(processor):
    model, x, c = CVAE(), torch.rand(100, 784), torch.eye(10).repeat(10, 1)
    losses = []
    for able in (BFLOAT16, NOTHING):
        processor(able)
        torch.manual_seed(1)
        with cvae_mnist.half_products(torch.device("cpu")):
            losses.append(negative_elbo(model, x, c))
    for half, full in zip(*losses, strict=True):
        assert half.dtype == torch.float32 and not torch.equal(half, full)
        assert torch.allclose(half, full, rtol=1e-3)


def test_training_and_testing_use_half_products_and_end_in_the_same_place(processor, tmp_path, small, digits):
    images, labels = digits[1]
    training, testing = [], []
    for name, able in {"half": BFLOAT16, "full": NOTHING}.items():
        processor(able)
        cvae_mnist.train_cvae(out_dir=tmp_path / name, **small)
        checkpoint, model = cvae_mnist.load_checkpoint(tmp_path / name)
        moments = [state["exp_avg"] for state in checkpoint["optimizer_state_dict"]["state"].values()]
        assert {value.dtype for value in [*model.parameters(), *moments]} == {torch.float32}
        training.append(checkpoint["history"]["train_loss"][-1])
        _, same = cvae_mnist.load_checkpoint(tmp_path / "half")
        torch.manual_seed(1)
        testing.append(cvae_mnist.average_loss(same, images.flatten(1), labels, torch.eye(10)))
    assert training[0] != training[1] and training[0] == pytest.approx(training[1], rel=0.01)
    assert testing[0] != testing[1] and testing[0] == pytest.approx(testing[1], rel=1e-3)
