"""inference_cvae and restyle_cvae: what they return, and what is on the pictures."""

import io

import matplotlib
import pytest
import torch
from conftest import CHECKPOINT, load
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import cvae_mnist
from cvae_mnist import UserError, generate, inference_cvae, load_checkpoint, restyle_cvae, save_grid, save_losses


@pytest.fixture
def plain(here):
    """The current folder, with the checkpoint of a plain VAE."""
    model = cvae_mnist.CVAE(784, 16, 3, 0)
    sizes = dict(h_dim=16, z_dim=3, num_classes=0)
    torch.save({"model_state_dict": model.state_dict(), "hyperparameters": sizes, "epoch": 5}, here / CHECKPOINT)
    return here


@pytest.fixture
def texts(monkeypatch):
    """The texts on each figure that is saved."""
    texts, real = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        real(figure, *arguments, **options)
        texts.append([text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()])

    monkeypatch.setattr(Figure, "savefig", savefig)
    return texts


def pixels(path):
    """A picture as a tensor [height, width, 3], 0 to 255."""
    with Image.open(path) as picture:
        return torch.tensor(list(picture.convert("RGB").getdata())).view(picture.height, picture.width, 3)


# What is drawn


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_inference_decodes_z_times_temperature_with_the_labels(trained, here, device, temperature):
    options = dict(temperature=temperature, seed=1, out_dir=trained, device=device)
    _, model = load_checkpoint(trained)
    z = temperature * torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(inference_cvae(**options), generate(model, z, range(10)), atol=1e-4)
    assert torch.allclose(inference_cvae(input=99, **options), generate(model, z, range(10)), atol=1e-4)
    assert torch.allclose(inference_cvae(input=6, flag=True, **options), generate(model, z, [6] * 10), atol=1e-4)
    assert (trained / "CVAE_6.png").exists() and (trained / "CVAE_0-9.png").exists()


def test_drawings_are_new_unless_seeded(trained):
    torch.manual_seed(0)  # as train_cvae leaves it
    drawn = [inference_cvae(seed=seed, out_dir=trained, device="cpu") for seed in (None, None, 5, 6, 5)]
    assert torch.equal(drawn[2], drawn[4])
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("digit", [10, -1, 6.5, 6.0, "6", None], ids=repr)
def test_a_digit_that_is_none_is_an_error(trained, digit):
    with pytest.raises((UserError, TypeError)):
        inference_cvae(digit, flag=True, out_dir=trained)


def test_a_plain_vae_draws_ten_digits_and_none_that_is_asked_for(plain, data, texts):
    assert inference_cvae().shape == (10, 1, 28, 28)
    assert restyle_cvae(data_dir=data).shape == (10, 2, 1, 28, 28)
    assert texts == [["VAE on unknown data, epoch 5"], ["original", "redrawn", "VAE on unknown data, epoch 5"]]
    with pytest.raises(UserError, match="digit 6"):
        inference_cvae(6, flag=True)


def test_restyle_shows_originals_and_their_style_with_every_label(trained, data, digits, device):
    images, labels = digits[1]
    rows = restyle_cvae(data_dir=data, out_dir=trained, device=device)
    first = [labels.tolist().index(digit) for digit in range(10)]
    assert rows.shape == (10, 11, 1, 28, 28) and torch.equal(rows[:, 0].flatten(1), images[first] / 255)
    _, model = load_checkpoint(trained)
    mu, _ = model.encode(rows[:, 0], torch.eye(10))
    for label in range(10):
        assert torch.allclose(rows[:, 1 + label], generate(model, mu, [label] * 10), atol=1e-4)
    chosen = restyle_cvae([5, 3, 5], data, trained, device)
    assert torch.equal(chosen[:, 0].flatten(1), images[[5, 3, 5]] / 255)


@pytest.mark.parametrize("indices", [[], [200], [1.5], 5], ids=repr)
def test_indices_that_are_none_are_an_error(trained, data, indices):
    with pytest.raises((UserError, IndexError, TypeError)):
        restyle_cvae(indices, data, trained)


def test_a_data_set_without_some_digits_is_restyled(trained, digits, here):
    from conftest import write_mnist

    images, labels = digits[1]
    threes = images[labels == 3], labels[labels == 3]
    assert restyle_cvae(data_dir=write_mnist(here, threes, threes), out_dir=trained).shape[0] == 1


