"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import math

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, CHECKPOINT, load, same

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, load_checkpoint, train_cvae


@pytest.fixture
def no_data(monkeypatch):
    """Reading or making data fails the test."""
    for name in ("read_mnist", "download_mnist", "built_in_digits"):
        monkeypatch.setattr(cvae_mnist, name, lambda *_: pytest.fail("data was read"))


def break_training(monkeypatch, epoch, breakage):
    """From this epoch on, breakage(model) precedes the last step of an epoch."""
    real, epochs = cvae_mnist.train_epoch, []

    def broken(model, *arguments):
        epochs.append(model)
        for loss in real(model, *arguments):
            if len(epochs) >= epoch:
                breakage(model)
            yield loss

    monkeypatch.setattr(cvae_mnist, "train_epoch", broken)


# The recipe


def test_the_recipe_is_what_the_readme_says(quick, monkeypatch):
    seen, steps = [], []

    def train_epoch(model, optimizer, images, labels, batch_size):
        group = optimizer.param_groups[0]
        seen.append((type(optimizer), group["betas"], group["lr"], batch_size, len(images)))
        yield from torch.zeros(24)

    monkeypatch.setattr(cvae_mnist, "train_epoch", train_epoch)
    monkeypatch.setattr(cvae_mnist, "update_average", lambda average, model, step: steps.append(step))
    quick = {**quick, "batch_size": 25, "learning_rate": 0.01}
    train_cvae(**{**quick, "epochs": 2})
    train_cvae(**{**quick, "epochs": 3}, resume=True)
    assert seen == [(torch.optim.Adam, (0.9, 0.99), rate, 25, 600) for rate in (0.005, 0.01, 0.01)]
    # Every tenth step of all, and the last of an epoch.
    assert steps == [0, 10, 20, 23, 30, 40, 47, 50, 60, 70, 71]


def test_every_epoch_has_random_numbers_of_its_own_in_every_run(quick, monkeypatch):
    seeds = []

    def train_epoch(*_):
        seeds.append(torch.initial_seed())
        yield torch.tensor(0.0)

    monkeypatch.setattr(cvae_mnist, "train_epoch", train_epoch)
    models = [train_cvae(**{**quick, "epochs": 12}, seed=seed, out_dir=str(seed)) for seed in (0, 1)]
    assert len(set(seeds)) == 24
    assert not torch.equal(models[0].fc1.weight, models[1].fc1.weight)  # nor are the initial weights the same


def test_the_history_is_what_the_returned_model_measured_on_as_many_training_as_test_images(quick, monkeypatch):
    real, seen = cvae_mnist.evaluate, []

    def evaluate(model, images, labels):
        seen.append((model, images, labels, real(model, images, labels)))
        return seen[-1][-1]

    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    many = torch.arange(12_000).view(-1, 1).expand(-1, 784).to(torch.uint8), torch.arange(12_000) % 10
    few = many[0][:300] + 7, many[1][:300]
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda _: ("MNIST", many, few))
    model = train_cvae(**{**quick, "epochs": 2, "batch_size": 1000})
    (_, images, labels, _), (_, test_images, test_labels, _) = seen[:2]
    assert torch.equal(images, many[0][:10_000]) and torch.equal(labels, many[1][:10_000])
    assert torch.equal(test_images, few[0]) and torch.equal(test_labels, few[1])
    assert all(one is model for one, *_ in seen) and not model.training
    (train_1, test_1, train_2, test_2) = [losses for *_, losses in seen]
    assert load(".")["history"] == {
        "train_loss": [sum(train_1), sum(train_2)], "reconstruction": [train_1[0], train_2[0]],
        "kl": [train_1[1], train_2[1]], "test_loss": [sum(test_1), sum(test_2)]}
    assert same(load(".")["model_state_dict"], model.state_dict())


def test_trains_on_an_accelerator(quick):
    if ACCELERATOR is None:
        pytest.skip("no accelerator")
    model = train_cvae(**{**quick, "device": None})
    assert next(model.parameters()).device.type == ACCELERATOR.type
    train_cvae(**{**quick, "device": None, "epochs": 5}, resume=True)
    assert inference_cvae(device="cpu").shape == (10, 1, 28, 28)


# Resuming


@pytest.mark.parametrize("num_classes", [10, 0])
def test_stopping_and_resuming_changes_no_bit(quick, num_classes):
    whole = train_cvae(**quick, num_classes=num_classes, out_dir="whole")
    train_cvae(**{**quick, "epochs": 2}, num_classes=num_classes, out_dir="parts")
    torch.manual_seed(99)  # what else the process did must not matter
    parts = train_cvae(**quick, num_classes=num_classes, out_dir="parts", resume=True)
    assert same(load("parts"), load("whole")) and load("parts")["epoch"] == 4
    assert same(parts.state_dict(), whole.state_dict())


