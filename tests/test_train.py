"""train_cvae: the recipe, the history, resuming, what is refused, what it reaches on MNIST."""

import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from conftest import ACCELERATOR, CHECKPOINT, MNIST_ROOT, OLD, load, same

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, train_cvae


@pytest.fixture
def steps(monkeypatch):
    """Instead of training, notes each step: the optimizer, its batch, the step's number."""
    steps = []

    def train_step(model, optimizer, x, c):
        steps.append([optimizer, x[:, 0] * 255, c])

    monkeypatch.setattr(cvae_mnist, "train_step", train_step)
    monkeypatch.setattr(cvae_mnist, "update_average", lambda _, __, step: steps[-1].append(step))
    return steps


def test_an_epoch_takes_every_image_once_with_its_label_in_an_order_of_its_own(
    train, steps, monkeypatch
):
    numbers = torch.arange(250)
    data = numbers.byte().view(-1, 1).expand(-1, 784), numbers % 10
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", data, data))
    train(epochs=1, batch_size=60)
    train(epochs=2, batch_size=60, resume=True)
    assert [number for *_, number in steps] == list(range(10))  # counted on by the resumed run
    assert [len(x) for _, x, _, _ in steps] == [60, 60, 60, 60, 10] * 2
    orders = [torch.cat([x for _, x, _, _ in part]).round() for part in (steps[:5], steps[5:])]
    assert not torch.equal(*orders)
    for order, part in zip(orders, (steps[:5], steps[5:]), strict=True):
        assert torch.equal(order.sort().values, numbers) and not torch.equal(order, numbers)
        assert torch.equal(torch.cat([c for _, _, c, _ in part]).argmax(1), order.long() % 10)


def test_the_recipe_is_adams_and_nothing_changes_its_learning_rate(train, steps):
    model = train(epochs=12, learning_rate=0.01)
    other = train(epochs=1, learning_rate=0.01, seed=1)
    assert not torch.equal(model.fc1.weight, other.fc1.weight)  # the initial weights
    for optimizer, *_ in steps:
        assert type(optimizer) is torch.optim.Adam
        assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [
            (0.01, (0.9, 0.99))
        ]
    pictures = {path.name for path in Path("cvae_results").iterdir()}
    assert pictures == {"epoch_1.png", "epoch_10.png", "epoch_12.png"}


def test_the_history_is_what_the_returned_model_measured_after_each_epoch(train, monkeypatch):
    numbers = torch.arange(12_000)
    images, labels = numbers.view(-1, 1).expand(-1, 784).to(torch.uint8), numbers % 10
    test_set = images[:300] + 7, labels[:300]
    evaluate = Mock(side_effect=[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)])
    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", (images, labels), test_set))
    model = train(epochs=2, batch_size=1000)
    measured = [(images[:10_000], labels[:10_000]), test_set] * 2
    for call, pair in zip(evaluate.call_args_list, measured, strict=True):
        assert call.args[0] is model and same(list(call.args[1:]), list(pair))
    assert load()["history"] == {
        "train_loss": [3, 11],
        "reconstruction": [1, 5],
        "kl": [2, 6],
        "test_loss": [7, 15],
    }
    assert same(load()["model_state_dict"], model.state_dict()) and not model.training


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_trains_on_an_accelerator(train):
    assert next(train(device=None).parameters()).device.type == ACCELERATOR.type
    train(device=None, epochs=5, resume=True)
    assert inference_cvae().shape == (10, 1, 28, 28)


@pytest.mark.parametrize("num_classes", [10, 0])
def test_stopping_and_resuming_changes_no_bit(train, num_classes):
    whole = train(num_classes=num_classes, out_dir="whole")
    train(num_classes=num_classes, out_dir="parts", epochs=2)
    torch.manual_seed(99)  # what else the process did must not matter
    parts = train(num_classes=num_classes, out_dir="parts", resume=True)
    assert same(load("parts"), load("whole")) and same(parts.state_dict(), whole.state_dict())


def test_a_run_that_is_interrupted_or_diverges_resumes_from_its_last_good_epoch(
    train, trained, monkeypatch
):
    interrupted = Mock(wraps=cvae_mnist.evaluate, side_effect=[DEFAULT] * 4 + [KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cvae_mnist, "evaluate", interrupted)
        train()
    with pytest.raises(UserError, match="learning_rate"):
        train(learning_rate=1e30, resume=True)
    assert load()["epoch"] == 2
    train(resume=True)
    assert same(load(), load(trained))


def test_resuming_a_finished_run_only_draws_the_losses(train, trained, steps):
    before = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT)).read_bytes()
    model = train(resume=True)
    assert same(model.state_dict(), load()["model_state_dict"]) and not model.training
    assert Path(CHECKPOINT).read_bytes() == before and not steps
    assert Path("CVAE_loss.png").exists() and not Path(OLD).exists()


def test_resuming_with_anything_else_names_every_difference_before_data_are_loaded(
    train, trained, monkeypatch
):
    before = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT)).read_bytes()
    others = {"batch_size": 64, "h_dim": 17, "z_dim": 5, "num_classes": 0, "seed": 7, "epochs": 3}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Cannot resume") as error:
        patch.setattr(cvae_mnist, "load_images", lambda *_: pytest.fail("data were loaded"))
        train(**others, resume=True)
    for name, value in others.items():
        saved = load()["hyperparameters"].get(name, 4)  # epochs
        assert all(text in str(error.value) for text in (name, str(value), str(saved)))
    with pytest.raises(UserError, match="dataset is MNIST .* but built-in digits here"):
        train(dataset="built-in digits", resume=True)
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", "6"),
        ("epochs", 2.5),
        ("num_classes", 5),
        ("num_classes", 11),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("h_dim", -1),
        ("z_dim", None),
        ("seed", "x"),
        ("learning_rate", -1),
        ("device", "nonsense"),
        ("device", "meta"),
        ("device", "cuda:99"),
        ("out_dir", None),
        ("out_dir", "file"),
        ("out_dir", "file/below"),
    ],
)
def test_a_wrong_argument_is_an_error_before_anything_happens(monkeypatch, name, value):
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: pytest.fail("data were loaded"))
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
    assert load()["hyperparameters"]["dataset"] == "MNIST"
    assert load()["history"]["test_loss"][-1] == pytest.approx(111.2, abs=2)
