"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import itertools
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, CHECKPOINT, MNIST_ROOT, load, same

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, train_cvae


def test_an_epoch_takes_every_image_once_with_adam_at_a_constant_rate(train, monkeypatch):
    numbers, batches, average = torch.arange(250), [], Mock()
    data = numbers.byte().view(-1, 1).expand(-1, 784), numbers % 10

    def train_step(model, optimizer, x, c):
        batches.append((x[:, 0] * 255).round().long())
        assert torch.equal(c.argmax(dim=1), batches[-1] % 10)
        [group] = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam
        assert (group["lr"], group["betas"]) == (0.01, (0.9, 0.99))

    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", data, data))
    monkeypatch.setattr(cvae_mnist, "train_step", train_step)
    monkeypatch.setattr(cvae_mnist, "update_average", average)
    train = partial(train, batch_size=60, learning_rate=0.01)
    first, _, other = train(epochs=1), train(epochs=12, resume=True), train(epochs=1, seed=1)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)  # the initial weights
    assert [call.args[2] for call in average.mock_calls] == [*range(60), *range(5)]
    assert [len(batch) for batch in batches] == [60, 60, 60, 60, 10] * 13
    orders = torch.cat(batches).view(13, 250)
    assert torch.equal(orders.sort(dim=1).values, numbers.expand(13, 250))
    assert len(orders.unique(dim=0)) == 13
    assert {*os.listdir("cvae_results")} == {"epoch_1.png", "epoch_10.png", "epoch_12.png"}


def test_the_history_is_what_the_returned_model_measured_after_an_epoch(train, monkeypatch, capsys):
    images = torch.arange(12_000).view(-1, 1).expand(-1, 784).to(torch.uint8)
    labels = torch.arange(12_000) % 10
    test_set = images[:300] + 7, labels[:300]
    evaluate = Mock(side_effect=[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)])
    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", (images, labels), test_set))
    monkeypatch.setattr(time, "perf_counter", Mock(side_effect=itertools.count(0, 90)))
    model = train(epochs=2, batch_size=1000)
    times = re.findall(r"\nepoch .*  (.*)  (.*)", capsys.readouterr().out)
    assert times == [("90.0 s", "1.5 min left"), ("90.0 s", "0.0 min left")]
    measured = [(images[:10_000], labels[:10_000]), test_set] * 2
    for call, pair in zip(evaluate.call_args_list, measured, strict=True):
        assert call.args[0] is model and same(list(call.args[1:]), list(pair))
    terms = {"reconstruction": [1, 5], "kl": [2, 6]}
    assert load()["history"] == {"train_loss": [3, 11], **terms, "test_loss": [7, 15]}
    assert same(load()["model_state_dict"], model.state_dict()) and not model.training


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_trains_on_an_accelerator(train):
    assert next(train(device=None).parameters()).device.type == ACCELERATOR.type
    train(device=None, epochs=5, resume=True)
    assert inference_cvae().shape == (10, 1, 28, 28)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_stopping_and_resuming_with_numpys_numbers_changes_no_bit(train, num_classes):
    whole = train(num_classes=num_classes, out_dir="whole")
    numbers = {"batch_size": 32, "h_dim": 16, "z_dim": 3, "num_classes": num_classes, "seed": 0}
    numbers = {name: np.int64(number) for name, number in numbers.items()}
    numbers |= {"learning_rate": np.float64(3e-3), "out_dir": "parts"}
    train(**numbers, epochs=np.int64(2))
    torch.manual_seed(99)  # what else the process did must not matter
    parts = train(**numbers, resume=True)
    assert same(load("parts"), load("whole")) and same(parts.state_dict(), whole.state_dict())
    inference_cvae(np.int64(3), True, np.float32(0.5), np.int64(5), "parts")


def test_resuming_with_anything_else_names_every_difference(train, trained, monkeypatch):
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: pytest.fail("data were loaded"))
    before = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT)).read_bytes()
    others = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}
    error = pytest.raises(UserError, train, **others, resume=True)
    error.match("Cannot resume")
    for name, value in others.items():
        saved = load()["hyperparameters"].get(name, 4)  # epochs
        assert all(text in str(error.value) for text in (name, str(value), str(saved)))
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("KMNIST", None, None))
    error = pytest.raises(UserError, train, dataset="KMNIST", resume=True)
    error.match("dataset is MNIST .* but KMNIST here")
    assert Path(CHECKPOINT).read_bytes() == before


def test_only_another_learning_rate_changes_the_optimizers(train, capsys):
    train(epochs=1)
    checkpoint = load()
    [group] = checkpoint["optimizer_state_dict"]["param_groups"]
    for saved, given, used in (0.002, 0.003, 0.002), (0.002, 0.001, 0.001):  # 0.002: a scheduler's
        group["lr"] = saved
        torch.save(checkpoint, CHECKPOINT)
        train(epochs=2, learning_rate=given, resume=True)
        assert load()["optimizer_state_dict"]["param_groups"][0]["lr"] == used
        assert load()["hyperparameters"]["learning_rate"] == given
        said = [line for line in capsys.readouterr().out.splitlines() if "learning_rate" in line]
        assert len(said) == (given != 0.003)
    assert "0.003" in said[0] and "0.001" in said[0]


def test_a_wrong_argument_is_an_error_before_anything_happens(monkeypatch):
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: pytest.fail("data were loaded"))
    Path("file").touch()
    wrong = {"epochs": [0, "6"], "batch_size": [0, 2.5], "h_dim": [-1], "z_dim": [None]}
    wrong |= {"num_classes": [5, 11], "seed": ["x"], "learning_rate": [-1], "out_dir": ["file"]}
    wrong |= {"device": ["nonsense", "meta", "cuda:99"]}
    for name, values in wrong.items():
        for value in values:
            pytest.raises((TypeError, ValueError, OSError), train_cvae, **{name: value})
            assert os.listdir() == ["file"]


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
    assert load()["hyperparameters"]["dataset"] == "MNIST"
    assert load()["history"]["test_loss"][-1] == pytest.approx(111.2, abs=2)
