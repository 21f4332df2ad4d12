"""inference_cvae and restyle_cvae: what they return, and what is on the pictures."""

import socket
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import CHECKPOINT, load, write_mnist
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist
from cvae_mnist import UserError, generate, inference_cvae, load_checkpoint, restyle_cvae

ABOUT = {"dataset": "nothing", "epoch": 7, "hyperparameters": {}}


@pytest.fixture
def plain():
    """In the current folder, the checkpoint of a plain VAE."""
    sizes = dict(h_dim=16, z_dim=3, num_classes=0)
    state = cvae_mnist.CVAE(784, **sizes).state_dict()
    torch.save({"model_state_dict": state, "hyperparameters": sizes, "epoch": 5}, CHECKPOINT)


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
def test_inference_decodes_z_times_temperature_with_the_labels(trained, device, temperature):
    _, model = load_checkpoint(trained)
    z = temperature * torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    for digit, flag, labels in (6, False, range(10)), (99, False, range(10)), (6, True, [6] * 10):
        images = inference_cvae(digit, flag, temperature, 1, trained, device)
        assert torch.allclose(images, generate(model, z, labels), atol=1e-4)


def test_drawings_are_new_unless_seeded(trained):
    drawn = []
    for seed in (5, None, None, 6, 5):
        torch.manual_seed(0)  # as train_cvae leaves it
        drawn.append(inference_cvae(seed=seed, out_dir=trained, device="cpu"))
    assert torch.equal(drawn[0], drawn[4]) and len(torch.stack(drawn).unique(dim=0)) == 4


@pytest.mark.parametrize("digit", [10, -1, 6.5, 6.0, "6", None], ids=repr)
def test_an_invalid_digit_is_an_error(trained, digit):
    with pytest.raises((UserError, TypeError)):
        inference_cvae(digit, flag=True, out_dir=trained)


@pytest.mark.parametrize(("indices", "error"), [
    ([], UserError), ([200], IndexError), ([1.5], TypeError), (5, TypeError)], ids=str)
def test_invalid_indices_are_an_error(trained, data, indices, error):
    with pytest.raises(error):
        restyle_cvae(indices, data, trained)


def test_a_plain_vae_draws_ten_digits_and_none_that_is_asked_for(plain, data, figures):
    assert inference_cvae().shape == (10, 1, 28, 28)
    assert restyle_cvae(data_dir=data).shape == (10, 2, 1, 28, 28)
    title = "VAE on unknown data, epoch 5"
    assert [texts for _, texts in figures] == [[title], ["original", "redrawn", title]]
    assert not figures[1][0].axes[0].patches  # no label, no box
    with pytest.raises(UserError, match="digit 6"):
        inference_cvae(6, flag=True)


def test_restyle_shows_originals_and_their_style_with_every_label(
        trained, data, digits, device, monkeypatch):
    seen, (images, labels) = [], digits[1]
    rows = restyle_cvae(data_dir=data, out_dir=trained, device=device)
    first = [labels.tolist().index(digit) for digit in range(10)]
    _, model = load_checkpoint(trained)
    mu, _ = model.encode(images[first] / 255, torch.eye(10))
    redrawn = [generate(model, mu, [label] * 10) for label in range(10)]
    expected = torch.stack([images[first].view(10, 1, 28, 28) / 255, *redrawn], dim=1)
    assert rows.shape == expected.shape and torch.allclose(rows, expected, atol=1e-4)
    monkeypatch.setattr(cvae_mnist, "save_grid", lambda *arguments: seen.append(arguments))
    chosen = restyle_cvae([5, 3, 5], data, trained, device)
    boxes = [(row, 1 + labels[index].item()) for row, index in enumerate([5, 3, 5])]
    assert seen[0][3:] == (["original", *range(10)], boxes)
    assert torch.equal(chosen[:, 0].flatten(1), images[[5, 3, 5]] / 255)
    assert torch.equal(seen[0][1], chosen.flatten(0, 1))
    threes = images[labels == 3], labels[labels == 3]
    assert len(restyle_cvae(None, write_mnist("threes", threes, threes), trained, device)) == 1


def test_a_model_of_built_in_digits_restyles_those_it_was_not_trained_on(trained, data):
    torch.save({**load(trained), "dataset": cvae_mnist.BUILT_IN}, CHECKPOINT)
    images, _ = cvae_mnist.built_in_digits(10_000, seed=1)
    assert torch.equal(restyle_cvae([7], data)[:, 0].flatten(1), images[[7]] / 255)


