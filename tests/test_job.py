"""The main job, as users run it: train, look at the files, draw what was asked for."""

import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cvae_mnist
from cvae_mnist import inference_cvae, load_checkpoint, restyle_cvae, train_cvae


class TutorialCVAE(nn.Module):
    """The layers as the tutorial's own listing has them; nothing of cvae_mnist in it."""

    def __init__(self, h_dim=600, z_dim=50):
        super().__init__()
        self.fc1 = nn.Linear(784 + 10, h_dim)
        self.fc2 = nn.Linear(h_dim, z_dim)
        self.fc3 = nn.Linear(h_dim, z_dim)
        self.fc4 = nn.Linear(z_dim + 10, h_dim)
        self.fc5 = nn.Linear(h_dim, 784)

    def decode(self, z, c):
        return torch.sigmoid(self.fc5(F.relu(self.fc4(torch.cat([z, c], 1)))))


def test_command_line_does_the_whole_job(run, data_dir, tmp_path):
    done = run("--epochs", 2, "--h-dim", 32, "--z-dim", 4, "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pictures = {"CVAE_loss.png", "CVAE_6.png", "CVAE_0-9.png", "CVAE_styles.png", "cvae_results/epoch_2.png"}
    assert files == {"cvae_checkpoint.pth", *pictures}
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    for line in lines:
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        loss, reconstruction, kl, test, seconds = numbers
        assert loss == pytest.approx(reconstruction + kl, abs=0.02) and test > 0 and seconds >= 0


def test_steps_can_be_named(run, data_dir, tmp_path, small):
    train_cvae(out_dir=tmp_path, **small)
    done = run("draw", "--digit", 3, "--temperature", 0.7, "--seed", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.glob("*.png")} == {"CVAE_loss.png", "CVAE_3.png"}
    assert run("restyle", "--data-dir", data_dir).returncode == 0
    assert (tmp_path / "CVAE_styles.png").exists()




def test_files_are_pictures_of_the_right_size(trained, data_dir, tmp_path):
    inference_cvae(out_dir=trained, input=7, flag=True)
    inference_cvae(out_dir=trained)
    restyle_cvae(out_dir=trained, data_dir=data_dir)
    # 3 pixels on the screen for each: 10 x 10 digits of 28, gaps of 3, 22 for title and captions
    sizes = {
        "cvae_results/epoch_2.png": (939, 1005),
        "CVAE_7.png": (636, 342),
        "CVAE_0-9.png": (636, 342),
        "CVAE_styles.png": (1032, 1005),
        "CVAE_loss.png": (600, 700),
    }
    for name, size in sizes.items():
        with Image.open(trained / name) as picture:
            assert (name, picture.size) == (name, size)
            assert picture.convert("L").getextrema()[0] < 100  # not blank


def test_a_grid_every_ten_epochs_and_after_the_last(data_dir, tmp_path):
    train_cvae(12, batch_size=500, h_dim=8, z_dim=2, data_dir=data_dir, out_dir=tmp_path)
    assert {path.name for path in (tmp_path / "cvae_results").iterdir()} == {"epoch_10.png", "epoch_12.png"}


def test_grids_keep_their_z(monkeypatch, trained):
    _, model = load_checkpoint(trained)
    seen = []
    monkeypatch.setattr(cvae_mnist, "draw", lambda model, z, c: seen.append((z, c)) or torch.zeros(100, 1, 28, 28))
    for epoch in (10, 20):
        cvae_mnist.save_samples(model, trained / "grid.png", f"epoch {epoch}")
    (z, c), (again, _) = seen
    assert torch.equal(z, again)
    assert torch.equal(c.argmax(1), torch.arange(10).repeat(10))  # a column per digit
    assert all(torch.equal(row, row[:1].expand_as(row)) for row in z.split(10))  # a row per style
    assert len(z.unique(dim=0)) == 10


def test_checkpoint_is_what_it_says(trained, small):
    checkpoint = torch.load(trained / "cvae_checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["dataset"] == "MNIST"
    assert checkpoint["hyperparameters"]["h_dim"] == 64 and checkpoint["hyperparameters"]["batch_size"] == 128
    history = checkpoint["history"]
    assert set(history) >= {"train_loss", "reconstruction", "kl", "test_loss"}
    assert all(len(losses) == 2 and all(isinstance(loss, float) for loss in losses) for losses in history.values())
    for loss, reconstruction, kl in zip(history["train_loss"], history["reconstruction"], history["kl"], strict=True):
        assert loss == pytest.approx(reconstruction + kl)
    assert len(checkpoint["optimizer_state_dict"]["state"]) == len(checkpoint["model_state_dict"]) == 10


def test_train_returns_what_it_saved(data_dir, tmp_path, small):
    model = train_cvae(out_dir=tmp_path, **small)
    saved = load_checkpoint(tmp_path)[1].state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("textbook", [False, True])
@pytest.mark.parametrize("num_classes", [10, 0])
def test_the_loss_falls(data_dir, tmp_path, textbook, num_classes):
    options = dict(h_dim=64, z_dim=8, num_classes=num_classes, textbook=textbook)
    train_cvae(4, batch_size=64, data_dir=data_dir, out_dir=tmp_path, **options)
    history = load_checkpoint(tmp_path)[0]["history"]
    for name in ("train_loss", "test_loss", "train_loss_after"):
        assert history[name][-1] < 0.85 * history[name][0], name


def test_inference_draws_ten_digits(trained):
    every, six = inference_cvae(out_dir=trained, seed=1), inference_cvae(input=6, flag=True, out_dir=trained, seed=1)
    for images in (every, six):
        assert images.shape == (10, 1, 28, 28) and images.device.type == "cpu" and not images.requires_grad
        assert images.min() >= 0 and images.max() <= 1
        assert len(images.unique(dim=0)) == 10
    assert torch.equal(every[6], six[6])  # the same z, the same digit
    assert torch.equal(every, inference_cvae(input=3, out_dir=trained, seed=1))  # flag=False ignores input


def test_drawings_are_fresh_unless_seeded(trained):
    assert not torch.equal(inference_cvae(out_dir=trained), inference_cvae(out_dir=trained))
    assert torch.equal(inference_cvae(out_dir=trained, seed=5), inference_cvae(out_dir=trained, seed=5))


def test_temperature_scales_z(trained, monkeypatch):
    seen, draw = [], cvae_mnist.draw
    monkeypatch.setattr(cvae_mnist, "draw", lambda model, z, c: seen.append(z) or draw(model, z, c))
    for temperature in (1.0, 0.5):
        inference_cvae(4, True, temperature=temperature, seed=3, out_dir=trained)
    assert torch.allclose(0.5 * seen[0], seen[1])
    cold = inference_cvae(4, True, temperature=0, out_dir=trained)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-5)  # no z left: ten times the same drawing


def test_the_label_steers_the_drawing(data_dir, digits, tmp_path):
    """Drawings of digit d are nearest to the mean image of d, for most digits, after a short training."""
    train_cvae(15, batch_size=32, learning_rate=3e-3, h_dim=64, z_dim=4, data_dir=data_dir, out_dir=tmp_path)
    (images, labels), _ = digits
    means = torch.stack([images[labels == digit].flatten(1).float().mean(0) / 255 for digit in range(10)])
    drawn = torch.stack([inference_cvae(d, True, seed=0, out_dir=tmp_path).flatten(1).mean(0) for d in range(10)])
    assert (torch.cdist(drawn, means).argmin(1) == torch.arange(10)).sum() >= 9


def test_restyle_shows_originals_styles_and_reconstructions(trained, data_dir, digits):
    _, (images, labels) = digits
    rows = restyle_cvae(out_dir=trained, data_dir=data_dir)
    assert rows.shape == (10, 11, 1, 28, 28)
    first = [labels.tolist().index(digit) for digit in range(10)]
    assert torch.equal(rows[:, 0, 0], images[first] / 255)
    _, model = load_checkpoint(trained)
    with torch.no_grad():
        mu, _ = model.encode(rows[:, 0], torch.eye(10))
        for label in (0, 7):
            expected = model.decode(mu, torch.eye(10)[[label] * 10]).view(10, 1, 28, 28)
            assert torch.allclose(rows[:, 1 + label], expected, atol=1e-6)
    assert torch.equal(restyle_cvae([5, 3, 5], data_dir, trained)[:, 0, 0], images[[5, 3, 5]] / 255)


def test_restyle_marks_each_digits_own_label(trained, data_dir, digits, monkeypatch):
    seen = {}
    monkeypatch.setattr(cvae_mnist, "save_grid", lambda *grid: seen.update(captions=grid[4], boxed=grid[5]))
    restyle_cvae([0, 1, 2], data_dir, trained)
    labels = digits[1][1][:3].tolist()
    assert seen["boxed"] == [row * 11 + 1 + label for row, label in enumerate(labels)]
    assert seen["captions"] == ["original", *range(10)]


def test_plain_vae_does_the_whole_job(run, data_dir, tmp_path):
    done = run("--num-classes", 0, "--epochs", 1, "--h-dim", 16, "--z-dim", 2, "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    names = {"CVAE_loss.png", "CVAE_0-9.png", "CVAE_styles.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert inference_cvae(out_dir=tmp_path).shape == (10, 1, 28, 28)
    assert restyle_cvae(out_dir=tmp_path, data_dir=data_dir).shape == (10, 2, 1, 28, 28)
    with Image.open(tmp_path / "CVAE_styles.png") as picture:
        assert picture.width == 600  # two narrow columns, but the title fits
    with pytest.raises(ValueError, match="plain VAE"):
        inference_cvae(input=6, flag=True, out_dir=tmp_path)


def test_draws_from_the_tutorials_own_checkpoint(tmp_path):
    model = TutorialCVAE(h_dim=32, z_dim=4)
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint = {"epoch": 99, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "cvae_checkpoint.pth")
    images = inference_cvae(input=6, flag=True, out_dir=tmp_path, seed=0)
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(images.view(10, 784), model.decode(z, torch.eye(10)[[6] * 10]), atol=1e-6)


def test_the_tutorials_own_listing_loads_ours(trained):
    checkpoint = torch.load(trained / "cvae_checkpoint.pth")
    model = TutorialCVAE(h_dim=64, z_dim=8)
    model.load_state_dict(checkpoint["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])


def test_the_average_is_nearer_to_the_goal_than_the_weights_it_follows(data_dir, digits, tmp_path):
    """What averaging is for: at a large learning rate the average tests better than the weights that wander."""
    train_cvae(12, batch_size=32, learning_rate=1e-2, h_dim=64, z_dim=8, data_dir=data_dir, out_dir=tmp_path)
    checkpoint, average = load_checkpoint(tmp_path)
    _, moving = load_checkpoint(tmp_path)
    moving.load_state_dict(checkpoint["training_state_dict"])
    images, labels = digits[1]
    losses = [cvae_mnist.average_loss(m, images.flatten(1), labels, torch.eye(10)) for m in (average, moving)]
    assert losses[0] < losses[1]


def test_first_epoch_on_the_real_mnist(mnist_root, tmp_path):
    """The textbook recipe is known to give about 159.5 nats per image in epoch 1, in several independent codes."""
    train_cvae(1, learning_rate=1e-3, textbook=True, data_dir=mnist_root, out_dir=tmp_path)
    checkpoint, _ = load_checkpoint(tmp_path)
    assert checkpoint["dataset"] == "MNIST"
    assert checkpoint["history"]["train_loss"][0] == pytest.approx(159.5, abs=3)
    assert checkpoint["history"]["test_loss"][0] == pytest.approx(127, abs=3)
