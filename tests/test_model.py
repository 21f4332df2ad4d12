"""Part 1 and what it needs: the model, its loss, a step, new digits, the average, evaluation."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import cvae_mnist
from cvae_mnist import CVAE, evaluate, generate, negative_elbo, train_step, update_average


class TutorialCVAE(nn.Module):
    def __init__(self, h_dim, z_dim, num_classes=10):
        super().__init__()
        self.fc1 = nn.Linear(784 + num_classes, h_dim)
        self.fc2, self.fc3 = nn.Linear(h_dim, z_dim), nn.Linear(h_dim, z_dim)
        self.fc4, self.fc5 = nn.Linear(z_dim + num_classes, h_dim), nn.Linear(h_dim, 784)

    def forward(self, x, c):
        h = torch.relu(self.fc1(torch.cat((x, c), 1)))
        mu, log_var = self.fc2(h), self.fc3(h)
        z = mu + torch.exp(log_var / 2) * torch.randn_like(mu)
        return torch.sigmoid(self.fc5(torch.relu(self.fc4(torch.cat((z, c), 1))))), mu, log_var


@pytest.mark.parametrize("num_classes", [10, 0])
def test_the_model_is_the_tutorials_and_its_loss_the_negative_elbo_of_each_image(num_classes):
    model, tutorial = CVAE(784, 40, 7, num_classes), TutorialCVAE(40, 7, num_classes)
    for layer in model.children():
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15) and not layer.bias.any()
    nn.init.normal_(tutorial.fc3.bias)  # far from the prior
    model.load_state_dict(tutorial.state_dict())  # an error unless names and shapes are the same
    x, c = torch.rand(10, 784), torch.eye(10, num_classes)
    inputs = x.view(-1, 1, 28, 28), model.one_hot(torch.arange(10))
    torch.manual_seed(1)
    recon, mu, log_var = tutorial(x, c)
    kl = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum(1)
    reconstruction = F.binary_cross_entropy(recon, x, reduction="none").sum(1)
    torch.manual_seed(1)  # the same noise
    ours = [*model(*inputs)]
    torch.manual_seed(1)
    ours += negative_elbo(model, *inputs)
    for value, expected in zip(ours, (recon, mu, log_var, reconstruction, kl), strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_step_goes_down_the_gradient_of_the_batchs_mean_loss_and_returns_it(monkeypatch):
    def loss(model, x, c):
        return model.fc2.bias.sum() + 0 * x[:, 0], 2 * model.fc2.bias.sum() + c[:, 0] * x[:, 0]

    monkeypatch.setattr(cvae_mnist, "negative_elbo", loss)
    model, x, c = CVAE(784, 4, 2), torch.tensor([[1.0], [4.0]]), torch.ones(2, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = [(train_step(model, optimizer, x, c), model.fc2.bias[0].item()) for _ in range(3)]
    assert [bias for _, bias in steps] == [-3, -6, -9]
    assert [loss.item() for loss, _ in steps] == [2.5, 2.5 - 18, 2.5 - 36]
    assert not steps[0][0].requires_grad


def test_evaluation_is_the_mean_over_all_images_in_32_bits_a_thousand_at_a_time(monkeypatch):
    monkeypatch.setattr(cvae_mnist, "BFLOAT16", True)  # only train_cvae cares
    model, parts = CVAE(784, 16, 3), []
    model.fc1.weight.data[:, 784:], model.fc5.bias.data[:] = torch.arange(10.0), 3
    images = torch.randint(256, (2300, 784), dtype=torch.uint8)
    images[2000:] = 255  # so a mean of the parts' means would be wrong
    labels = torch.arange(2300) // 300
    x, c = images / 255, model.one_hot(labels)
    terms = [term.mean().item() for term in negative_elbo(model, x, c)]
    model.fc5.register_forward_hook(lambda layer, _, out: parts.append((len(out), out.dtype)))
    losses = evaluate(model, images, labels)
    assert losses == pytest.approx(terms, rel=2e-3) and losses != evaluate(model, images, labels)
    train_step(model, torch.optim.SGD(model.parameters()), x[:9], c[:9])
    assert max(parts)[0] <= 1000 and {dtype for _, dtype in parts} == {torch.float32}


def test_two_thirds_of_the_averages_weight_are_on_the_last_tenth_of_the_steps():
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for step in range(1000):
        for value in model.state_dict().values():
            value.fill_(step >= 900)
        update_average(average, model, step)
    for value in average.weight, average.bias, average.running_mean, average.running_var:
        assert value.tolist() == pytest.approx([1 - 0.9**10] * 3, abs=0.005)
    update_average(average, model, 0)  # the first step: the average is the model
    assert torch.equal(average.weight, model.weight)


def test_generate_decodes_with_the_labels_and_refuses_wrong_ones():
    model, z = CVAE(), 10 * torch.randn(10, 50)
    expected = model.decode(z, torch.eye(10)).view(10, 1, 28, 28)
    types = torch.int64, torch.int32, torch.uint8
    for labels in range(10), np.arange(10), *(torch.arange(10, dtype=each) for each in types):
        images = generate(model, z, labels)
        assert not images.requires_grad and torch.equal(images, expected)
    for label in 10, -1, 6.5:
        with pytest.raises(RuntimeError):
            generate(model, z[:1], [label])
