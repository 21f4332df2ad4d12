"""Where the digits come from: MNIST's files, a download, the built-in digits."""

import gzip
import hashlib
import http.server
import re
import shutil
import socket
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE, write_mnist
from torchvision import datasets

import cvae_mnist
from cvae_mnist import UserError, built_in_digits, load_digits

NAMES = TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PAGE = b"<html>Please sign in to this network</html>"
RAW = Path("mnist", "MNIST", "raw")


@pytest.fixture
def mirror(data, tmp_path, monkeypatch):
    """The folder of a web server, with MNIST's four files."""
    folder, resources = tmp_path / "mirror", []
    folder.mkdir()
    for name in NAMES:
        content = gzip.compress((data / "MNIST" / "raw" / name).read_bytes())
        (folder / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    server = http.server.SimpleHTTPRequestHandler
    monkeypatch.setattr(server, "log_message", lambda *_: None)
    handler = partial(server, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield folder
        server.shutdown()


@pytest.fixture
def few(monkeypatch):
    """Where the script makes 70,000 built-in digits, it makes 700."""
    make = built_in_digits
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: make(count // 100, seed))


def test_mnist_is_downloaded_once_and_that_is_said_before(mirror, digits, capfd):
    name, train, test = load_digits("mnist")
    assert name == "MNIST"
    assert torch.equal(train[0], digits[0][0]) and torch.equal(test[1], digits[1][1])
    output, errors = capfd.readouterr()
    assert output.startswith("Downloading MNIST") and "\r" not in output and errors == ""
    shutil.rmtree(mirror)
    assert load_digits("mnist")[0] == "MNIST" and capfd.readouterr().out == ""


def test_a_mirror_that_does_not_answer_is_followed_by_the_next(mirror, monkeypatch):
    real, seconds = socket.setdefaulttimeout, []

    def quicker(timeout):
        seconds.append(timeout)
        real(0.3 if len(seconds) == 1 else timeout)  # of the first mirror

    monkeypatch.setattr(socket, "setdefaulttimeout", quicker)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url, *datasets.MNIST.mirrors])
        assert load_digits("mnist")[0] == "MNIST"
    assert 20 <= seconds[0] <= 60 and socket.getdefaulttimeout() is None  # for slow mirrors


@pytest.mark.parametrize("content", [PAGE, None], ids=["a web page", "missing"])
def test_a_bad_download_is_not_used_and_mended_by_the_next_run(mirror, few, capfd, content):
    path = mirror / f"{TEST_LABELS}.gz"
    good = path.read_bytes()
    path.write_bytes(content) if content else path.unlink()
    assert load_digits("mnist")[0] == "built-in digits"
    output, errors = capfd.readouterr()
    assert "could not download" in output and all(name in output for name in NAMES)
    assert errors == ""
    path.write_bytes(good)
    assert load_digits("mnist")[0] == "MNIST"


def test_without_a_network_the_reason_is_given_and_built_in_digits_are_used(few, capfd):
    name, (train, _), (test, _) = load_digits("mnist")
    output, errors = capfd.readouterr()
    assert all(text in output for text in ("127.0.0.1:9", "refused", str(RAW)))
    assert name == "built-in digits" and errors == ""
    assert torch.equal(train, built_in_digits(600, seed=0)[0])
    assert torch.equal(test, built_in_digits(100, seed=1)[0])  # other digits than to train on


def test_files_put_there_by_hand_need_no_network(mirror, monkeypatch, digits):
    shutil.copytree(mirror, Path.home() / RAW)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{OFFLINE}/"])
    name, (images, _), _ = load_digits("~/mnist")
    assert name == "MNIST" and torch.equal(images, digits[0][0]) and not any(Path().iterdir())


@pytest.mark.parametrize(("name", "content", "why"), [
    (TRAIN_IMAGES, lambda old: old[:-100], ""),
    (TRAIN_IMAGES, lambda old: old.replace(b"\x02\x58", b"\x02\x57", 1)[:-784], "599"),
    (TEST_IMAGES, lambda old: old.replace(b"\x1c\0\0\0\x1c", b"\x0e\0\0\0\x38", 1), "14, 56"),
    (TRAIN_LABELS, lambda old: old[:-1] + bytes([22]), "22"),
    (TRAIN_LABELS, lambda old: PAGE, ""),
    (TEST_LABELS, lambda old: b"", ""),
], ids=["cut off", "one too few", "14 x 56 pixels", "a letter", "a web page", "empty"])
def test_files_that_cannot_be_used_are_an_error_with_a_reason_and_stay(digits, name, content, why):
    write_mnist("mnist", *digits)
    (RAW / name).write_bytes(content((RAW / name).read_bytes()))
    before = {path: path.read_bytes() for path in RAW.iterdir()}
    with pytest.raises(UserError, match=f"{re.escape(str(RAW))}.*{why}") as error:
        load_digits("mnist")
    assert not re.search("(?i): [.;]|delete", str(error.value))
    assert {path: path.read_bytes() for path in RAW.iterdir()} == before


def test_a_data_set_that_cannot_be_read_gives_the_systems_reason(digits):
    write_mnist("mnist", *digits)
    (RAW / TRAIN_IMAGES).unlink()
    (RAW / TRAIN_IMAGES).mkdir()  # root may read every file, but no folder as a file
    with pytest.raises(OSError, match=TRAIN_IMAGES):
        load_digits("mnist")
    with pytest.raises(OSError):
        load_digits(RAW / TEST_IMAGES)


def test_built_in_digits_are_like_mnist_differ_and_can_be_read():
    images, labels = built_in_digits(3000, seed=0)
    assert (images.shape, images.dtype, labels.dtype) == ((3000, 784), torch.uint8, torch.int64)
    counts = labels.bincount()
    assert len(counts) == 10 and 200 < counts.min() <= counts.max() < 400
    assert 0.10 < images.div(255).mean() < 0.17  # MNIST: 0.13
    assert 50 < (images > 250).sum(1).float().mean() < 90  # strokes are solid; MNIST: 57 pixels
    square = images.view(-1, 28, 28) / 255
    edge = torch.cat([square[:, [0, -1]].flatten(), square[:, :, [0, -1]].flatten()])
    assert edge.mean() < 0.02  # none is cut off
    others, answers = built_in_digits(500, seed=1)
    right = labels[torch.cdist(others / 255, images / 255).argmin(dim=1)] == answers
    assert 0.75 < right.float().mean() < 0.99
    assert all(right[answers == digit].float().mean() > 0.5 for digit in range(10))
    assert len(torch.cat([images, others]).unique(dim=0)) == 3500
    assert torch.equal(built_in_digits(3000, seed=0)[0], images)
    assert not torch.equal(built_in_digits(500, seed=0)[1], answers)


def test_built_in_digits_are_shifted_and_bent(monkeypatch):
    images, _ = built_in_digits(2000, seed=0)
    square = images.view(-1, 28, 28) / 255
    center = (square.sum(dim=1) @ torch.arange(28.0)) / square.sum(dim=(1, 2))
    assert center.std() > 1.2  # pixels; the bend alone moves it by less
    bend = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *x, **how: 0 * bend(*x, **how))
    assert not torch.equal(built_in_digits(2000, seed=0)[0], images)
