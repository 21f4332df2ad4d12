"""Part 1 and what it needs: the model, its loss, an epoch, new digits, the average, evaluation."""

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import cvae_mnist
from cvae_mnist import CVAE, evaluate, generate, negative_elbo, train_epoch, update_average


class TutorialCVAE(nn.Module):
    def __init__(self, h_dim, z_dim, num_classes=10):
        super().__init__()
        self.fc1 = nn.Linear(784 + num_classes, h_dim)
        self.fc2 = nn.Linear(h_dim, z_dim)
        self.fc3 = nn.Linear(h_dim, z_dim)
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)
        self.fc5 = nn.Linear(h_dim, 784)

    def forward(self, x, c):
        h = torch.relu(self.fc1(torch.cat((x, c), 1)))
        mu, log_var = self.fc2(h), self.fc3(h)
        z = mu + torch.exp(log_var / 2) * torch.randn_like(mu)
        return torch.sigmoid(self.fc5(torch.relu(self.fc4(torch.cat((z, c), 1))))), mu, log_var


@pytest.mark.parametrize("num_classes", [10, 26, 0])
def test_the_model_is_the_tutorials_and_its_loss_the_negative_elbo_of_each_image(num_classes):
    model, tutorial = CVAE(784, 40, 7, num_classes), TutorialCVAE(40, 7, num_classes)
    nn.init.normal_(tutorial.fc3.bias)  # far from the prior
    model.load_state_dict(tutorial.state_dict())  # an error unless names and shapes are the same
    x, c = torch.rand(num_classes or 9, 784), torch.eye(num_classes or 9, num_classes)
    inputs = x.view(-1, 1, 28, 28), model.one_hot(torch.arange(len(x)))
    torch.manual_seed(1)
    recon, mu, log_var = tutorial(x, c)
    kl = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum(1)
    reconstruction = F.binary_cross_entropy(recon, x, reduction="none").sum(1)
    theirs = [recon, mu, log_var, reconstruction, kl]
    torch.manual_seed(1)  # the same noise
    ours = [*model(*inputs)]
    torch.manual_seed(1)
    ours += negative_elbo(model, *inputs)
    for network, values in (model, ours), (tutorial, theirs):
        (values[-2] + values[-1]).mean().backward()
        values += [weight.grad for weight in network.parameters()]
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_weights_start_small_and_biases_at_zero():
    for layer in CVAE().children():
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_an_epoch_takes_every_image_once_with_its_label_in_random_order(monkeypatch):
    seen, numbers = [], torch.arange(256)

    def loss(model, x, c):  # each step lowers both biases by 3
        seen.append((x[:, 0], c))
        return model.fc2.bias.sum() + 0 * x[:, 0], 2 * model.fc2.bias.sum() + x[:, 0]

    monkeypatch.setattr(cvae_mnist, "negative_elbo", loss)
    model, images = CVAE(784, 4, 2), numbers.byte().view(-1, 1).expand(-1, 784)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = [(loss, model.fc2.bias[0].item())
             for loss in train_epoch(model, optimizer, images, numbers % 10, 50)]
    assert [len(x) for x, _ in seen] == [50] * 5 + [6]
    x, c = (torch.cat(parts) for parts in zip(*seen, strict=True))
    order = (255 * x).round().long()
    assert torch.equal(order.sort().values, numbers) and not torch.equal(order, numbers)
    assert torch.equal(c.argmax(1), order % 10)
    assert [bias for _, bias in steps] == pytest.approx([-3, -6, -9, -12, -15, -18])
    assert steps[1][0].item() == pytest.approx(2 * 3 * -3 + seen[1][0].mean().item(), rel=1e-4)
    assert not steps[1][0].requires_grad


def test_the_average_is_of_about_the_last_tenth_of_the_steps():
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for step in range(0, 10_001, 10):
        for value in model.state_dict().values():
            value.fill_(step)
        update_average(average, model, step)
    for value in (*average.parameters(), average.running_mean, average.running_var):
        assert 9000 < value.min() == value.max() < 9200  # the last twentieth would be 9500


def test_evaluation_is_the_mean_loss_of_all_images_with_new_noise(digits):
    model, (images, labels) = CVAE(784, 64, 8), digits[0]
    nn.init.normal_(model.fc1.weight)  # KL depends on image and label
    images = torch.cat([images[:501], torch.zeros(200, 784, dtype=torch.uint8)])
    with cvae_mnist.mixed_precision(images.device):
        terms = negative_elbo(model, images / 255, model.one_hot(labels).repeat(2, 1)[:701])
    losses = evaluate(model, images, labels.repeat(2)[:701])
    assert losses == pytest.approx([term.mean().item() for term in terms], rel=1e-4)
    assert losses != evaluate(model, images, labels.repeat(2)[:701])


def test_generate_decodes_with_labels_of_any_integer_type(device):
    model, z = CVAE(), 10 * torch.randn(10, 50)
    expected = model.decode(z, torch.eye(10)).view(10, 1, 28, 28)
    kinds = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
    for labels in (range(10), np.arange(10), *(torch.arange(10, dtype=kind) for kind in kinds)):
        assert torch.equal(model.one_hot(torch.as_tensor(labels)), torch.eye(10))
        images = generate(model.to(device), z, labels)
        assert images.device.type == "cpu" and not images.requires_grad
        assert images.shape == expected.shape and torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("labels", [[10], [-1], [6.5], [6.0], np.array([255], np.uint8)], ids=str)
def test_an_invalid_label_is_an_error(labels):
    with pytest.raises((RuntimeError, TypeError)):
        generate(CVAE(784, 4, 2), torch.zeros(1, 2), labels)


@pytest.mark.parametrize("able", [True, False, None])
def test_only_training_is_in_train_mode_and_bfloat16_is_used_if_possible(digits, monkeypatch, able):
    """able: whether the processor has bfloat16; None: an older PyTorch, which cannot tell."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    if able is None:
        monkeypatch.delattr("torch.cpu.get_capabilities")
    model, calls = CVAE(784, 64, 8), []
    model.fc5.register_forward_hook(
        lambda layer, _, y: calls.append((layer.training, y.requires_grad, y.dtype)))
    for _ in train_epoch(model, torch.optim.SGD(model.parameters()), *digits[1], 100):
        generate(model, torch.zeros(1, 8), [0])
        model.train()
        evaluate(model, *digits[1])
    full, kind = torch.float32, torch.bfloat16 if able else torch.float32
    assert calls == [(True, True, kind), (False, False, full), (False, False, kind)] * 2
    with cvae_mnist.mixed_precision(torch.device("cpu")):
        terms = negative_elbo(model, digits[1][0] / 255, model.one_hot(digits[1][1]))
    assert {term.dtype for term in terms} == {torch.float32}


@pytest.mark.skipif(ACCELERATOR is not None, reason="the accelerator itself is used")
def test_no_two_devices_meet_on_a_gpu():
    """Simulates CUDA: tensors that hold no values raise an error where two devices meet."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        try:
            with torch.device("cuda"):
                model, average = CVAE(784, 8, 2), CVAE(784, 8, 2)
                images, labels = torch.zeros(9, 784).byte(), torch.zeros(9).long()
        except RuntimeError:
            pytest.skip("this PyTorch cannot simulate CUDA")
        update_average(average, model, 0)
        assert generate(model, torch.zeros(9, 2), [3] * 9).device.type == "cpu"
        with pytest.raises(fake.DataDependentOutputException):  # where the numbers are read
            evaluate(model, images, labels)
