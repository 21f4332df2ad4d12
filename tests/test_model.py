"""Part 1 and what it needs: the model, its loss, a step, new digits, the average, evaluation."""

import runpy

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, SCRIPT
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import cvae_mnist
from cvae_mnist import CVAE, evaluate, generate, negative_elbo, train_step, update_average


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


@pytest.mark.parametrize("able", [True, False, None])
def test_training_and_evaluation_use_bfloat16_where_the_processor_has_it(digits, monkeypatch, able):
    """able: whether the processor has bfloat16; None: an older PyTorch, which cannot tell."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    script = runpy.run_path(str(SCRIPT))
    model, seen = script["CVAE"](784, 64, 8), []
    model.fc5.register_forward_hook(lambda layer, _, y: seen.append(y.dtype))
    images, labels = digits[1]
    x, c = images / 255, model.one_hot(labels)
    loss = script["train_step"](model, torch.optim.SGD(model.parameters()), x, c)
    script["evaluate"](model, images, labels)
    script["generate"](model, torch.zeros(9, 8), range(9))
    kind, full = torch.bfloat16 if able else torch.float32, torch.float32
    assert [*seen, loss.dtype] == [kind, kind, full, full]


def test_two_thirds_of_the_averages_weight_are_on_the_last_tenth_of_the_steps():
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for step in range(1000):
        for value in model.state_dict().values():
            value.fill_(step >= 900)
        update_average(average, model, step)
    for value in (*average.parameters(), average.running_mean, average.running_var):
        assert value.tolist() == pytest.approx([1 - 0.9**10] * 3, abs=0.005)
    for value in model.parameters():
        value.data.fill_(7)
    update_average(average, model, 0)  # the first step: the average is the model
    assert average.weight.tolist() == [7, 7, 7]


def test_evaluation_is_the_mean_loss_of_all_images_with_new_noise(digits):
    model, (images, labels) = CVAE(784, 64, 8), digits[0]
    nn.init.normal_(model.fc1.weight)  # KL depends on image and label
    images = torch.cat([images[:501], torch.zeros(200, 784, dtype=torch.uint8)])
    labels = labels.repeat(2)[:701]
    terms = negative_elbo(model, images / 255, model.one_hot(labels))
    losses = evaluate(model, images, labels)
    assert losses == pytest.approx([term.mean().item() for term in terms], rel=5e-3)
    assert losses != evaluate(model, images, labels)


@pytest.mark.parametrize("device", ["cpu", *([ACCELERATOR.type] if ACCELERATOR else [])])
def test_generate_decodes_with_the_labels(device):
    model, z = CVAE(), 10 * torch.randn(10, 50)
    expected = model.decode(z, torch.eye(10)).view(10, 1, 28, 28)
    for labels in range(10), np.arange(10, dtype=np.int64), torch.arange(10):
        images = generate(model.to(device), z, labels)
        assert images.device.type == "cpu" and not images.requires_grad
        assert images.shape == expected.shape and torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("labels", [[10], [-1], [6.5], np.array([6], np.uint8)], ids=str)
def test_an_invalid_label_is_an_error(labels):
    with pytest.raises((RuntimeError, TypeError)):
        generate(CVAE(784, 4, 2), torch.zeros(1, 2), labels)


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
