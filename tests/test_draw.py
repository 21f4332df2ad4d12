"""inference_cvae and restyle_cvae: what they return, and what is on the pictures."""

import socket
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import CHECKPOINT, write_images
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist
from cvae_mnist import generate, inference_cvae, load_checkpoint, restyle_cvae

ABOUT = {"epoch": 7, "hyperparameters": {"dataset": "nothing"}}
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, each with its visible texts."""
    figures, real = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        real(figure, *arguments, **options)
        texts = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
        figures.append((figure, [text for text in texts if text]))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_inference_decodes_z_times_temperature_with_the_labels(trained, figures, temperature):
    _, model = load_checkpoint(trained)
    z = temperature * torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    for digit, flag, labels in (6, False, range(10)), (99, False, range(10)), (6, True, [6] * 10):
        images = inference_cvae(digit, flag, temperature, 1, trained)
        assert torch.allclose(images, generate(model, z, labels), atol=1e-6)
        assert figures[-1][1] == [*map(str, labels), "MNIST, epoch 4"]
    assert {"CVAE_6.png", "CVAE_0-9.png"} <= {path.name for path in trained.iterdir()}


def test_drawings_are_new_unless_seeded(trained):
    drawn = []
    for seed in (5, None, None, 6, 5):
        torch.manual_seed(0)  # as train_cvae leaves it
        drawn.append(inference_cvae(seed=seed, out_dir=trained))
    assert torch.equal(drawn[0], drawn[4]) and len(torch.stack(drawn).unique(dim=0)) == 4


def test_a_plain_vaes_pictures_carry_no_labels_and_no_boxes(train, data, figures):
    train(epochs=1, num_classes=0)
    assert inference_cvae().shape == inference_cvae(6, flag=True).shape == (10, 1, 28, 28)
    assert restyle_cvae(data_dir=data).shape == (10, 11, 1, 28, 28)
    samples, losses, *drawings = figures
    for figure, texts in (samples, *drawings):
        assert texts == ["MNIST, epoch 1"] and not figure.axes[0].patches


def test_restyle_shows_originals_and_their_style_with_every_label(trained, data, digits, figures):
    images, labels = digits[1]
    rows = restyle_cvae(data_dir=data, out_dir=trained)
    first = [labels.tolist().index(digit) for digit in range(10)]
    _, model = load_checkpoint(trained)
    mu, _ = model.encode(images[first] / 255, torch.eye(10))
    redrawn = [generate(model, mu, [label] * 10) for label in range(10)]
    expected = torch.stack([images[first].view(10, 1, 28, 28) / 255, *redrawn], dim=1)
    assert rows.shape == expected.shape and torch.allclose(rows, expected, atol=1e-5)
    chosen = restyle_cvae([5, 3, 5], data, trained)
    assert torch.equal(chosen[:, 0].flatten(1), images[[5, 3, 5]] / 255)
    figure, texts = figures[-1]
    assert texts == ["original", *DIGITS, "MNIST, epoch 4"]
    boxes = [(box.get_y() // 30, box.get_x() // 30) for box in figure.axes[0].patches]
    assert boxes == [(row, 1 + labels[index]) for row, index in enumerate([5, 3, 5])]


def test_calls_leave_the_process_as_it_was_and_write_only_where_they_are_told(train, data):
    def state():
        settings = dict(matplotlib.rcParams.copy())
        return settings, socket.getdefaulttimeout(), plt.get_fignums(), torch.is_grad_enabled()

    before = state()
    train(epochs=1, out_dir="~/out")
    restyle_cvae(data_dir=data, out_dir="~/out")
    with torch.no_grad():  # it does not matter
        inference_cvae(out_dir="~/out")
    assert state() == before and not any(Path().iterdir())
    assert (Path.home() / "out" / "CVAE_0-9.png").exists()


def difference(path, color):
    """How far each pixel [height, width] of a picture is from a color (0 to 255)."""
    pixels = pil_to_tensor(Image.open(path).convert("RGB")).int()
    return (pixels - torch.tensor(color).view(3, 1, 1)).abs().sum(0)


def test_a_grid_shows_every_image_in_its_place_its_shade_and_its_box(trained, monkeypatch):
    """Drawn through restyle_cvae: two rows of gray images, each a little darker than the last."""
    shades = torch.linspace(0, 0.7, 22).view(2, 11)  # pale: no white, no black
    originals = (255 * shades[:, :1]).byte().expand(2, 784)
    data = originals, torch.tensor([2, 9])
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", data, data))
    columns = iter(shades[:, 1:].T)
    shade = lambda *_: next(columns).view(2, 1, 1, 1).expand(2, 1, 28, 28)  # noqa: E731
    monkeypatch.setattr(cvae_mnist, "generate", shade)
    restyle_cvae([0, 1], out_dir=trained)
    path = trained / "CVAE_styles.png"
    red = difference(path, [214, 39, 40]) < 30
    (top, left), (bottom, right) = (
        edge(red.nonzero(), 0).values for edge in (torch.min, torch.max)
    )
    size = ((right - left) / (7 + 29 / 30)).item()  # from one image to the next, in pixels
    for row in range(2):
        for column in range(11):
            y = round(top.item() + (row + 0.5) * size)
            x = round(left.item() + (column - 3 + 0.5) * size)
            from_black = difference(path, [0, 0, 0])[y, x].item() / 3
            assert from_black == pytest.approx(255 * (1 - shades[row, column].item()), abs=4)


def test_samples_are_a_row_per_style_and_a_column_per_digit_always_the_same(train, monkeypatch):
    drawn = []

    def decode(model, z, labels):
        drawn.append((z, list(labels)))
        return torch.zeros(len(z), 1, 28, 28)

    monkeypatch.setattr(cvae_mnist, "generate", decode)
    train(epochs=1)
    train(epochs=2, resume=True)
    (z, labels), (later, _) = drawn
    assert torch.equal(z, later) and labels == list(range(10)) * 10
    styles = z.view(10, 10, 3)
    assert torch.equal(styles, styles[:, :1].expand(10, 10, 3)) and len(z.unique(dim=0)) == 10


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_loss_figure_shows_the_history(trained, train, figures, epochs):
    names = ["train_loss", "test_loss", "reconstruction", "kl"]
    history = {name: (50 * torch.rand(epochs)).tolist() for name in names}
    checkpoint = torch.load(trained / CHECKPOINT)
    torch.save({**checkpoint, "epoch": epochs, "history": history}, CHECKPOINT)
    train(epochs=epochs, resume=True)  # only draws
    ((figure, texts),) = figures
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1]
    assert {"epoch", "nats per image"} <= set(texts)
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    for line, name in zip(lines, names, strict=True):
        assert line.get_label() == f"{name}: {history[name][-1]:.2f}" and line.get_label() in texts
        assert line.get_xydata().T.tolist() == [list(range(1, epochs + 1)), history[name]]
        assert line.get_marker() == "."  # without it, one epoch would not be seen


def test_a_matplotlibrc_changes_no_picture(train):
    settings = {"text.usetex": True, "savefig.format": "pdf", "savefig.dpi": 300, "font.size": 30}
    settings |= {"savefig.bbox": "tight", "axes.facecolor": "black", "image.cmap": "jet"}
    pictures = []
    for rc in ({}, settings):
        with matplotlib.rc_context(rc):
            train(epochs=1)
        pictures.append([path.read_bytes() for path in sorted(Path().rglob("*.png"))])
    assert pictures[0] == pictures[1]


def test_a_set_without_some_digits_is_restyled_from_chosen_images(trained, digits):
    threes = tuple(part[digits[1][1] == 3] for part in digits[1])
    assert len(restyle_cvae([0, 1], write_images("threes", threes, threes), trained)) == 2
