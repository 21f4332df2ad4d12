"""Part 1: the model, its loss, one epoch of training, new digits."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ACCELERATOR
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import cvae_mnist
from cvae_mnist import CVAE, evaluate, generate, negative_elbo, train_epoch, update_average


class TutorialCVAE(nn.Module):
    """The model as tutorials write it, with the same layers; num_classes=0: a plain VAE."""

    def __init__(self, h_dim, z_dim, num_classes=10):
        super().__init__()
        self.fc1 = nn.Linear(784 + num_classes, h_dim)
        self.fc2 = nn.Linear(h_dim, z_dim)
        self.fc3 = nn.Linear(h_dim, z_dim)
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)
        self.fc5 = nn.Linear(h_dim, 784)

    def encode(self, x, c):
        h = torch.relu(self.fc1(torch.cat((x, c), 1)))
        return self.fc2(h), self.fc3(h)

    def decode(self, z, c):
        return torch.sigmoid(self.fc5(torch.relu(self.fc4(torch.cat((z, c), 1)))))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_the_model_is_the_tutorials(num_classes):
    model, tutorial = CVAE(784, 40, 7, num_classes), TutorialCVAE(40, 7, num_classes)
    model.load_state_dict(tutorial.state_dict())  # an error unless names and shapes are the same
    x, z, c = torch.rand(5, 784), torch.randn(5, 7), model.one_hot(torch.arange(5))
    for mine, theirs in zip(model.encode(x.view(5, 1, 28, 28), c), tutorial.encode(x, c), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert torch.allclose(model.decode(z, c), tutorial.decode(z, c), atol=1e-6)
    recon, mu, log_var = model(x, c)
    assert recon.shape == (5, 784) and mu.shape == log_var.shape == (5, 7)


def test_weights_start_small_and_biases_at_zero():
    for layer in CVAE().children():
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_one_hot_takes_labels_of_any_integer_type(kind):
    c = CVAE(h_dim=4, z_dim=2).one_hot(torch.tensor([3, 0, 9], dtype=kind))
    assert torch.equal(c, F.one_hot(torch.tensor([3, 0, 9]), 10).float())


def test_one_hot_has_as_many_columns_as_the_model_has_classes():
    assert CVAE(num_classes=26).one_hot(torch.tensor([25])).argmax() == 25
    assert CVAE(num_classes=0).one_hot(torch.tensor([3, 4])).shape == (2, 0)


@pytest.mark.parametrize("labels", [[10], [-1], [6.5], [6.0], np.array([255], np.uint8)], ids=str)
def test_a_label_that_is_none_is_an_error(labels):
    with pytest.raises((RuntimeError, TypeError)):
        generate(CVAE(h_dim=4, z_dim=2), torch.zeros(1, 2), labels)


def test_reparameterize_samples_the_distribution_and_passes_the_gradient():
    model = CVAE(h_dim=8, z_dim=2)
    mu = torch.tensor([[1.5, -2.0]]).repeat(200_000, 1).requires_grad_()
    log_var = torch.tensor([[0.0, 2.0]]).repeat(200_000, 1).requires_grad_()
    z = model.reparameterize(mu, log_var)
    assert torch.allclose(z.mean(0), mu[0], atol=0.03) and torch.allclose(z.std(0), torch.exp(log_var[0] / 2), atol=0.03)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu)) and torch.allclose(log_var.grad, (z - mu) / 2, atol=1e-4)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_the_loss_is_the_negative_elbo_of_each_image(num_classes):
    model, x = CVAE(784, 40, 7, num_classes), torch.rand(9, 784).round()
    nn.init.normal_(model.fc2.bias), nn.init.normal_(model.fc3.bias)  # far from the prior
    c = model.one_hot(torch.arange(9))
    torch.manual_seed(1)
    reconstruction, kl = negative_elbo(model, x, c)
    torch.manual_seed(1)  # the same noise again
    recon, mu, log_var = model(x, c)
    assert torch.allclose(reconstruction, -Bernoulli(recon).log_prob(x).sum(1), rtol=1e-5)
    assert torch.allclose(kl, kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum(1), rtol=1e-4)
    nn.init.constant_(model.fc5.bias, 500.0)  # a decoder that is sure, and wrong: finite
    assert negative_elbo(model, torch.zeros(9, 784), c)[0].mean().item() == pytest.approx(784 * 500, rel=0.01)


def numbered(count):
    """Images that say in their first two pixels which they are, and labels that fit."""
    images = torch.zeros(count, 784, dtype=torch.uint8)
    images[:, 0], images[:, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return images, torch.arange(count) % 10


def test_an_epoch_takes_every_image_once_with_its_label_in_random_order(monkeypatch):
    seen = []

    def loss(model, x, c):
        seen.append((x, c))
        return model.fc5.bias.sum() + 0 * x[:, 0], 2 * model.fc4.bias.sum() + x[:, 0]

    monkeypatch.setattr(cvae_mnist, "negative_elbo", loss)
    model, (images, labels) = CVAE(h_dim=4, z_dim=2), numbered(1050)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = list(train_epoch(model, optimizer, images, labels, 100))
    assert [len(x) for x, _ in seen] == [100] * 10 + [50]
    x, c = torch.cat([x for x, _ in seen]), torch.cat([c for _, c in seen])
    order = (x[:, 0] * 255 + 256 * 255 * x[:, 1]).round().long()
    assert torch.equal(order.sort().values, torch.arange(1050)) and not torch.equal(order, torch.arange(1050))
    assert torch.equal(c.argmax(1), order % 10) and x.max() == 1  # 255 became 1
    # Each step follows the gradient of both terms' mean, and of no batch before.
    assert torch.allclose(model.fc5.bias, torch.tensor(-11.0)) and torch.allclose(model.fc4.bias, torch.tensor(-22.0))
    assert losses[1].item() == pytest.approx(-784 - 16 + seen[1][0][:, 0].mean().item(), rel=1e-4)
    assert not losses[1].requires_grad


def test_drawing_is_in_eval_mode_and_training_in_train_mode(digits):
    modes = []

    class Mine(CVAE):
        def decode_logits(self, z, c):
            modes.append(self.training)
            return super().decode_logits(z, c)

    model, (images, labels) = Mine(h_dim=8, z_dim=2), digits[1]
    for _ in train_epoch(model, torch.optim.Adam(model.parameters()), images, labels, 100):
        generate(model, torch.zeros(1, 2), [0])
        evaluate(model, images[:1], labels[:1])
    assert modes == [True, False, False] * 2


def test_the_average_is_of_about_the_last_tenth_of_the_steps():
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for step in range(0, 10_001, 10):  # weights and statistics are the number of the step
        for value in (*model.parameters(), model.running_mean, model.running_var):
            nn.init.constant_(value, step)
        update_average(average, model, step)
    for value in (*average.parameters(), average.running_mean, average.running_var):
        assert 9000 < value.min() == value.max() < 9200  # the last twentieth would be 9500


def test_evaluation_counts_every_image_once():
    model = CVAE(h_dim=8, z_dim=2)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    nn.init.constant_(model.fc5.bias, 2.0)  # a white pixel costs log(1 + e^-2)
    nn.init.constant_(model.fc2.bias, 3.0)  # KL of N(3, 1): 9 / 2 for each of two dimensions
    images = torch.full((2345, 784), 255, dtype=torch.uint8)
    images[-1] = 0  # a black one costs 2 more, in the last and shorter part
    reconstruction, kl = evaluate(model, images, torch.zeros(2345, dtype=torch.long))
    assert reconstruction == pytest.approx(784 * (math.log(1 + math.exp(-2)) + 2 / 2345), rel=1e-5)
    assert kl == pytest.approx(9)


def test_evaluation_samples_z_and_uses_the_labels(digits):
    model = CVAE(h_dim=64, z_dim=8)
    nn.init.normal_(model.fc4.weight)
    one, other = evaluate(model, *digits[1]), evaluate(model, *digits[1])
    assert one[0] != other[0] and one[1] == other[1]  # KL has no noise
    assert evaluate(model, digits[1][0], digits[1][1].flip(0))[1] != one[1]


def test_generate_decodes_with_the_labels(device):
    model, z = CVAE(), 10 * torch.randn(10, 50)
    expected = copy.deepcopy(model).decode(z, torch.eye(10)).detach()
    for labels in (range(10), torch.arange(10, dtype=torch.uint8), np.arange(10)):
        images = generate(model.to(device), z, labels)
        assert images.shape == (10, 1, 28, 28) and not images.requires_grad and images.device.type == "cpu"
        assert torch.allclose(images.view(10, 784), expected, atol=1e-4)


def test_products_are_in_bfloat16_where_the_processor_can(monkeypatch, digits):
    def train(able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
        torch.manual_seed(1)
        model = CVAE(h_dim=64, z_dim=8)
        with cvae_mnist.mixed_precision(torch.device("cpu")):
            kind = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            assert {value.dtype for value in model.encode(torch.ones(1, 784), torch.eye(10)[:1])} == {torch.float32}
        loss = sum(train_epoch(model, torch.optim.Adam(model.parameters()), *digits[0], 100)) / 6
        return kind, loss.item(), evaluate(model, *digits[1])

    half, full = train(True), train(False)
    assert half[0] == torch.bfloat16 and full[0] == torch.float32
    assert half[1] != full[1] and half[1] == pytest.approx(full[1], rel=0.01)
    assert half[2] != full[2] and half[2] == pytest.approx(full[2], rel=0.1)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    with cvae_mnist.mixed_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.skipif(ACCELERATOR is not None, reason="the accelerator itself is used")
def test_no_two_devices_meet_on_a_gpu():
    """Simulates CUDA: tensors that hold no values raise an error where two devices meet."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, average = CVAE(h_dim=8, z_dim=2), CVAE(h_dim=8, z_dim=2)
            images, labels = torch.zeros(9, 784, dtype=torch.uint8), torch.zeros(9, dtype=torch.long)
        terms = negative_elbo(model, images / 255, model.one_hot(labels))
        assert {term.device.type for term in terms} == {"cuda"}
        update_average(average, model, 0)
        assert generate(model, torch.zeros(9, 2), [3] * 9).device.type == "cpu"
        with pytest.raises(fake.DataDependentOutputException):  # where the numbers are read
            evaluate(model, images, labels)
