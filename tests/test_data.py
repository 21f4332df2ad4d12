"""Where the images come from: torchvision's files, a download, the built-in digits."""

import re
import shutil
import socket
from http.client import IncompleteRead
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import load, write_images
from PIL import Image, ImageDraw, ImageFont
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

import cvae_mnist
from cvae_mnist import UserError, built_in_digits, load_images, restyle_cvae

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NAMES = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
RAW = Path("mnist", "MNIST", "raw")


@pytest.fixture
def few(monkeypatch):
    """Where the script makes 70,000 built-in digits, it makes 700."""
    make = built_in_digits
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: make(count // 100, seed))


def test_without_a_network_one_line_has_the_reason_and_built_in_digits_are_used(few, capsys):
    name, (train, _), (test, _) = load_images("mnist")
    [line] = capsys.readouterr().out.splitlines()
    assert all(text in line for text in ("refused", str(RAW), *NAMES))
    assert name == "built-in digits" and torch.equal(train, built_in_digits(600, seed=0)[0])
    assert torch.equal(test, built_in_digits(100, seed=1)[0])  # other digits than to train on
    error = pytest.raises(UserError, load_images, "mnist", "FashionMNIST")
    error.match("FashionMNIST.*refused.*FashionMNIST.raw: " + " ".join(NAMES))
    for name in "CIFAR10", "mnist", "no such set":
        error = pytest.raises(UserError, load_images, "mnist", name)
        error.match(f"{name}.*FashionMNIST.*built-in digits")


def test_a_download_may_fail_in_every_way_and_succeed_later(data, digits, few, monkeypatch):
    broken = [TimeoutError("no answer"), ConnectionResetError(), IncompleteRead(b"")]
    errors, timeouts = [*broken, OSError(28, "disk full")], []

    def download(url, download_root, filename, md5):
        timeouts.append(socket.getdefaulttimeout())
        shutil.copy(data / "MNIST" / "raw" / filename.removesuffix(".gz"), download_root)
        if errors:
            raise errors.pop(0)  # there is one of four files

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", download)
    assert [load_images("~/mnist")[0] for _ in range(3)] == ["built-in digits"] * 3
    pytest.raises(UserError, load_images, "~/mnist").match(f"{re.escape(str(RAW))}.*disk full")
    name, train, test = load_images("~/mnist")
    assert len(timeouts) == 8 and {*timeouts} == {30} and socket.getdefaulttimeout() is None
    assert (
        name == "MNIST" and (Path.home() / RAW / TEST_LABELS).exists() and not any(Path().iterdir())
    )
    assert torch.equal(train[0], digits[0][0]) and torch.equal(test[1], digits[1][1])
    assert (train[0].dtype, train[1].dtype) == (torch.uint8, torch.int64)
    Path("file").touch()
    pytest.raises((UserError, OSError), load_images, "file").match("file")


def test_the_set_that_was_used_is_restyled_and_no_other(train, trained, digits, few):
    pytest.raises(UserError, restyle_cvae, data_dir="nothing", out_dir=trained).match("MNIST")
    write_images("images", digits[1], digits[0], "KMNIST")
    train(epochs=1, dataset="KMNIST", data_dir="images")
    assert load()["hyperparameters"]["dataset"] == "KMNIST"
    assert torch.equal(restyle_cvae([5], "images")[:, 0].flatten(1), digits[0][0][[5]] / 255)
    pytest.raises(UserError, restyle_cvae).match("KMNIST")  # there is none in ./mnist
    train(epochs=1, data_dir="nothing")
    assert load()["hyperparameters"]["dataset"] == "built-in digits"
    expected = cvae_mnist.built_in_digits(10_000, seed=1)[0][[7]] / 255
    assert torch.equal(restyle_cvae([7], "images")[:, 0].flatten(1), expected)


def test_files_that_cannot_be_used_are_an_error_with_a_reason_and_stay(digits):
    write_images("mnist", *digits)
    images, labels = (RAW / TRAIN_IMAGES).read_bytes(), (RAW / TRAIN_LABELS).read_bytes()
    one_image_less = images.replace(b"\x02\x58", b"\x02\x57", 1)[:-784]
    of_14_x_56 = images.replace(b"\x1c\0\0\0\x1c", b"\x0e\0\0\0\x38", 1)
    bad = [(TRAIN_IMAGES, images[:-100], ""), (TRAIN_LABELS, b"<html>Sign in</html>", "")]
    bad += [(TRAIN_IMAGES, one_image_less, "599"), (TRAIN_IMAGES, of_14_x_56, "14, 56")]
    bad += [(TRAIN_LABELS, labels[:-1] + bytes([22]), "22"), (TEST_LABELS, b"", "")]
    for name, content, why in bad:
        write_images("mnist", *digits)
        (RAW / name).write_bytes(content)
        error = pytest.raises(UserError, load_images, "mnist")
        error.match(f"{re.escape(str(RAW))}.*{why}")
        assert not re.search(r"(?i): ?$|\n|delete", str(error.value))
        assert (RAW / name).read_bytes() == content


def test_built_in_digits_are_like_mnist_and_can_be_learned():
    """With shifts as strong as turns, only 84 % would be near to a digit of their label."""
    images, labels = built_in_digits(3000, seed=0)
    others, answers = built_in_digits(1000, seed=1)
    assert (images.shape, images.dtype, labels.dtype) == ((3000, 784), torch.uint8, torch.int64)
    assert 200 < labels.bincount(minlength=10).min() <= labels.bincount().max() < 400
    assert len(torch.cat([images, others]).unique(dim=0)) == 4000  # all differ
    assert torch.equal(built_in_digits(3000, seed=0)[0], images)
    assert not torch.equal(labels[:1000], answers)
    assert 0.10 < images.div(255).mean() < 0.17  # MNIST: 0.13
    assert 40 < (images > 250).sum(1).float().mean() < 90  # strokes are solid; MNIST: 57 pixels
    square = images.view(-1, 28, 28) / 255
    assert square[:, [0, -1]].mean() < 0.02 and square[:, :, [0, -1]].mean() < 0.02  # none cut off
    center = (square.sum(dim=1) @ torch.arange(28.0)) / square.sum(dim=(1, 2))
    assert 0.3 < center.std() < 1.2
    right = labels[torch.cdist(others / 255, images / 255).argmin(dim=1)] == answers
    assert 0.9 < right.float().mean() < 0.995
    assert all(right[answers == digit].float().mean() > 0.8 for digit in range(10))
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSerif.ttf", 27)
    for digit in range(10):  # in another font it is nearest to the mean of its label
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((14, 23), str(digit), 255, font, anchor="ms")
        means = torch.stack([images[labels == label].float().mean(dim=0) for label in range(10)])
        assert (means - pil_to_tensor(canvas).flatten()).norm(dim=1).argmin() == digit