def test_calls_leave_the_process_as_it_was_and_write_only_where_they_are_told(train, data):
    def state():
        settings = dict(matplotlib.rcParams.copy())
        return settings, socket.getdefaulttimeout(), plt.get_fignums(), torch.is_grad_enabled()

    before = state()
    train(epochs=1, out_dir="~/out")
    restyle_cvae(data_dir=data, out_dir="~/out")
    with torch.no_grad():  # it does not matter
        inference_cvae(out_dir="~/out", device="cpu")
    assert state() == before and not any(Path().iterdir())
    assert (Path.home() / "out" / "CVAE_0-9.png").exists()


def difference(path, color):
    """How far each pixel [height, width] of a picture is from a color (0 to 255)."""
    pixels = pil_to_tensor(Image.open(path).convert("RGB")).int()
    return (pixels - torch.tensor(color).view(3, 1, 1)).abs().sum(0)


def test_a_grid_shows_every_image_in_its_place_its_shade_and_its_box(figures):
    shades = torch.linspace(0, 0.7, 6)  # pale: no white, no black
    images, path = shades.view(6, 1, 1, 1).expand(6, 1, 28, 28), Path("grid.png")
    cvae_mnist.save_grid(path, images, ABOUT, ["one", "two", "three"], boxes=[(1, 2)])
    assert figures[0][1] == ["one", "two", "three", "CVAE on nothing, epoch 7"]
    red = (difference(path, [214, 39, 40]) < 30).nonzero()
    (top, left), (bottom, right) = red.min(0).values.tolist(), red.max(0).values.tolist()
    size = (bottom - top) * 30 / 29  # from one image to the next, in pixels of the picture
    for number, shade in enumerate(shades.tolist()):
        row = (top + bottom) / 2 - (1 - number // 3) * size
        column = (left + right) / 2 - (2 - number % 3) * size
        from_black = difference(path, [0, 0, 0])[round(row), round(column)].item() / 3
        assert from_black == pytest.approx(255 * (1 - shade), abs=3)
        caption = figures[0][0].axes[0].get_xticklabels()[number % 3].get_window_extent()
        assert (caption.x0 + caption.x1) / 2 == pytest.approx(column, abs=9)


def test_samples_are_a_column_per_digit_and_a_row_per_style(trained, plain, monkeypatch):
    grids = []
    monkeypatch.setattr(cvae_mnist, "save_grid", lambda *arguments: grids.append(arguments))
    for folder in (trained, "."):
        checkpoint, model = load_checkpoint(folder)
        cvae_mnist.save_samples(Path("samples.png"), model, checkpoint)
        assert len(grids[-1][1].unique(dim=0)) == 100
    _, model = load_checkpoint(trained)
    z = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))[:10]  # always the same
    columns = torch.stack([generate(model, z, [digit] * 10) for digit in range(10)], dim=1)
    assert torch.allclose(grids[0][1], columns.flatten(0, 1), atol=1e-6)
    assert list(grids[0][3]) == list(range(10)) and list(grids[1][3]) == [""] * 10  # plain: none


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_loss_figure_shows_the_history(figures, epochs):
    names = ["train_loss", "reconstruction", "kl", "test_loss"]
    history = {name: (50 * torch.rand(epochs)).tolist() for name in names}
    cvae_mnist.save_losses(Path("loss.png"), {**ABOUT, "history": history})
    (figure, texts), = figures
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1]
    assert {"epoch", "nats per image"} <= set(texts)
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    for line, name in zip(lines, ["train_loss", "test_loss", "reconstruction", "kl"], strict=True):
        assert line.get_label() == f"{name}: {history[name][-1]:.2f}" and line.get_label() in texts
        assert line.get_xydata().T.tolist() == [list(range(1, epochs + 1)), history[name]]
        assert line.get_marker() == "."  # without it, one epoch would not be seen


def test_a_matplotlibrc_changes_no_picture(train):
    settings = {"text.usetex": True, "savefig.format": "pdf", "savefig.dpi": 300, "font.size": 30,
                "savefig.bbox": "tight", "axes.facecolor": "black", "image.cmap": "jet"}
    pictures = []
    for rc in ({}, settings):
        with matplotlib.rc_context(rc):
            train(epochs=1)
        pictures.append([path.read_bytes() for path in sorted(Path().rglob("*.png"))])
    assert pictures[0] == pictures[1]
