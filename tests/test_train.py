"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, MNIST_ROOT, load, same, write_images
from torch import nn

import cvae_mnist
from cvae_mnist import UserError, evaluate, inference_cvae, negative_elbo, train_cvae


def test_an_epoch_takes_every_image_once_and_adams_rate_is_a_readers(train, monkeypatch, watch):
    numbers, train_step = torch.arange(250), cvae_mnist.train_step
    numbered = numbers.byte().view(-1, 1).expand(-1, 784), numbers % 10

    def slower_and_slower(model, optimizer, x, c):  # as with a scheduler
        train_step(model, optimizer, x, c)
        optimizer.param_groups[0]["lr"] *= 0.9

    monkeypatch.setattr(cvae_mnist, "train_step", slower_and_slower)
    steps, updates = watch("train_step"), watch("update_average")
    train = partial(train, batch_size=60, data_dir=write_images("numbers", numbered, numbered))
    train(epochs=1, learning_rate=0.01)
    train(epochs=12, learning_rate=0.01, resume=True)
    assert [update["step"] for update in updates] == [*range(60)]
    batches = [(255 * step["x"][:, 0]).round().long() for step in steps]
    assert [len(batch) for batch in batches] == [60, 60, 60, 60, 10] * 12
    for batch, step in zip(batches, steps, strict=True):
        assert torch.equal(step["c"].argmax(dim=1), batch % 10)
    orders = torch.cat(batches).view(12, 250)
    assert torch.equal(orders.sort(dim=1).values, numbers.expand(12, 250))
    assert len(orders.unique(dim=0)) == 12
    [group] = load()["optimizer_state_dict"]["param_groups"]
    assert group["lr"] == pytest.approx(0.01 * 0.9**60) and group["betas"] == (0.9, 0.99)
    assert type(steps[0]["optimizer"]) is torch.optim.Adam
    assert {*os.listdir("cvae_results")} == {"epoch_1.png", "epoch_10.png", "epoch_12.png"}


def test_the_history_is_what_the_saved_model_reaches_and_another_seed_gives_another(train, digits):
    (images, labels), test_set = digits
    images, labels = images.repeat(20, 1), labels.repeat(20)
    images[10_000:] = 255  # trained on, but not measured
    test_set = images[:500] // 2, labels[:500]
    write_images("data", (images, labels), test_set)
    model, history = train(epochs=2, batch_size=500, data_dir="data"), load()["history"]
    assert same(load()["model_state_dict"], model.state_dict()) and not model.training
    assert {len(losses) for losses in history.values()} == {2}
    reconstruction, kl = evaluate(model, images[:10_000], labels[:10_000])
    again = {"train_loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
    again["test_loss"] = sum(evaluate(model, *test_set))
    last = {name: losses[-1] for name, losses in history.items()}
    assert last == pytest.approx(again, rel=3e-3)
    assert last["train_loss"] == pytest.approx(last["reconstruction"] + last["kl"])
    assert history["train_loss"][0] > 1.01 * last["train_loss"]
    initial = [train(epochs=1, learning_rate=1e-9, seed=seed).fc1.weight for seed in (0, 1)]
    assert not torch.allclose(*initial, atol=1e-3)


@pytest.mark.parametrize("fast", {False, cvae_mnist.BFLOAT16})
def test_16_bits_are_used_to_train_and_to_evaluate_where_they_are_fast(train, monkeypatch, fast):
    monkeypatch.setattr(cvae_mnist, "BFLOAT16", fast)
    used = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda layer, _, output: used.add((torch.is_grad_enabled(), output.dtype))
    )
    train(epochs=1)
    hook.remove()
    bits = torch.bfloat16 if fast else torch.float32
    assert used == {(True, bits), (False, bits), (False, torch.float32)}  # the last: samples
    assert {value.dtype for value in load()["model_state_dict"].values()} == {torch.float32}


def test_trains_on_an_accelerator(train):
    device = cvae_mnist.pick_device()
    if device.type == "cpu":
        pytest.skip("no accelerator, or none that can compute")
    assert next(train(device=None).parameters()).device.type == device.type
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


def test_resuming_with_anything_else_names_every_difference(train, trained, digits, monkeypatch):
    write_images("letters", *digits, "KMNIST")
    before = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT)).read_bytes()
    error = pytest.raises(UserError, train, dataset="KMNIST", data_dir="letters", resume=True)
    error.match("dataset is MNIST .* but KMNIST here")
    monkeypatch.setattr(cvae_mnist, "load_images", Mock(side_effect=AssertionError))
    others = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}
    error = pytest.raises(UserError, train, **others, resume=True)  # before data are loaded
    for name, value in others.items():
        saved = load()["hyperparameters"].get(name, 4)  # epochs
        assert all(text in str(error.value) for text in (name, str(value), str(saved)))
    assert Path(CHECKPOINT).read_bytes() == before


def test_only_another_learning_rate_changes_the_optimizers(train, capsys):
    train(epochs=1)
    checkpoint = load()
    checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"] = 0.002  # a scheduler's
    for given, used in (0.003, 0.002), (0.001, 0.001):
        torch.save(checkpoint, CHECKPOINT)
        train(epochs=2, learning_rate=given, resume=True)
        assert load()["optimizer_state_dict"]["param_groups"][0]["lr"] == used
        assert load()["hyperparameters"]["learning_rate"] == given
        said = re.findall("learning_rate.*0.003.*0.001", capsys.readouterr().out)
        assert len(said) == (given == 0.001)


def test_a_wrong_argument_is_an_error_that_names_it_before_anything_happens(monkeypatch):
    monkeypatch.setattr(cvae_mnist, "load_images", Mock(side_effect=AssertionError))
    Path("file").touch()
    wrong = dict.fromkeys(["epochs", "batch_size", "h_dim", "z_dim"], [0, -1, 2.5, None])
    wrong |= {"num_classes": [5, 11, None], "learning_rate": [0, -1, float("nan"), float("inf")]}
    wrong |= {"device": ["nonsense", "meta", "cuda:99"]}
    for name, values in wrong.items():
        for value in values:
            pytest.raises(UserError, train_cvae, **{name: value}).match(f"{name}.* {value}")
    pytest.raises(OSError, train_cvae, out_dir="file").match("file")
    assert os.listdir() == ["file"]


@pytest.mark.skipif(not MNIST_ROOT, reason="set MNIST_ROOT to the folder that holds MNIST/raw")
def test_first_epochs_on_mnist():
    """A published log of the vae of pytorch/examples has 164.4 nats per image in epoch 1."""
    _, (images, labels), _ = cvae_mnist.load_images(MNIST_ROOT)
    torch.manual_seed(0)
    model, losses = cvae_mnist.CVAE(784, 400, 20, num_classes=0), []
    for layer in model.children():
        layer.reset_parameters()  # PyTorch's own initial weights
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in torch.randperm(60_000).split(128):
        losses.append(sum(negative_elbo(model, images[batch] / 255, model.one_hot(labels[batch]))))
        optimizer.zero_grad()
        losses[-1].mean().backward()
        optimizer.step()
    assert torch.cat(losses).mean().item() == pytest.approx(164.4, abs=1.5)
    train_cvae(2, data_dir=MNIST_ROOT, device="cpu")
    assert load()["hyperparameters"]["dataset"] == "MNIST"
    assert load()["history"]["test_loss"][-1] == pytest.approx(111.2, abs=2)
