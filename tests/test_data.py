"""Where the images come from: torchvision's files, a download, built-in digits, a reader's own."""

import gzip
import os
import re
import shutil
import socket
from functools import partial
from http.client import IncompleteRead
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import load, write_images
from torchvision import datasets

import cvae_mnist
from cvae_mnist import UserError, built_in_digits, load_images, restyle_cvae

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
NAMES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
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
    fashion = pytest.raises(UserError, load_images, "mnist", "FashionMNIST")
    fashion.match("FashionMNIST.*refused.*FashionMNIST.raw.*" + " ".join(NAMES))
    for name in "CIFAR10", "mnist", "no such set":
        error = pytest.raises(UserError, load_images, "mnist", name)
        error.match(f"{name}.*FashionMNIST.*built-in digits")


def test_a_download_may_fail_in_every_way_and_succeed(data, digits, few, monkeypatch, capsys):
    broken = [TimeoutError("no answer"), ConnectionResetError(), IncompleteRead(b"")]
    errors, timeouts = [*broken, OSError(28, "disk full")], []

    def download(url, download_root, filename, md5):
        timeouts.append(socket.getdefaulttimeout())
        shutil.copy(data / "MNIST" / "raw" / filename.removesuffix(".gz"), download_root)
        if errors:
            raise errors.pop(0)  # there is one of four files

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", download)
    assert [load_images("~/mnist")[0] for _ in range(3)] == ["built-in digits"] * 3
    assert "MNIST: ConnectionResetError" in capsys.readouterr().out  # which has no text
    pytest.raises(UserError, load_images, "~/mnist").match(f"disk full.*{re.escape(str(RAW))}")
    name, train, test = load_images("~/mnist")
    assert len(timeouts) == 8 and {*timeouts} == {30} and socket.getdefaulttimeout() is None
    assert name == "MNIST" and (Path.home() / RAW / NAMES[3]).exists() and not os.listdir()
    assert torch.equal(train[0], digits[0][0]) and torch.equal(test[1], digits[1][1])
    assert (train[0].dtype, train[1].dtype) == (torch.uint8, torch.int64)


def test_a_folder_that_may_not_be_entered_is_an_error_and_timeouts_are_put_back(data, monkeypatch):
    Path("file").touch()
    pytest.raises((UserError, OSError), load_images, "file").match("file.MNIST.raw")
    denied = PermissionError(13, "Permission denied", str(data))  # root may enter every folder
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", Mock(side_effect=denied))
        error = pytest.raises((UserError, OSError), load_images, data)
    assert "denied" in str(error.value) and data.name in str(error.value)
    assert socket.getdefaulttimeout() is None


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
    images, labels = (RAW / NAMES[0]).read_bytes(), (RAW / NAMES[1]).read_bytes()
    one_image_less = images.replace(b"\x02\x58", b"\x02\x57", 1)[:-784]
    bad = [(0, images[:-100]), (0, gzip.compress(images)), (0, one_image_less), (2, labels)]
    for number, content in *bad, (1, b"<html>Sign in</html>"), (1, labels[:-1] + b"\x16"), (3, b""):
        write_images("mnist", *digits)
        (RAW / NAMES[number]).write_bytes(content)
        error = str(pytest.raises(UserError, load_images, "mnist").value)
        assert all(text in error for text in (str(RAW), "complete and not compressed", *NAMES))
        assert not re.search(r"(?i)MNIST: ?\.|\n|delete", error)
        assert (RAW / NAMES[number]).read_bytes() == content


def test_what_a_readers_load_images_returns_is_checked(train, trained, digits, monkeypatch):
    (images, labels), test = digits
    load_mine = Mock()
    monkeypatch.setattr(cvae_mnist, "load_images", load_mine)
    wrong = [((images / 255, labels), "float32"), ((images, labels + 1), "10")]
    wrong += [((images.float() / 127.5 - 1, labels), "float32"), ((images, labels / 1), "float32")]
    wrong += [((images[:0], labels[:0]), r"\[0, 784\]"), ((images[1:], labels), "599")]
    restyle = partial(restyle_cvae, [0], out_dir=trained)
    for mine, got in wrong:
        for call, *pairs in (train, mine, test), (train, test, mine), (restyle, test, mine):
            load_mine.return_value = "MNIST", *pairs
            error = pytest.raises(UserError, call)
            error.match(rf"load_images must return .*uint8 \[N, 784\].*int64 \[N\].*{got}")
    assert not any(Path().rglob("*.p*"))
    as_in_files = images.view(-1, 28, 28), labels.int()
    for mine in as_in_files, [each.numpy() for each in as_in_files], (images, labels.byte()):
        load_mine.return_value = "MNIST", mine, mine
        train(epochs=1)
        assert torch.equal(restyle()[0, 0].flatten(), images[0] / 255)


def test_built_in_digits_are_like_mnist_and_can_be_learned():
    """With shifts as strong as turns, only 84 % would be near to a digit of their label."""
    random_state = torch.get_rng_state()
    images, labels = built_in_digits(3000, seed=0)
    assert torch.equal(random_state, torch.get_rng_state())
    others, answers = built_in_digits(1000, seed=1)
    assert (images.shape, images.dtype, labels.dtype) == ((3000, 784), torch.uint8, torch.int64)
    assert len(torch.cat([images, others]).unique(dim=0)) == 4000  # all differ
    assert torch.equal(built_in_digits(3000, seed=0)[0], images)
    assert not torch.equal(labels[:1000], answers)
    assert 0.10 < images.div(255).mean() < 0.17  # MNIST: 0.13
    assert 40 < (images > 250).sum(1).float().mean() < 90  # strokes are solid; MNIST: 57 pixels
    square = images.view(-1, 28, 28) / 255
    assert square[:, [0, -1]].mean() < 0.02 and square[:, :, [0, -1]].mean() < 0.02  # none cut off
    right = labels[torch.cdist(others / 255, images / 255).argmin(dim=1)] == answers
    assert 0.9 < right.float().mean() < 0.995
    assert all(right[answers == digit].float().mean() > 0.8 for digit in range(10))