def test_an_interrupted_run_resumes_to_the_same_end(quick, trained, monkeypatch):
    def interrupt(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        break_training(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_cvae(**quick)
    assert load(".")["epoch"] == 2
    train_cvae(**quick, resume=True)
    assert same(load("."), load(trained))


def test_resuming_a_finished_run_trains_nothing_and_draws_the_losses_again(quick, here, monkeypatch):
    model = train_cvae(**quick)
    before = (here / CHECKPOINT).read_bytes()
    (here / "CVAE_loss.png").unlink()
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: pytest.fail("trained"))
    again = train_cvae(**quick, resume=True)
    assert same(again.state_dict(), model.state_dict()) and not again.training
    assert (here / CHECKPOINT).read_bytes() == before and (here / "CVAE_loss.png").exists()


OTHERS = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_something_else_is_refused_and_named(quick, trained, here, name):
    (here / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes())
    with pytest.raises(UserError, match=f"Cannot resume.*{name}.*{OTHERS[name]}"):
        train_cvae(**{**quick, name: OTHERS[name]}, resume=True)
    assert same(load("."), load(trained))


def test_resuming_with_other_data_is_refused_and_every_difference_is_named(quick, trained):
    torch.save({**load(trained), "dataset": "other digits"}, CHECKPOINT)
    with pytest.raises(UserError, match="other digits.*MNIST.*z_dim.*seed"):
        train_cvae(**{**quick, "z_dim": 5, "seed": 7}, resume=True)


def test_the_learning_rate_may_change_and_that_is_said(quick, capsys):
    train_cvae(**{**quick, "epochs": 1})
    train_cvae(**{**quick, "epochs": 2}, learning_rate=0.001, resume=True)
    assert "learning_rate is now 0.001, it was 0.003" in capsys.readouterr().out
    assert load(".")["optimizer_state_dict"]["param_groups"][0]["lr"] == 0.001
    assert load(".")["hyperparameters"]["learning_rate"] == 0.001


# What is refused


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", 0), ("epochs", "6"), ("num_classes", 5), ("num_classes", 11), ("batch_size", 2.5), ("h_dim", 16.0),
    ("z_dim", None), ("seed", 1.5), ("learning_rate", -1), ("learning_rate", math.nan), ("device", "nonsense"),
    ("device", "meta"), ("device", "cuda:99"), ("out_dir", None)], ids=str)  # fmt: skip
def test_a_wrong_argument_is_an_error_before_anything_happens(no_data, here, name, value):
    with pytest.raises((TypeError, ValueError)):
        train_cvae(**{name: value})
    assert not any(here.iterdir())


@pytest.mark.parametrize("out_dir", ["file", "file/below", "/proc/below"])
def test_a_folder_that_cannot_be_written_is_an_error_before_data_are_read(no_data, here, out_dir):
    (here / "file").touch()
    with pytest.raises(OSError):
        train_cvae(out_dir=out_dir, device="cpu")


def test_numbers_from_numpy_are_stored_as_plain_ones(quick, trained):
    """A checkpoint that holds numpy's numbers could not be loaded."""
    quick = {name: np.int64(value) if isinstance(value, int) else value for name, value in quick.items()}
    train_cvae(**{**quick, "epochs": np.int64(3)}, learning_rate=np.float64(3e-3), seed=np.uint8(0))
    train_cvae(**quick, learning_rate=np.float64(3e-3), resume=True)
    assert same(load("."), load(trained))
    assert inference_cvae(np.int64(3), True, np.float32(0.5), np.int64(5)).shape == (10, 1, 28, 28)


def nan_in_the_weights(model):
    torch.nn.init.constant_(model.fc3.bias, math.nan)


def overflow(model):
    torch.nn.init.constant_(model.fc3.bias, 1e4)  # the exponential of log_var is infinite


@pytest.mark.parametrize("breakage", [nan_in_the_weights, overflow])
def test_divergence_keeps_the_last_good_epoch_from_which_a_lower_rate_continues(quick, monkeypatch, breakage):
    with monkeypatch.context() as patch:
        break_training(patch, 3, breakage)
        with pytest.raises(UserError, match="epoch 3.*learning_rate.*0.003"):
            train_cvae(**quick)
    assert load(".")["epoch"] == 2
    train_cvae(**quick, learning_rate=0.001, resume=True)
    assert load(".")["epoch"] == 4


# What it reaches


def test_the_label_decides_which_digit_is_drawn(quick, digits):
    """Drawings of a digit are nearest to that digit's mean image, for most digits, after a short training."""
    train_cvae(**{**quick, "epochs": 20, "h_dim": 64})
    images, labels = digits[0]
    means = torch.stack([images[labels == digit].float().mean(0) / 255 for digit in range(10)])
    drawn = torch.stack([inference_cvae(digit, True, seed=0).flatten(1).mean(0) for digit in range(10)])
    assert (torch.cdist(drawn, means).argmin(1) == torch.arange(10)).sum() >= 9


def test_first_epochs_on_mnist(mnist_root):
    """Textbook recipe: about 159.5 nats per image in epoch 1, in several independent codes."""
    import benchmark

    assert sum(benchmark.Textbook(mnist_root).epoch()) == pytest.approx(159.5, abs=3)
    train_cvae(2, data_dir=mnist_root, device="cpu")
    checkpoint, _ = load_checkpoint(".")
    assert checkpoint["dataset"] == "MNIST" and checkpoint["history"]["test_loss"][-1] == pytest.approx(113, abs=2)
