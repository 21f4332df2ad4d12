"""inference_cvae and restyle_cvae: what they return, and what is on the pictures."""

import os
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import load, write_images
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from cvae_mnist import generate, inference_cvae, load_checkpoint, main, restyle_cvae


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


def read_picture(path):
    """Returns the picture, [3, height, width], and which of its pixels are red, as boxes are."""
    pixels = pil_to_tensor(Image.open(path).convert("RGB")).int()
    return pixels, (pixels - torch.tensor([214, 39, 40]).view(3, 1, 1)).abs().sum(dim=0) < 30


def test_drawings_are_z_times_temperature_decoded_under_their_labels(trained, figures):
    _, model = load_checkpoint(trained)
    z = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    calls = [(6, False, 1.0), (99, False, 0.5), (3, True, 1.0), (6, True, 0.5), (0, True, 0)]
    for digit, flag, temperature in calls:
        images = inference_cvae(digit, flag, temperature, 1, trained)
        labels = [digit] * 10 if flag else list(range(10))
        assert torch.allclose(images, generate(model, temperature * z, labels), atol=1e-6)
        assert figures[-1][1] == [*map(str, labels), "MNIST, epoch 4"]
    assert {"CVAE_0-9.png", "CVAE_3.png", "CVAE_6.png"} <= {*os.listdir(trained)}


def test_drawings_are_new_unless_the_printed_seed_is_given(trained, watch, capsys):
    drawn = watch("generate")
    main(["draw", f"--out-dir={trained}"])
    seed, other = re.findall(r"seed (\d+)\n", capsys.readouterr().out)
    main(["draw", f"--out-dir={trained}", f"--seed={seed}"])
    for _ in range(2):
        torch.manual_seed(0)  # as train_cvae leaves it
        inference_cvae(out_dir=trained)
    sixes, digits, *again, new, newer = [call["z"] for call in drawn]
    assert seed == other != "0" and all(torch.equal(sixes, z) for z in (digits, *again))
    assert len(torch.stack([sixes, new, newer]).unique(dim=0)) == 3


def test_a_plain_vaes_pictures_carry_no_labels_and_no_boxes(train, data, figures):
    train(epochs=1, num_classes=0)
    assert inference_cvae().shape == inference_cvae(6, flag=True).shape == (10, 1, 28, 28)
    assert restyle_cvae(data_dir=data).shape == (10, 11, 1, 28, 28)
    samples, _, *drawings = [texts for _, texts in figures]
    assert [samples, *drawings] == [["MNIST, epoch 1"]] * 4
    assert not read_picture("CVAE_styles.png")[1].any()


def test_restyle_shows_originals_and_their_style_with_every_label(trained, data, digits, figures):
    images, labels = digits[1]
    rows = restyle_cvae(data_dir=data, out_dir=trained)
    first = [labels.tolist().index(digit) for digit in range(10)]
    _, model = load_checkpoint(trained)
    mu, _ = model.encode(images[first] / 255, torch.eye(10))
    redrawn = [generate(model, mu, [label] * 10) for label in range(10)]
    expected = torch.stack([images[first].view(10, 1, 28, 28) / 255, *redrawn], dim=1)
    assert rows.shape == expected.shape and torch.allclose(rows, expected, atol=1e-5)
    assert figures[-1][1] == ["original", *map(str, range(10)), "MNIST, epoch 4"]
    few = images[first][[7, 3, 3]], labels[first][[7, 3, 3]]  # a set without some digits
    for indices, expected in (None, [1, 0]), ((2, 0, 2), [2, 0, 2]):
        rows = restyle_cvae(indices, write_images("few", few, few), trained)
        assert torch.equal(rows[:, 0].flatten(1), few[0][expected] / 255) and not rows.requires_grad


def test_no_setting_of_matplotlib_changes_a_picture_and_no_call_a_setting(train, trained, data):
    mine = {"text.usetex": True, "savefig.format": "pdf", "savefig.dpi": 300, "font.size": 30}
    mine |= {"savefig.bbox": "tight", "axes.facecolor": "black", "image.cmap": "jet"}
    with matplotlib.rc_context(mine):
        before = dict(matplotlib.rcParams.copy())
        train(out_dir="~/out")
        restyle_cvae(data_dir=data, out_dir="~/out")
        inference_cvae(out_dir="~/out")
        assert dict(matplotlib.rcParams.copy()) == before and not plt.get_fignums()
    assert torch.is_grad_enabled()
    assert not os.listdir() and (Path.home() / "out" / "CVAE_0-9.png").exists()
    for name in "CVAE_loss.png", "cvae_results/epoch_4.png":
        assert (Path.home() / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_a_grid_shows_every_image_in_its_place_its_shade_its_box_and_its_caption(trained):
    """Drawn by restyle_cvae: two gray images, and what the decoder makes of them."""
    shades = torch.tensor([60, 120], dtype=torch.uint8)
    gray = shades.view(2, 1).expand(2, 784), torch.tensor([2, 9])
    rows = restyle_cvae([0, 1], write_images("gray", gray, gray), trained)
    pixels, red = read_picture(trained / "CVAE_styles.png")
    top, left = red.nonzero().min(dim=0).values.tolist()
    right = red.nonzero()[:, 1].max().item()
    size = (right - left) / (7 + 29 / 30)  # from one image to the next, in pixels
    for column in range(11):
        x = round(left + (column - 2.5) * size)
        caption = pixels[:, top - 22 : top - 2, x - round(size / 2) : x + round(size / 2)]
        ink = (caption.sum(dim=0) < 300).nonzero()[:, 1].float()
        assert (ink.min() + ink.max()) / 2 == pytest.approx(size / 2, abs=3)
        for row in range(2):
            y = round(top + (row + 0.5) * size)
            shown = 255 - pixels[:, y - 13 : y + 13, x - 13 : x + 13].float().mean(dim=(1, 2))
            shade = 255 * rows[row, column, 0, 10:18, 10:18].mean().item()
            assert shown.tolist() == pytest.approx([shade] * 3, abs=8)


def test_a_run_draws_the_same_samples_and_its_losses_until_it_has_finished(train, watch, figures):
    drawn, names = watch("generate"), ["train_loss", "test_loss", "reconstruction", "kl"]
    for epochs in 1, 3:
        model = train(epochs=epochs, resume=epochs > 1)
        figure, texts = figures[-1]
        lines, history = [axes.get_lines() for axes in figure.axes], load()["history"]
        assert [*map(len, lines)] == [2, 1, 1] and {"epoch", "nats per image"} <= {*texts}
        for line, name in zip(sum(map(list, lines), []), names, strict=True):
            assert f"{name}: {history[name][-1]:.2f}" == line.get_label() in texts
            points = [(x, y) for x, y in line.get_xydata().tolist() if y == y]
            assert points == [*enumerate(history[name], start=1)]
            assert line.get_marker() == "."  # without it, one epoch would not be seen
    first, later = drawn
    assert later["model"] is model and [*first["labels"]] == [*range(10)] * 10
    assert torch.equal(first["z"], later["z"]) and len(first["z"].unique(dim=0)) == 10
    styles = first["z"].view(10, 10, 3)  # a row per style, a column per digit
    assert torch.equal(styles, styles[:, :1].expand(10, 10, 3))
    times = {path: path.stat().st_mtime_ns for path in Path().rglob("*.p*")}
    model = train(epochs=3, resume=True)
    assert torch.equal(model.fc1.weight, load()["model_state_dict"]["fc1.weight"])
    assert times == {path: path.stat().st_mtime_ns for path in Path().rglob("*.p*")}
