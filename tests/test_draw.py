"""inference_cvae and restyle_cvae: what they return, and what is on the pictures."""

import socket
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import pytest
import torch
from conftest import CHECKPOINT, OLD, load, write_images
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist
from cvae_mnist import generate, inference_cvae, load_checkpoint, restyle_cvae


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


def test_drawings_are_z_times_temperature_decoded_and_new_unless_seeded(trained, figures):
    _, model = load_checkpoint(trained)
    z = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    calls = [(6, False, 1.0), (99, False, 0.5), (6, True, 1.0), (6, True, 0.5), (6, True, 0)]
    for digit, flag, temperature in calls:
        images = inference_cvae(digit, flag, temperature, 1, trained)
        labels = [6] * 10 if flag else list(range(10))
        assert torch.allclose(images, generate(model, temperature * z, labels), atol=1e-6)
        assert figures[-1][1] == [*map(str, labels), "MNIST, epoch 4"]
    assert {"CVAE_6.png", "CVAE_0-9.png"} <= {path.name for path in trained.iterdir()}
    drawn = []
    for seed in None, None, 6:
        torch.manual_seed(0)  # as train_cvae leaves it
        drawn.append(inference_cvae(seed=seed, out_dir=trained))
    assert len(torch.stack(drawn).unique(dim=0)) == 3


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
    assert texts == ["original", *map(str, range(10)), "MNIST, epoch 4"]
    centers = [round((tick - 15) / 30, 1) for tick in figure.axes[0].get_xticks()]
    assert centers == list(range(11))  # a caption above each image
    boxes = [(box.get_y() // 30, box.get_x() // 30) for box in figure.axes[0].patches]
    assert boxes == [(row, 1 + labels[index]) for row, index in enumerate([5, 3, 5])]
    threes = images[labels == 3], labels[labels == 3]  # a set without some digits
    assert len(restyle_cvae([0, 1], write_images("threes", threes, threes), trained)) == 2


def test_no_setting_of_matplotlib_changes_a_picture_and_no_call_a_setting(train, trained, data):
    mine = {"text.usetex": True, "savefig.format": "pdf", "savefig.dpi": 300, "font.size": 30}
    mine |= {"savefig.bbox": "tight", "axes.facecolor": "black", "image.cmap": "jet"}
    with matplotlib.rc_context(mine):
        before = dict(matplotlib.rcParams.copy())
        train(out_dir="~/out")
        restyle_cvae(data_dir=data, out_dir="~/out")
        inference_cvae(out_dir="~/out")
        assert dict(matplotlib.rcParams.copy()) == before and not plt.get_fignums()
    assert torch.is_grad_enabled() and socket.getdefaulttimeout() is None
    assert not any(Path().iterdir()) and (Path.home() / "out" / "CVAE_0-9.png").exists()
    for name in "CVAE_loss.png", "cvae_results/epoch_4.png":
        assert (Path.home() / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_a_grid_shows_every_image_in_its_place_its_shade_and_its_box(trained, monkeypatch):
    """Drawn through restyle_cvae: two rows of gray images, each a little darker than the last."""
    shades = torch.linspace(0, 0.7, 22).view(2, 11)  # pale: no white, no black
    images = shades.view(2, 11, 1, 1, 1).expand(2, 11, 1, 28, 28)
    data = (255 * images[:, 0]).byte().view(2, 784), torch.tensor([2, 9])
    monkeypatch.setattr(cvae_mnist, "load_images", lambda *_: ("MNIST", data, data))
    monkeypatch.setattr(cvae_mnist, "generate", Mock(side_effect=images[:, 1:].unbind(1)))
    restyle_cvae([0, 1], out_dir=trained)
    pixels = pil_to_tensor(Image.open(trained / "CVAE_styles.png").convert("RGB")).int()
    red = (pixels - torch.tensor([214, 39, 40]).view(3, 1, 1)).abs().sum(dim=0) < 30
    top, left = red.nonzero().min(dim=0).values.tolist()
    right = red.nonzero()[:, 1].max().item()
    size = (right - left) / (7 + 29 / 30)  # from one image to the next, in pixels
    for row in range(2):
        for column in range(11):
            y, x = round(top + (row + 0.5) * size), round(left + (column - 2.5) * size)
            shade = 255 * (1 - shades[row, column].item())
            assert pixels[:, y, x].tolist() == pytest.approx([shade] * 3, abs=4)


def test_samples_are_a_row_per_style_and_a_column_per_digit_always_the_same(train, monkeypatch):
    decode = Mock(return_value=torch.zeros(100, 1, 28, 28))
    monkeypatch.setattr(cvae_mnist, "generate", decode)
    model = train(epochs=1)
    train(epochs=2, resume=True)
    (drawn_with, z, labels), (_, later, _) = [call.args for call in decode.call_args_list]
    assert drawn_with is model and torch.equal(z, later) and list(labels) == [*range(10)] * 10
    styles = z.view(10, 10, 3)
    assert torch.equal(styles, styles[:, :1].expand(10, 10, 3)) and len(z.unique(dim=0)) == 10


@pytest.mark.parametrize("epochs", [1, 5])
def test_resuming_a_finished_run_only_draws_its_history(trained, train, figures, epochs):
    names = ["train_loss", "test_loss", "reconstruction", "kl"]
    history = {name: (50 * torch.rand(epochs)).tolist() for name in names}
    torch.save({**load(trained), "epoch": epochs, "history": history}, CHECKPOINT)
    before = Path(CHECKPOINT).read_bytes()
    model = train(epochs=epochs, resume=True)
    assert torch.equal(model.fc1.weight, load()["model_state_dict"]["fc1.weight"])
    assert Path(CHECKPOINT).read_bytes() == before and not Path(OLD).exists()
    [(figure, texts)] = figures
    assert {"epoch", "nats per image"} <= {*texts} and Path("CVAE_loss.png").exists()
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1]
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    for line, name in zip(lines, names, strict=True):
        assert line.get_label() == f"{name}: {history[name][-1]:.2f}" and line.get_label() in texts
        assert line.get_xydata().T.tolist() == [list(range(1, epochs + 1)), history[name]]
        assert line.get_marker() == "."  # without it, one epoch would not be seen