def test_a_model_of_built_in_digits_restyles_built_in_test_digits(trained, here, data, monkeypatch):
    torch.save({**load(trained), "dataset": cvae_mnist.BUILT_IN}, CHECKPOINT)
    seeds, real = [], cvae_mnist.built_in_digits
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: seeds.append(seed) or real(count // 100, seed))
    restyle_cvae(data_dir=data)
    assert seeds == [1]  # those that it was not trained on


def test_calls_leave_the_process_as_it_was(trained, data, quick):
    import socket

    def state():
        return dict(matplotlib.rcParams.copy()), socket.getdefaulttimeout(), plt.get_fignums(), torch.is_grad_enabled()

    before = state()
    cvae_mnist.train_cvae(**{**quick, "epochs": 1})
    inference_cvae()
    restyle_cvae(data_dir=data)
    with torch.no_grad():  # nor does it matter how it was
        inference_cvae(device="cpu")
    assert state() == before


# What is on a picture

CHECKPOINT_OF_NOTHING = {"dataset": "nothing", "epoch": 7, "hyperparameters": {}}


def test_a_grid_shows_every_image_in_its_place_its_shade_and_its_box(here, texts):
    images = torch.linspace(0, 0.7, 6).view(6, 1, 1, 1).expand(6, 1, 28, 28)  # pale: no white, no black
    save_grid(here / "grid.png", images, CHECKPOINT_OF_NOTHING, ["one", "two", "three"], boxes=[(1, 2)])
    assert texts == [["one", "two", "three", "CVAE on nothing, epoch 7"]]
    picture = pixels("grid.png")
    red = (picture - torch.tensor([214, 39, 40])).abs().sum(2) < 30
    box = red.nonzero()
    (top, left), (bottom, right) = box.min(0).values.tolist(), box.max(0).values.tolist()
    size = (bottom - top) * 30 / 29  # from one image to the next, in pixels of the picture
    for number, image in enumerate(images):
        row = (top + bottom) / 2 - (1 - number // 3) * size
        column = (left + right) / 2 - (2 - number % 3) * size
        expected = 255 * (1 - image[0, 0, 0].item())
        assert picture[round(row), round(column)].float().mean().item() == pytest.approx(expected, abs=3)


def test_samples_are_a_column_per_digit_and_a_row_per_style(trained, here, monkeypatch):
    seen = []
    monkeypatch.setattr(cvae_mnist, "save_grid", lambda path, images, checkpoint, captions: seen.append((images, captions)))
    checkpoint, model = load_checkpoint(trained)
    cvae_mnist.save_samples(here / "a.png", model, checkpoint)
    cvae_mnist.save_samples(here / "b.png", model, checkpoint)
    (images, captions), (again, _) = seen
    assert torch.equal(images, again) and len(images.unique(dim=0)) == 100 and list(captions) == list(range(10))
    z = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))[:10]
    for digit in range(10):
        assert torch.allclose(images[digit::10], generate(model, z, [digit] * 10), atol=1e-6)


def test_samples_of_a_plain_vae_are_a_hundred_different_ones(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(cvae_mnist, "save_grid", lambda path, images, *_: seen.append(images))
    checkpoint, model = load_checkpoint(plain)
    cvae_mnist.save_samples(plain / "a.png", model, checkpoint)
    assert len(seen[0].unique(dim=0)) == 100


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_loss_figure_shows_the_history(here, texts, epochs, monkeypatch):
    figures = []
    monkeypatch.setattr(cvae_mnist, "save_figure", lambda path, figure, checkpoint: figures.append(figure))
    history = {"train_loss": [50.0, 30, 20, 15, 12], "reconstruction": [40.0, 10, 5, 4, 3], "kl": [10.0, 20, 15, 11, 9],
               "test_loss": [60.0, 40, 30, 25, 22]}
    history = {name: losses[:epochs] for name, losses in history.items()}
    save_losses(here / "loss.png", {**CHECKPOINT_OF_NOTHING, "history": history})
    lines = {line.get_label(): line for axes in figures[0].axes for line in axes.get_lines()}
    for name, losses in history.items():
        line = lines[f"{name}: {losses[-1]:.2f}"]
        assert list(line.get_ydata()) == losses and list(line.get_xdata()) == list(range(1, epochs + 1))
    assert lines[f"train_loss: {history['train_loss'][-1]:.2f}"].axes is lines[f"test_loss: {history['test_loss'][-1]:.2f}"].axes
    picture = io.BytesIO()
    figures[0].savefig(picture)
    colors = pixels(picture).float()
    blue = (colors - torch.tensor([31.0, 119, 180])).abs().sum(2) < 30
    assert blue[:, 60 : int(0.95 * blue.shape[1])].sum() > 100  # after one epoch as well


SETTINGS = """
text.usetex: True
savefig.format: pdf
savefig.dpi: 300
savefig.bbox: tight
font.size: 30
axes.facecolor: black
image.cmap: jet
"""


def test_a_matplotlibrc_changes_no_picture(trained, here):
    def draw():
        inference_cvae(seed=1, device="cpu")
        save_losses(here / "loss.png", load(here))
        return (here / "CVAE_0-9.png").read_bytes(), (here / "loss.png").read_bytes()

    (here / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes())
    before = draw()
    (here / "rc").write_text(SETTINGS)
    with matplotlib.rc_context(fname=str(here / "rc")):
        assert draw() == before
    assert before[0].startswith(b"\x89PNG")
