"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import math
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, CHECKPOINT, load, same

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, load_checkpoint, train_cvae


@pytest.fixture
def train(quick):
    """train_cvae with quick arguments, which a test may replace."""
    return partial(train_cvae, **quick)


def test_every_epoch_follows_the_readmes_recipe_with_its_own_random_numbers(train, monkeypatch):
    seen, seeds, steps = [], [], []

    def train_epoch(model, optimizer, images, labels, batch_size):
        group = optimizer.param_groups[0]
        seen.append((type(optimizer), group["betas"], group["lr"], batch_size, len(images)))
        seeds.append(torch.initial_seed())
        yield from torch.zeros(24)

    monkeypatch.setattr(cvae_mnist, "train_epoch", train_epoch)
    monkeypatch.setattr(cvae_mnist, "update_average", lambda *arguments: steps.append(arguments[2]))
    train = partial(train, batch_size=25, learning_rate=0.01)
    train(epochs=2)
    one, other = train(epochs=12, resume=True), train(epochs=12, seed=1)
    rates = [0.005] + [0.01] * 11
    assert seen == [(torch.optim.Adam, (0.9, 0.99), rate, 25, 600) for rate in rates] * 2
    assert steps[:11] == [0, 10, 20, 23, 30, 40, 47, 50, 60, 70, 71]  # also an epoch's last
    assert len(set(seeds)) == 24
    assert not torch.equal(one.fc1.weight, other.fc1.weight)  # the initial weights


def test_the_history_is_what_the_returned_model_measured_each_epoch(train, monkeypatch):
    """On all test images and on the first 10,000 training images."""
    numbers = torch.arange(12_000)
    images, labels = numbers.view(-1, 1).expand(-1, 784).to(torch.uint8), numbers % 10
    test_set = images[:300] + 7, labels[:300]
    evaluate = Mock(side_effect=[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)])
    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda _: ("MNIST", (images, labels), test_set))
    model = train(epochs=2, batch_size=1000)
    measured = [(images[:10_000], labels[:10_000]), test_set] * 2
    for call, (x, y) in zip(evaluate.call_args_list, measured, strict=True):
        assert call.args[0] is model
        assert torch.equal(call.args[1], x) and torch.equal(call.args[2], y)
    assert load(".")["history"] == {
        "train_loss": [3, 11], "reconstruction": [1, 5], "kl": [2, 6], "test_loss": [7, 15]}
    assert same(load(".")["model_state_dict"], model.state_dict()) and not model.training


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_trains_on_an_accelerator(train):
    assert next(train(device=None).parameters()).device.type == ACCELERATOR.type
    train(device=None, epochs=5, resume=True)
    assert inference_cvae(device="cpu").shape == (10, 1, 28, 28)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_stopping_and_resuming_changes_no_bit(train, num_classes):
    whole = train(num_classes=num_classes, out_dir="whole")
    train(num_classes=num_classes, out_dir="parts", epochs=2)
    torch.manual_seed(99)  # what else the process did must not matter
    parts = train(num_classes=num_classes, out_dir="parts", resume=True)
    assert same(load("parts"), load("whole")) and same(parts.state_dict(), whole.state_dict())


@pytest.mark.parametrize("bias", [None, math.nan, 1e30], ids=["interrupted", "nan", "overflow"])
def test_a_run_that_breaks_off_resumes_from_its_last_good_epoch(train, trained, monkeypatch, bias):
    real = cvae_mnist.update_average

    def update_average(average, model, step):
        if step == 56 and bias is None:  # the last of epoch 3
            raise KeyboardInterrupt
        if step == 56:
            torch.nn.init.constant_(model.fc2.bias, bias)  # of mu, which is squared
        real(average, model, step)

    error = KeyboardInterrupt if bias is None else UserError
    with monkeypatch.context() as patch:
        patch.setattr(cvae_mnist, "update_average", update_average)
        with pytest.raises(error, match=None if bias is None else "epoch 3.*learning_rate.*0.003"):
            train()
    assert load(".")["epoch"] == 2
    train(resume=True)
    assert same(load("."), load(trained))


