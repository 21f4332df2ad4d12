"""The idea: model, loss, one epoch of training, evaluation, generation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import cvae_mnist
from cvae_mnist import CVAE, evaluate, generate, negative_elbo, train_epoch, update_average

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize("shape", [(5, 784), (5, 1, 28, 28)])
def test_shapes_and_ranges(num_classes, shape):
    model = CVAE(h_dim=40, z_dim=7, num_classes=num_classes)
    x, c = torch.rand(shape), model.one_hot(torch.arange(5))
    mu, log_var = model.encode(x, c)
    assert mu.shape == log_var.shape == model.reparameterize(mu, log_var).shape == (5, 7)
    assert torch.equal(mu, model.encode(x.view(5, 784), c)[0])
    recon, mu, log_var = model(x, c)
    assert recon.shape == (5, 784) and mu.shape == log_var.shape == (5, 7)
    assert recon.min() >= 0 and recon.max() <= 1
    assert torch.equal(model.decode(mu, c), torch.sigmoid(model.decode_logits(mu, c)))


def test_encoder_is_a_hidden_layer_of_relus_and_two_linear_outputs():
    model, x, c = CVAE(h_dim=40, z_dim=7), torch.rand(5, 784), torch.eye(10)[:5]
    h = (torch.cat([x, c], 1) @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    mu, log_var = model.encode(x, c)
    assert torch.allclose(mu, model.fc2(h), atol=1e-6) and torch.allclose(log_var, model.fc3(h), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in model.encode(x, c)} == {torch.float32}


def test_layers_are_the_tutorials():
    sizes = {"fc1": (794, 600), "fc2": (600, 50), "fc3": (600, 50), "fc4": (60, 600), "fc5": (600, 784)}
    expected = {f"{name}.weight": (o, i) for name, (i, o) in sizes.items()}
    expected |= {f"{name}.bias": (o,) for name, (i, o) in sizes.items()}
    assert {name: tuple(value.shape) for name, value in CVAE().state_dict().items()} == expected
    plain = CVAE(784, 400, 20, num_classes=0).state_dict()
    assert plain["fc1.weight"].shape == (400, 784) and plain["fc4.weight"].shape == (400, 20)


def test_initial_weights_are_small_and_biases_zero():
    model = CVAE()
    for layer in model.children():
        assert layer.weight.mean().abs() < 1e-3 and layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    model.fc1.reset_parameters()
    assert model.fc1.weight.abs().max() <= 1 / math.sqrt(794) and model.fc1.bias.any()


def test_one_hot():
    labels = torch.tensor([3, 0, 9])
    assert torch.equal(CVAE(h_dim=4, z_dim=2).one_hot(labels), F.one_hot(labels, 10).float())
    nothing = CVAE(h_dim=4, z_dim=2, num_classes=0).one_hot(labels)
    assert nothing.shape == (3, 0) and nothing.dtype == torch.float32


def test_the_label_reaches_encoder_and_decoder():
    model, x, z = CVAE(), torch.rand(1, 784), torch.randn(1, 50)
    three, four = model.one_hot(torch.tensor([3])), model.one_hot(torch.tensor([4]))
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
    model, x = CVAE(num_classes=num_classes), torch.rand(9, 784).round()
    nn.init.normal_(model.fc2.bias), nn.init.normal_(model.fc3.bias)  # far from the prior
    c = model.one_hot(torch.arange(9))
    torch.manual_seed(1)
    reconstruction, kl = negative_elbo(model, x, c)
    torch.manual_seed(1)  # the same noise again
    recon, mu, log_var = model(x, c)
    assert torch.allclose(reconstruction, -Bernoulli(recon).log_prob(x).sum(), rtol=1e-5)
    expected = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(0.0, 1.0)).sum()
    assert torch.allclose(kl, expected, rtol=1e-4) and kl > 1


def test_loss_stays_finite_however_sure_the_decoder_is():
    model = CVAE(h_dim=8, z_dim=2)
    nn.init.constant_(model.fc5.bias, 500.0)
    reconstruction, _ = negative_elbo(model, torch.zeros(1, 784), model.one_hot(torch.tensor([0])))
    assert reconstruction.item() == pytest.approx(784 * 500)


# One epoch


def numbered(count):
    """Images that say which they are, in their first two pixels, and labels that fit."""
    images = torch.zeros(count, 784, dtype=torch.uint8)
    images[:, 0], images[:, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return images, torch.arange(count) % 10


@pytest.fixture
def seen(monkeypatch):
    """What train_epoch gives to the loss: a list of (x, c). The loss itself is the sum of two biases."""
    seen = []

    def loss(model, x, c):
        seen.append((x, c))
        return model.fc5.bias.sum(), model.fc4.bias.sum()

    monkeypatch.setattr(cvae_mnist, "negative_elbo", loss)
    return seen


def epoch_of(images, labels, batch_size, epoch=1, optimizer=torch.optim.SGD, lr=1.0):
    model, average = CVAE(h_dim=4, z_dim=2), CVAE(h_dim=4, z_dim=2)
    train_epoch(model, average, optimizer(model.parameters(), lr=lr), images, labels, batch_size, epoch)
    return model, average


def test_an_epoch_takes_every_image_once_with_its_label_in_random_order(seen):
    images, labels = numbered(1050)
    epoch_of(images, labels, 100)
    assert [len(x) for x, _ in seen] == [100] * 10 + [50]
    x, c = torch.cat([x for x, _ in seen]), torch.cat([c for _, c in seen])
    assert x.dtype == torch.float32 and x.max() == 1  # 255 became 1
    order = (x[:, 0] * 255 + 256 * 255 * x[:, 1]).round().long()
    assert torch.equal(order.sort().values, torch.arange(1050)) and not torch.equal(order, torch.arange(1050))
    assert torch.equal(c.argmax(1), order % 10)


def test_each_step_follows_the_gradient_of_both_terms_and_of_no_batch_before(seen):
    model, _ = epoch_of(*numbered(30), 10)
    assert torch.equal(model.fc5.bias, torch.full([784], -3.0))  # three steps of 1; old gradients would add up
    assert torch.equal(model.fc4.bias, torch.full([4], -3.0))


def test_the_average_remembers_about_the_last_tenth_of_the_steps():
    model, average = CVAE(h_dim=4, z_dim=2), CVAE(h_dim=4, z_dim=2)
    for step in range(0, 10_001, 10):  # the weights are the number of the step
        for weight in model.parameters():
            nn.init.constant_(weight, step)
        update_average(average, model, step)
    for weight in average.parameters():  # the mean over the last tenth is 9500; over all steps 5000
        assert 8900 < weight.min() == weight.max() < 9600


def test_train_epoch_averages_every_tenth_step_and_counts_on_from_epoch_to_epoch(seen, monkeypatch):
    steps = []
    monkeypatch.setattr(cvae_mnist, "update_average", lambda average, model, step: steps.append(step))
    epoch_of(*numbered(240), 10, epoch=1)
    epoch_of(*numbered(240), 10, epoch=3)
    assert steps == [0, 10, 20, 48, 58, 68]


def test_the_average_is_the_models_after_the_first_step(seen):
    model, average = epoch_of(*numbered(10), 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), average.parameters(), strict=True))


def test_training_learns(digits):
    """The real loss, a few epochs: what train_epoch does lowers it."""
    (images, labels), _ = digits
    model, average = CVAE(h_dim=64, z_dim=8), CVAE(h_dim=64, z_dim=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = sum(evaluate(model, images, labels))
    for epoch in (1, 2, 3):
        train_epoch(model, average, optimizer, images, labels, 50, epoch)
    assert sum(evaluate(average, images, labels)) < 0.5 * before


# Evaluation


def test_evaluation_counts_every_image_once():
    model = CVAE(h_dim=8, z_dim=2)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    nn.init.constant_(model.fc5.bias, 2.0)  # a logit of 2 for every pixel: a white one costs log(1 + e^-2)
    images = torch.full((2345, 784), 255, dtype=torch.uint8)
    reconstruction, kl = evaluate(model, images, torch.zeros(2345, dtype=torch.long))
    assert reconstruction == pytest.approx(784 * math.log(1 + math.exp(-2)), rel=1e-5) and kl == 0
    assert isinstance(reconstruction, float)
    nn.init.constant_(model.fc2.bias, 3.0)  # KL of N(3, 1): 9 / 2 for each of two numbers
    assert evaluate(model, images, torch.zeros(2345, dtype=torch.long))[1] == pytest.approx(9)


def test_evaluation_samples_z_and_uses_the_labels(digits):
    (images, labels), _ = digits
    model = CVAE(h_dim=64, z_dim=8)
    nn.init.normal_(model.fc4.weight)
    one, other = evaluate(model, images, labels), evaluate(model, images, labels)
    assert one != other and one == pytest.approx(other, rel=0.05)
    assert one[1] == other[1]  # KL has no noise
    assert evaluate(model, images, labels.flip(0))[1] != one[1]


# Generation


def test_generate_decodes_with_the_labels():
    model, z = CVAE(), 10 * torch.randn(10, 50)
    images = generate(model, z, range(10))
    assert images.shape == (10, 1, 28, 28) and not images.requires_grad and images.device == CPU
    assert torch.allclose(images.view(10, 784), model.decode(z, torch.eye(10)), atol=1e-6)
    assert torch.equal(images, generate(model, z, torch.arange(10)))
    plain = CVAE(num_classes=0)
    assert torch.equal(generate(plain, z, [0] * 10), generate(plain, z, range(10)))


# Products in bfloat16

BFLOAT16, NOTHING = {"avx512_bf16": True}, {}  # what a processor can do


@pytest.fixture
def processor(monkeypatch):
    """processor(BFLOAT16) pretends that this machine's processor can do that, and no more."""
    return lambda able: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)


