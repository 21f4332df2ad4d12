"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import math
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, CHECKPOINT, MNIST_ROOT, load, same

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, train_cvae


def test_every_epoch_follows_the_readmes_recipe_with_its_own_random_numbers(train, monkeypatch):
    seen, seeds, steps = [], [], []

    def train_epoch(model, optimizer, images, labels, batch_size):
        group = optimizer.param_groups[0]
        seen.append((type(optimizer), group["betas"], group["lr"], batch_size, len(images)))
        seeds.append(torch.initial_seed())
        yield from torch.zeros(24)

    monkeypatch.setattr(cvae_mnist, "train_epoch", train_epoch)
    monkeypatch.setattr(cvae_mnist, "update_average", lambda *arguments: steps.append(arguments[2]))
    recipe = dict(batch_size=26, learning_rate=0.01)
    train(epochs=2, **recipe)
    one, other = train(epochs=12, resume=True, **recipe), train(epochs=12, seed=1, **recipe)
    rates = [0.005] + [0.01] * 11
    assert seen == [(torch.optim.Adam, (0.9, 0.99), rate, 26, 600) for rate in rates] * 2
    assert steps[:11] == [0, 10, 20, 23, 30, 40, 47, 50, 60, 70, 71]  # also an epoch's last
    assert len(set(seeds)) == 24
    assert not torch.equal(one.fc1.weight, other.fc1.weight)  # the initial weights
    pictures = {path.name for path in Path("cvae_results").iterdir()}
    assert pictures == {"epoch_2.png", "epoch_10.png", "epoch_12.png"}


def test_the_history_is_what_the_returned_model_measured_after_each_epoch(train, monkeypatch):
    numbers = torch.arange(12_000)
    images, labels = numbers.view(-1, 1).expand(-1, 784).to(torch.uint8), numbers % 10
    test_set = images[:300] + 7, labels[:300]
    evaluate = Mock(side_effect=[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)])
    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    monkeypatch.setattr(cvae_mnist, "save_samples", save_samples := Mock())
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda _: ("MNIST", (images, labels), test_set))
    model = train(epochs=2, batch_size=1000)
    for call, measured in zip(evaluate.call_args_list, [
            (images[:10_000], labels[:10_000]), test_set] * 2, strict=True):
        assert call.args[0] is model and same(list(call.args[1:]), list(measured))
    assert load()["history"] == {
        "train_loss": [3, 11], "reconstruction": [1, 5], "kl": [2, 6], "test_loss": [7, 15]}
    assert same(load()["model_state_dict"], model.state_dict()) and not model.training
    assert save_samples.call_args.args[1] is model


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
    assert inference_cvae(out_dir="parts", device="cpu").shape == (10, 1, 28, 28)


def test_a_run_that_is_interrupted_or_diverges_resumes_from_its_last_good_epoch(
        train, trained, monkeypatch):
    interrupted = Mock(wraps=cvae_mnist.evaluate, side_effect=[DEFAULT] * 4 + [KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cvae_mnist, "evaluate", interrupted)
        train()
    with pytest.raises(UserError, match="learning_rate"):
        train(learning_rate=1e30, resume=True)
    assert load()["epoch"] == 2
    train(resume=True)
    assert same(load(), load(trained))


def test_resuming_a_finished_run_only_draws_the_losses(train, trained, monkeypatch):
    before = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT)).read_bytes()
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: pytest.fail("trained"))
    model = train(resume=True)
    assert same(model.state_dict(), load()["model_state_dict"]) and not model.training
    assert Path(CHECKPOINT).read_bytes() == before and Path("CVAE_loss.png").exists()


def test_resuming_with_anything_else_is_refused_and_every_difference_is_named(train, trained):
    before = {**load(trained), "dataset": "other digits"}
    torch.save(before, CHECKPOINT)
    others = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}
    named = [f"{name}.*{value}" for name, value in others.items()]
    with pytest.raises(UserError, match=".*".join(["Cannot resume.*other digits.*MNIST", *named])):
        train(**others, resume=True)
    assert same(load(), before)


def test_the_learning_rate_may_change_and_that_is_said(train, capsys):
    train(epochs=1)
    train(epochs=2, learning_rate=0.001, resume=True)
    assert "learning_rate is now 0.001, it was 0.003" in capsys.readouterr().out
    assert load()["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.001
    assert load()["hyperparameters"]["learning_rate"] == 0.001


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", 0), ("epochs", "6"), ("num_classes", 5), ("num_classes", 11), ("batch_size", 2.5),
    ("h_dim", 16.0), ("z_dim", None), ("seed", 1.5), ("learning_rate", -1),
    ("learning_rate", math.nan), ("device", "nonsense"), ("device", "meta"), ("device", "cuda:99"),
    ("out_dir", None), ("out_dir", "file"), ("out_dir", "file/below")])
def test_a_wrong_argument_is_an_error_before_anything_happens(monkeypatch, name, value):
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda _: pytest.fail("data was read"))
    Path("file").touch()
    with pytest.raises((TypeError, ValueError, OSError)):
        train_cvae(**{name: value})
    assert list(Path().iterdir()) == [Path("file")]


def test_numbers_from_numpy_are_stored_as_plain_ones(train, trained):
    sizes = {"batch_size": np.int64(32), "h_dim": np.int64(16), "z_dim": np.int64(3)}
    train(epochs=np.int64(3), **sizes, learning_rate=np.float64(3e-3), seed=np.uint8(0))
    train(epochs=np.int64(4), **sizes, learning_rate=np.float64(3e-3), resume=True)
    assert same(load(), load(trained))  # could not be loaded if it held numpy's
    assert inference_cvae(np.int64(3), True, np.float32(0.5), np.int64(5)).shape == (10, 1, 28, 28)


def test_the_label_decides_which_digit_is_drawn(train, digits):
    """Drawings of a digit are nearest to that digit's mean image, for most digits."""
    train(epochs=30, h_dim=64)
    images, labels = digits[0]
    means = torch.stack([images[labels == digit].float().mean(0) / 255 for digit in range(10)])
    drawn = [inference_cvae(digit, True, seed=0).flatten(1).mean(0) for digit in range(10)]
    assert (torch.cdist(torch.stack(drawn), means).argmin(1) == torch.arange(10)).sum() >= 9


@pytest.mark.skipif(not MNIST_ROOT, reason="set MNIST_ROOT to the folder that holds MNIST/raw")
def test_first_epochs_on_mnist():
    """A published log of the vae of pytorch/examples has 164.4 nats per image in epoch 1."""
    import benchmark

    textbook = benchmark.Textbook(MNIST_ROOT, h_dim=400, z_dim=20, num_classes=0)
    assert sum(textbook.epoch()) == pytest.approx(164.4, abs=1.5)
    train_cvae(2, data_dir=MNIST_ROOT, device="cpu")
    assert load()["dataset"] == "MNIST"
    assert load()["history"]["test_loss"][-1] == pytest.approx(113, abs=2)