def test_resuming_a_finished_run_only_draws_the_losses(train, trained, here, monkeypatch):
    shutil.copy(trained / CHECKPOINT, here)
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: pytest.fail("trained"))
    model = train(resume=True)
    assert same(model.state_dict(), load(trained)["model_state_dict"]) and not model.training
    assert (here / CHECKPOINT).read_bytes() == (trained / CHECKPOINT).read_bytes()
    assert (here / "CVAE_loss.png").exists()


def test_resuming_with_anything_else_is_refused_and_every_difference_is_named(train, trained):
    before = {**load(trained), "dataset": "other digits"}
    torch.save(before, CHECKPOINT)
    others = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}
    named = [f"{name}.*{value}" for name, value in others.items()]
    with pytest.raises(UserError, match=".*".join(["Cannot resume.*other digits.*MNIST", *named])):
        train(**others, resume=True)
    assert same(load("."), before)


def test_the_learning_rate_may_change_and_that_is_said(train, capsys):
    train(epochs=1)
    train(epochs=2, learning_rate=0.001, resume=True)
    assert "learning_rate is now 0.001, it was 0.003" in capsys.readouterr().out
    assert load(".")["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.001
    assert load(".")["hyperparameters"]["learning_rate"] == 0.001


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", 0), ("epochs", "6"), ("num_classes", 5), ("num_classes", 11), ("batch_size", 2.5),
    ("h_dim", 16.0), ("z_dim", None), ("seed", 1.5), ("learning_rate", -1),
    ("learning_rate", math.nan), ("device", "nonsense"), ("device", "meta"), ("device", "cuda:99"),
    ("out_dir", None), ("out_dir", "file"), ("out_dir", "file/below")])
def test_a_wrong_argument_is_an_error_before_anything_happens(here, monkeypatch, name, value):
    for reads in ("read_mnist", "download_mnist", "built_in_digits"):
        monkeypatch.setattr(cvae_mnist, reads, lambda *_: pytest.fail("data was read"))
    (here / "file").touch()
    with pytest.raises(OSError if name == "out_dir" and value else (TypeError, ValueError)):
        train_cvae(**{name: value})
    assert list(here.iterdir()) == [here / "file"]


def test_numbers_from_numpy_are_stored_as_plain_ones(train, trained):
    sizes = {"batch_size": np.int64(32), "h_dim": np.int64(16), "z_dim": np.int64(3)}
    train(epochs=np.int64(3), **sizes, learning_rate=np.float64(3e-3), seed=np.uint8(0))
    train(epochs=np.int64(4), **sizes, learning_rate=np.float64(3e-3), resume=True)
    assert same(load("."), load(trained))  # could not be loaded if it held numpy's
    assert inference_cvae(np.int64(3), True, np.float32(0.5), np.int64(5)).shape == (10, 1, 28, 28)


def test_the_label_decides_which_digit_is_drawn(train, digits):
    """Drawings of a digit are nearest to that digit's mean image, for most digits."""
    train(epochs=30, h_dim=64)
    images, labels = digits[0]
    means = torch.stack([images[labels == digit].float().mean(0) / 255 for digit in range(10)])
    drawn = [inference_cvae(digit, True, seed=0).flatten(1).mean(0) for digit in range(10)]
    assert (torch.cdist(torch.stack(drawn), means).argmin(1) == torch.arange(10)).sum() >= 9


def test_first_epochs_on_mnist(mnist_root):
    """Textbook recipe: about 159.5 nats per image in epoch 1, in several independent codes."""
    import benchmark

    assert sum(benchmark.Textbook(mnist_root).epoch()) == pytest.approx(159.5, abs=3)
    train_cvae(2, data_dir=mnist_root, device="cpu")
    checkpoint, _ = load_checkpoint(".")
    assert checkpoint["dataset"] == "MNIST"
    assert checkpoint["history"]["test_loss"][-1] == pytest.approx(113, abs=2)