def products(device="cpu"):
    with cvae_mnist.autocast(torch.device(device)):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_products_are_in_bfloat16_where_the_processor_can(processor, monkeypatch):
    processor(BFLOAT16)
    assert products() == torch.bfloat16 and products("cuda") == torch.float32
    processor(NOTHING)
    assert products() == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert products() == torch.float32


def test_bfloat16_changes_the_loss_a_little_and_no_type(processor, digits):
    (images, labels), _ = digits
    losses = []
    for able in (BFLOAT16, NOTHING):
        processor(able)
        torch.manual_seed(1)
        model, average = CVAE(h_dim=64, z_dim=8), CVAE(h_dim=64, z_dim=8)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        train_epoch(model, average, optimizer, images[:500], labels[:500], 50, 1)
        state = [value for values in optimizer.state.values() for value in values.values()]
        assert {value.dtype for value in [*model.parameters(), *average.parameters(), *state]} == {torch.float32}
        with cvae_mnist.autocast(CPU):
            terms = negative_elbo(model, images[:9] / 255, model.one_hot(labels[:9]))
        assert {term.dtype for term in terms} == {torch.float32}
        torch.manual_seed(2)
        losses.append([sum(evaluate(model, images, labels)), next(model.parameters()).sum().item()])
    (half, half_weight), (full, full_weight) = losses
    assert half != full and half == pytest.approx(full, rel=0.01) and half_weight != full_weight


def test_evaluation_uses_bfloat16_too(processor, digits):
    (images, labels), _ = digits
    model, losses = CVAE(h_dim=64, z_dim=8), []
    for able in (BFLOAT16, NOTHING):
        processor(able)
        torch.manual_seed(1)
        losses.append(sum(evaluate(model, images, labels)))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-3)
