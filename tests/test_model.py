"""Part 1: the model, its loss, one epoch of training, new digits."""

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

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
    x, c = torch.rand(num_classes or 9, 784).round(), torch.eye(num_classes or 9, num_classes)
    inputs = x.view(-1, 1, 28, 28), model.one_hot(torch.arange(len(x)))
    torch.manual_seed(1)
    recon, mu, log_var = tutorial(x, c)
    kl = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum(1)
    theirs = [recon, mu, log_var, -Bernoulli(recon).log_prob(x).sum(1), kl]
    torch.manual_seed(1)  # the same noise
    mine = [*model(*inputs)]
    torch.manual_seed(1)
    mine += negative_elbo(model, *inputs)
    for network, values in (model, mine), (tutorial, theirs):
        (values[-2] + values[-1]).mean().backward()
        values += [weight.grad for weight in network.parameters()]
    for value, expected in zip(mine, theirs, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_weights_start_small_and_biases_at_zero():
    for layer in CVAE().children():
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_an_epoch_takes_every_image_once_with_its_label_in_random_order(monkeypatch):
    seen, numbers = [], torch.arange(256)

    def loss(model, x, c):
        seen.append((x, c))
        return model.fc2.bias.sum() + 0 * x[:, 0], 2 * model.fc2.bias.sum() + x[:, 0]

    monkeypatch.setattr(cvae_mnist, "negative_elbo", loss)
    model, images = CVAE(784, 4, 2), numbers.byte().view(-1, 1).expand(-1, 784)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    epoch = train_epoch(model, optimizer, images, numbers % 10, 50)
    losses, biases = zip(*((loss, model.fc2.bias[0].item()) for loss in epoch), strict=True)
    assert [len(x) for x, _ in seen] == [50] * 5 + [6]
    x, c = torch.cat([x for x, _ in seen]), torch.cat([c for _, c in seen])
    order = (255 * x[:, 0]).round().long()
    assert torch.equal(order.sort().values, numbers) and not torch.equal(order, numbers)
    assert torch.equal(c.argmax(1), order % 10)
    # Each step follows the gradient of both terms' mean, and of no batch before: it is 3.
    assert biases == pytest.approx((-3, -6, -9, -12, -15, -18))
    assert losses[1].item() == pytest.approx(2 * 3 * -3 + x[50:100, 0].mean().item(), rel=1e-4)
    assert not losses[1].requires_grad


def test_the_average_is_of_about_the_last_tenth_of_the_steps():
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for step in range(0, 10_001, 10):
        for value in model.state_dict().values():
            value.fill_(step)
        update_average(average, model, step)
    for value in (*average.parameters(), average.running_mean, average.running_var):
        assert 9000 < value.min() == value.max() < 9200  # the last twentieth would be 9500


def test_evaluation_counts_every_image_once_samples_z_and_uses_the_labels(digits):
    model, (images, labels) = CVAE(784, 64, 8), digits[1]
    nn.init.normal_(model.fc4.weight)
    one, other = evaluate(model, images, labels), evaluate(model, images, labels)
    assert one[0] != other[0] and one[1] == other[1]  # KL has no noise
    assert evaluate(model, images, labels.flip(0))[1] != one[1]
    for weight in model.parameters():
        nn.init.zeros_(weight)
    nn.init.constant_(model.fc5.bias, 500.0)  # white pixels cost 0, black ones 500
    nn.init.constant_(model.fc2.bias, 3.0)  # KL of N(3, 1): 9 / 2 for each of 8 dimensions
    images = torch.full((2345, 784), 255, dtype=torch.uint8)
    images[-1] = 0  # in the last and shorter part
    losses = evaluate(model, images, torch.zeros(2345, dtype=torch.long))
    assert losses == pytest.approx([784 * 500 / 2345, 36], rel=1e-5)


def test_generate_decodes_with_labels_of_any_integer_type(device):
    model, z = CVAE(), 10 * torch.randn(10, 50)
    expected = model.decode(z, torch.eye(10)).view(10, 1, 28, 28)
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    for labels in (range(10), np.arange(10), *(torch.arange(10, dtype=kind) for kind in kinds)):
        assert torch.equal(CVAE().one_hot(torch.as_tensor(labels)), torch.eye(10))
        images = generate(model.to(device), z, labels)
        assert images.device.type == "cpu" and not images.requires_grad
        assert images.shape == expected.shape and torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("labels", [[10], [-1], [6.5], [6.0], np.array([255], np.uint8)], ids=str)
def test_a_label_that_is_none_is_an_error(labels):
    with pytest.raises((RuntimeError, TypeError)):
        generate(CVAE(784, 4, 2), torch.zeros(1, 2), labels)


def test_only_training_is_in_train_mode_and_bfloat16_is_used_if_possible(monkeypatch, digits):
    model, calls, full, half = CVAE(784, 64, 8), [], torch.float32, torch.bfloat16
    model.fc5.register_forward_hook(lambda layer, _, y: calls.append((layer.training, y.dtype)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def losses(result=()):
        torch.manual_seed(1)
        for loss in train_epoch(model, optimizer, *digits[1], 100):
            generate(model, torch.zeros(1, 8), [0])
            model.train()
            result = [*result, loss.item(), *evaluate(model, *digits[1])]
        return result

    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)  # an older PyTorch
    expected = losses()
    features = {"avx512_bf16": False}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features, raising=False)
    assert losses() == expected
    features["avx512_bf16"] = True
    assert losses() == pytest.approx(expected, rel=0.01)
    batches = [[(True, kind), (False, full), (False, kind)] * 2 for kind in (full, full, half)]
    assert calls == sum(batches, [])
    with cvae_mnist.mixed_precision(torch.device("cpu")):
        assert {value.dtype for value in model.encode(digits[1][0], torch.eye(200, 10))} == {full}


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
