"""The main job, as users run it: train, look at the files, draw what was asked for."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist
from cvae_mnist import evaluate, inference_cvae, load_checkpoint, restyle_cvae, train_cvae


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


@pytest.fixture
def grids(monkeypatch):
    """What save_grid is asked to draw, while it still does."""
    grids, save_grid = [], cvae_mnist.save_grid

    def look(images, path, title, columns, captions=(), boxed=()):
        grids.append(dict(images=images, title=title, columns=columns, captions=list(captions), boxed=list(boxed)))
        save_grid(images, path, title, columns, captions, boxed)

    monkeypatch.setattr(cvae_mnist, "save_grid", look)
    return grids


def test_command_line_does_the_whole_job(run, data_dir, tmp_path):
    done = run("--epochs", 2, "--h-dim", 32, "--z-dim", 4, "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pictures = {"CVAE_loss.png", "CVAE_6.png", "CVAE_0-9.png", "CVAE_styles.png", "cvae_results/epoch_2.png"}
    assert files == {"cvae_checkpoint.pth", *pictures}
    first, promise, *lines = done.stdout.splitlines()
    assert first == "MNIST: 2,000 images to train on, 400 to test on. Device: cpu"
    assert "Every finished epoch is saved" in promise and "--resume" in promise
    history = load_checkpoint(tmp_path)[0]["history"]
    for epoch, line in enumerate(lines[:2]):
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        expected = [history[name][epoch] for name in ("train_loss", "reconstruction", "kl", "test_loss")]
        assert line.startswith(f"epoch {epoch + 1}/2  loss ") and numbers[:4] == pytest.approx(expected, abs=0.006)
        assert re.search(r"= [\d.]+ reconstruction \+ [\d.]+ KL  test [\d.]+  [\d.]+ s  [\d.]+ min left$", line)
    assert lines[1].endswith(" 0.0 min left")
    assert all(line.startswith("CVAE on MNIST, epoch 2") for line in lines[2:]) and len(lines) == 6
    assert f"test loss {history['test_loss'][-1]:.2f} nats per image" in lines[2]
    for line, name in zip(lines[3:], ["CVAE_6.png", "CVAE_0-9.png", "CVAE_styles.png"], strict=True):
        assert line.endswith(name)


def test_steps_can_be_named(run, data_dir, tmp_path, small):
    train_cvae(out_dir=tmp_path, **small)
    done = run("draw", "--digit", 3, "--temperature", 0.7, "--seed", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.glob("*.png")} == {"CVAE_loss.png", "CVAE_3.png"}
    expected = (tmp_path / "CVAE_3.png").read_bytes()
    inference_cvae(3, True, temperature=0.7, seed=1, out_dir=tmp_path)
    assert (tmp_path / "CVAE_3.png").read_bytes() == expected
    cvae_mnist.main(["restyle", "--data-dir", str(data_dir), "--out-dir", str(tmp_path)])
    assert (tmp_path / "CVAE_styles.png").exists() and not (tmp_path / "CVAE_6.png").exists()


# Training


def test_files_are_pictures_of_the_right_size(trained, data_dir):
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


def test_a_picture_shows_its_images_black_on_white_where_they_belong(tmp_path):
    images = torch.zeros(4, 1, 28, 28)
    images[2] = 1
    cvae_mnist.save_grid(images, tmp_path / "grid.png", "four", 2, boxed=[1])
    with Image.open(tmp_path / "grid.png") as picture:
        grid = picture.convert("L")
        margin = (picture.width - 3 * (3 + 2 * 31)) // 2
        middles = [(margin + 3 * (17 + 31 * (i % 2)), 3 * (22 + 17 + 31 * (i // 2))) for i in range(4)]
        assert [grid.getpixel(middle) for middle in middles] == [255, 255, 0, 255]
        red = (pil_to_tensor(picture.convert("RGB")).int() * torch.tensor([1, -1, -1]).view(3, 1, 1)).sum(0) > 60
        rows, columns = [where.tolist() for where in red.nonzero(as_tuple=True)]
        box = [min(columns) - margin, max(columns) - margin, min(rows), max(rows)]
        assert box == pytest.approx([3 * 33, 3 * 63, 3 * 24, 3 * 54], abs=5)  # around the second image


def test_a_grid_every_ten_epochs_and_after_the_last(data_dir, tmp_path):
    train_cvae(12, batch_size=500, h_dim=8, z_dim=2, data_dir=data_dir, out_dir=tmp_path)
    assert {path.name for path in (tmp_path / "cvae_results").iterdir()} == {"epoch_10.png", "epoch_12.png"}


@pytest.mark.parametrize(("num_classes", "styles"), [(10, 10), (0, 100)])
def test_grids_have_a_column_per_digit_and_a_row_per_style(grids, tmp_path, num_classes, styles):
    torch.manual_seed(0)
    model = cvae_mnist.CVAE(h_dim=64, z_dim=2, num_classes=num_classes)
    nn.init.normal_(model.fc4.weight), nn.init.normal_(model.fc5.weight)
    for title in ("one epoch", "another"):
        cvae_mnist.save_samples(model, tmp_path / "grid.png", title)
    first, again = grids
    assert torch.equal(first["images"], again["images"])  # the same z's at every epoch
    assert first["columns"] == 10 and first["captions"] == list(range(num_classes)) and first["title"] == "one epoch"
    assert len(first["images"].unique(dim=0)) == 100
    z = torch.randn(styles, 2, generator=torch.Generator().manual_seed(0))
    for column in range(num_classes):
        assert torch.allclose(first["images"][column::10], cvae_mnist.generate(model, z, [column] * 10), atol=1e-6)


def test_checkpoint_is_what_it_says(trained, small, digits):
    checkpoint = torch.load(trained / "cvae_checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["dataset"] == "MNIST"
    hyperparameters = dict(batch_size=256, learning_rate=3e-3, h_dim=64, z_dim=8, num_classes=10, seed=0)
    assert checkpoint["hyperparameters"] == hyperparameters
    history = checkpoint["history"]
    assert list(history) == ["train_loss", "reconstruction", "kl", "test_loss"]
    assert all(len(losses) == 2 and all(isinstance(loss, float) for loss in losses) for losses in history.values())
    assert len(checkpoint["optimizer_state_dict"]["state"]) == len(checkpoint["model_state_dict"]) == 10
    # The losses are those of the averaged weights, which model_state_dict holds.
    _, average = load_checkpoint(trained)
    _, training = load_checkpoint(trained)
    training.load_state_dict(checkpoint["training_state_dict"])
    (images, labels), (test_images, test_labels) = digits
    reconstruction, kl = evaluate(average, images, labels)
    assert history["kl"][-1] == pytest.approx(kl, rel=1e-5)  # KL has no noise
    assert history["kl"][-1] != pytest.approx(evaluate(training, images, labels)[1], rel=1e-3)
    assert history["reconstruction"][-1] == pytest.approx(reconstruction, rel=0.02)
    assert history["train_loss"][-1] == pytest.approx(reconstruction + kl, rel=0.02)
    test_loss = sum(evaluate(average, test_images, test_labels))
    assert history["test_loss"][-1] == pytest.approx(test_loss, rel=0.01)
    assert abs(test_loss - sum(evaluate(training, test_images, test_labels))) > 0.02 * test_loss


def test_each_epoch_measures_the_averaged_weights_on_as_many_training_as_test_images(small, tmp_path, monkeypatch):
    seen, real = [], evaluate

    def look(model, images, labels):
        seen.append((model, images, labels))
        return real(model, images, labels)

    monkeypatch.setattr(cvae_mnist, "evaluate", look)
    images = torch.arange(12_000).view(-1, 1).expand(-1, 784) % 256
    train, test = [(images[:n].to(torch.uint8), torch.arange(n) % 10) for n in (12_000, 300)]
    monkeypatch.setattr(cvae_mnist, "load_digits", lambda *_: ("MNIST", train, test))
    average = train_cvae(out_dir=tmp_path, **{**small, "epochs": 1})
    [(one, images, labels), (other, test_images, _)] = seen
    assert one is other is average
    assert torch.equal(images, train[0][:10_000]) and torch.equal(labels, train[1][:10_000])
    assert torch.equal(test_images, test[0])


def test_train_returns_what_it_saved(trained, small, tmp_path):
    model = train_cvae(out_dir=tmp_path, **small)
    saved = load_checkpoint(tmp_path)[1].state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_every_epoch_has_random_numbers_of_its_own(small, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: seeds.append(torch.initial_seed()))
    models = [train_cvae(out_dir=tmp_path, **{**small, "epochs": 4}, seed=seed) for seed in (0, 1)]
    assert len(set(seeds)) == 8
    assert not torch.equal(models[0].fc1.weight, models[1].fc1.weight)  # nor are the initial weights the same


def test_the_time_left_is_that_of_the_epochs_to_come(small, tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(perf_counter=iter(range(0, 10_000, 90)).__next__)
    monkeypatch.setattr(cvae_mnist, "time", clock)
    train_cvae(out_dir=tmp_path, **{**small, "epochs": 3})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[-2:] for line in lines] == [["90.0 s", f"{left} min left"] for left in (3.0, 1.5, 0.0)]


def test_the_optimizer_is_what_the_readme_says(small, tmp_path, monkeypatch):
    seen = []

    def train_epoch(model, average, optimizer, *_):
        seen.append((type(optimizer), optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(cvae_mnist, "train_epoch", train_epoch)
    train_cvae(out_dir=tmp_path, **{**small, "epochs": 2}, learning_rate=0.0123)
    train_cvae(out_dir=tmp_path, **{**small, "epochs": 4}, learning_rate=0.0123, resume=True)
    rates = [0.0123 / 2, 0.0123, 0.0123, 0.0123]
    assert seen == [(torch.optim.Adam, (0.9, 0.99), rate) for rate in rates]


@pytest.mark.parametrize("num_classes", [10, 0])
def test_the_loss_falls(data_dir, tmp_path, num_classes):
    train_cvae(4, batch_size=64, h_dim=64, z_dim=8, num_classes=num_classes, data_dir=data_dir, out_dir=tmp_path)
    history = load_checkpoint(tmp_path)[0]["history"]
    for name in ("train_loss", "test_loss"):
        assert history[name][-1] < 0.92 * history[name][0], name


def test_the_loss_figure_shows_the_history(trained, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(cvae_mnist, "save_figure", lambda figure, path: figures.append(figure))
    history = {"train_loss": [5.0, 3.0], "reconstruction": [4.0, 1.0], "kl": [1.0, 2.0], "test_loss": [6.0, 4.0]}
    cvae_mnist.save_loss_figure(history, tmp_path / "loss.png", "title")
    total, reconstruction, kl = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for axes in figures[0].axes for line in axes.get_lines()}
    assert drawn == {
        "training images: 3.00": [5, 3],
        "test images: 4.00": [6, 4],
        "reconstruction, training images: 1.00": [4, 1],
        "KL divergence, training images: 2.00": [1, 2],
    }
    assert len(total.get_lines()) == 2 and list(total.get_lines()[0].get_xdata()) == [1, 2]
    assert (total.get_title(), total.get_ylabel(), kl.get_xlabel()) == ("title", "nats per image", "epoch")
    assert all(axes.get_legend() for axes in figures[0].axes)


# Drawing


def test_inference_draws_ten_digits(trained, grids):
    every, six = inference_cvae(out_dir=trained, seed=1), inference_cvae(input=6, flag=True, out_dir=trained, seed=1)
    for images in (every, six):
        assert images.shape == (10, 1, 28, 28) and images.device.type == "cpu" and not images.requires_grad
        assert images.min() >= 0 and images.max() <= 1
        assert len(images.unique(dim=0)) == 10
    z = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    _, model = load_checkpoint(trained)
    assert torch.equal(every, cvae_mnist.generate(model, z, range(10)))
    assert torch.equal(six, cvae_mnist.generate(model, z, [6] * 10))
    for ignored in (3, 99, None):
        assert torch.equal(every, inference_cvae(input=ignored, out_dir=trained, seed=1))
    assert [grid["captions"] for grid in grids[:2]] == [list(range(10)), [6] * 10]
    assert all(grid["columns"] == 5 and grid["title"] == "CVAE on MNIST, epoch 2" for grid in grids)
    assert torch.equal(grids[0]["images"], every) and torch.equal(grids[1]["images"], six)


def test_drawings_are_fresh_unless_seeded(trained):
    drawn = [inference_cvae(out_dir=trained, seed=seed) for seed in (None, None, 5, 6, 5)]
    assert torch.equal(drawn[2], drawn[4])
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_temperature_scales_z(trained, monkeypatch):
    seen, generate = [], cvae_mnist.generate
    monkeypatch.setattr(cvae_mnist, "generate", lambda model, z, c: seen.append(z) or generate(model, z, c))
    for temperature in (1.0, 0.5, 2):
        inference_cvae(4, True, temperature=temperature, seed=3, out_dir=trained)
    assert torch.allclose(0.5 * seen[0], seen[1]) and torch.allclose(2 * seen[0], seen[2])
    cold = inference_cvae(4, True, temperature=0, out_dir=trained)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-5)  # no z left: ten times the same drawing


def test_the_label_steers_the_drawing(data_dir, digits, tmp_path):
    """Drawings of digit d are nearest to the mean image of d, for most digits, after a short training."""
    train_cvae(15, batch_size=32, h_dim=64, z_dim=4, data_dir=data_dir, out_dir=tmp_path)
    (images, labels), _ = digits
    means = torch.stack([images[labels == digit].float().mean(0) / 255 for digit in range(10)])
    drawn = torch.stack([inference_cvae(d, True, seed=0, out_dir=tmp_path).flatten(1).mean(0) for d in range(10)])
    assert (torch.cdist(drawn, means).argmin(1) == torch.arange(10)).sum() >= 9


def test_restyle_shows_originals_styles_and_reconstructions(trained, data_dir, digits, grids):
    _, (images, labels) = digits
    rows = restyle_cvae(out_dir=trained, data_dir=data_dir)
    assert rows.shape == (10, 11, 1, 28, 28)
    first = [labels.tolist().index(digit) for digit in range(10)]
    assert torch.equal(rows[:, 0].flatten(1), images[first] / 255)
    _, model = load_checkpoint(trained)
    with torch.no_grad():
        mu, _ = model.encode(rows[:, 0], torch.eye(10))
    for label in range(10):
        expected = cvae_mnist.generate(model, mu, [label] * 10)
        assert torch.allclose(rows[:, 1 + label], expected, atol=1e-6)
    chosen = restyle_cvae([5, 3, 5], data_dir, trained)
    assert torch.equal(chosen[:, 0].flatten(1), images[[5, 3, 5]] / 255)
    assert grids[1]["captions"] == ["original", *range(10)] and grids[1]["columns"] == 11
    assert grids[1]["title"] == "CVAE on MNIST, epoch 2, redraws MNIST"
    assert grids[1]["boxed"] == [row * 11 + 1 + labels[index] for row, index in enumerate([5, 3, 5])]
    assert torch.equal(grids[1]["images"], chosen.flatten(0, 1))


def test_plain_vae_does_the_whole_job(run, data_dir, tmp_path, grids):
    done = run("--num-classes", 0, "--epochs", 1, "--h-dim", 16, "--z-dim", 2, "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[3].startswith("VAE on MNIST, epoch 1")
    names = {"CVAE_loss.png", "CVAE_0-9.png", "CVAE_styles.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert inference_cvae(out_dir=tmp_path).shape == (10, 1, 28, 28)
    assert restyle_cvae(out_dir=tmp_path, data_dir=data_dir).shape == (10, 2, 1, 28, 28)
    assert [(grid["captions"], grid["boxed"]) for grid in grids] == [([], []), (["original", "redrawn"], [])]
    with Image.open(tmp_path / "CVAE_styles.png") as picture:
        assert picture.width == 636  # two narrow columns, but the title fits
    with pytest.raises(ValueError, match="plain VAE"):
        inference_cvae(input=6, flag=True, out_dir=tmp_path)


# The tutorial's own listing


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


# What is known of MNIST


def test_first_epochs_on_the_real_mnist(mnist_root, tmp_path):
    """The textbook's recipe is known to give about 159.5 nats per image in epoch 1, in several independent codes."""
    import benchmark

    assert sum(benchmark.Textbook(mnist_root).epoch()) == pytest.approx(159.5, abs=3)
    train_cvae(2, data_dir=mnist_root, out_dir=tmp_path)
    checkpoint, _ = load_checkpoint(tmp_path)
    assert checkpoint["dataset"] == "MNIST"
    assert checkpoint["history"]["test_loss"][-1] == pytest.approx(113, abs=2)
