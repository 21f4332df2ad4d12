"""Where the digits come from: MNIST's files, a download, the built-in digits."""

import gzip
import hashlib
import http.server
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import write_mnist
from torchvision import datasets

import cvae_mnist
from cvae_mnist import UserError, built_in_digits, load_digits

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


@pytest.fixture
def few(monkeypatch):
    """Where the script makes 70,000 built-in digits, it makes 700."""
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: built_in_digits(count // 100, seed))


@pytest.fixture
def mirror(data, monkeypatch):
    """A server of MNIST's files. mirror.answer(file) returns (status, what is sent)."""
    files = {f"/{name}.gz": gzip.compress((data / "MNIST" / "raw" / name).read_bytes()) for name in NAMES}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, content = self.server.answer(files[self.path])
            self.send_response(status)
            self.send_header("Content-Length", str(len(files[self.path])))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.answer = files, lambda file: (200, file)
        sums = [(f"{name}.gz", hashlib.md5(files[f"/{name}.gz"]).hexdigest()) for name in NAMES]
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


# A download


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_mnist_is_downloaded_once_and_that_is_said_before(mirror, here, digits, capfd, folder):
    if folder == "empty":  # of an earlier try
        (here / "mnist" / "MNIST" / "raw").mkdir(parents=True)
    name, train, test = load_digits("mnist")
    assert name == "MNIST" and torch.equal(train[0], digits[0][0]) and torch.equal(test[1], digits[1][1])
    output, errors = capfd.readouterr()
    assert re.match("Downloading MNIST", output) and "\r" not in output and errors == ""
    mirror.answer = None  # from now on a request is an error
    assert load_digits("mnist")[0] == "MNIST" and capfd.readouterr().out == ""


def test_a_mirror_that_does_not_answer_is_followed_by_the_next(mirror, monkeypatch):
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds, real=socket.setdefaulttimeout: real(0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirrors = [f"http://127.0.0.1:{silent.getsockname()[1]}/", *datasets.MNIST.mirrors]
        monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
        assert load_digits("mnist")[0] == "MNIST"


def test_a_slow_mirror_is_given_half_a_minute(mirror, few, monkeypatch):
    seen = []

    def answer(file):
        seen.append(socket.getdefaulttimeout())
        return 404, b""

    mirror.answer = answer
    before = socket.getdefaulttimeout()
    load_digits("mnist")
    assert 20 <= seen[0] <= 60 and socket.getdefaulttimeout() == before


PAGE = b"<html>Please sign in to this network</html>"


@pytest.mark.parametrize("answer", [
    lambda file: (200, PAGE), lambda file: (200, file) if len(file) > 3000 else (503, b"")],
    ids=["a web page", "labels missing"])  # fmt: skip
def test_a_bad_download_is_not_used_and_mended_by_the_next_run(mirror, few, capfd, answer):
    good, mirror.answer = mirror.answer, answer
    assert load_digits("mnist")[0] == "built-in digits"
    output, errors = capfd.readouterr()
    assert "could not download" in output and all(name in output for name in NAMES) and errors == ""
    mirror.answer = good
    name, (images, labels), _ = load_digits("mnist")
    assert name == "MNIST" and images.shape == (600, 784) and labels.shape == (600,)


def test_without_a_network_the_reason_is_given_and_built_in_digits_are_used(few, capfd, here):
    name, train, test = load_digits("mnist")
    output, errors = capfd.readouterr()
    assert "127.0.0.1:9" in output and "refused" in output and str(Path("mnist", "MNIST", "raw")) in output
    assert name == "built-in digits" and errors == ""
    assert not torch.equal(train[0][: len(test[0])], test[0])  # other digits to test on


# Files that are there


def test_files_put_there_by_hand_need_no_network(mirror, here, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = here / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mirror.files.items():
        (raw / name[1:]).write_bytes(content)
    assert load_digits("mnist")[0] == "MNIST"


def test_a_data_dir_under_home(digits, here):
    write_mnist(Path.home() / "digits", *digits)
    assert load_digits("~/digits")[0] == "MNIST" and not any(here.iterdir())


def test_an_old_cache_of_processed_files_does_not_matter(digits, here):
    write_mnist(here, *digits)
    (here / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        (here / "MNIST" / "processed" / name).write_text("from an old torchvision")
    assert torch.equal(load_digits(here)[1][0], digits[0][0])


def shorten(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])


def swap(raw):
    one, other = (raw / "train-images-idx3-ubyte").read_bytes(), (raw / "t10k-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(other)
    (raw / "t10k-images-idx3-ubyte").write_bytes(one)


def enlarge(raw):
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\x1c\0\0\0\x1c", b"\0\0\0\x0e\0\0\0\x38", 1))


UNUSABLE = {
    "cut off": shorten, "training and test swapped": swap, "14 x 56 pixels": enlarge,
    "a web page": lambda raw: (raw / "train-labels-idx1-ubyte").write_bytes(PAGE),
    "empty": lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(b""),
}


@pytest.mark.parametrize("damage", UNUSABLE)
def test_files_that_cannot_be_used_are_an_error_with_a_reason_and_stay(digits, here, monkeypatch, damage):
    write_mnist(here, *digits)
    raw = here / "MNIST" / "raw"
    UNUSABLE[damage](raw)
    before = {path: path.read_bytes() for path in raw.iterdir()}
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda *_: pytest.fail("other digits were used"))
    with pytest.raises(UserError, match=re.escape(str(raw))) as error:
        load_digits(here)
    assert ": ." not in str(error.value) and "delete" not in str(error.value).lower()
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


def test_letters_are_an_error_that_names_the_labels(digits, here):
    images, labels = digits[0]
    write_mnist(here, (images, labels + 13), digits[1])
    with pytest.raises(UserError, match="22"):
        load_digits(here)


def test_a_data_set_that_cannot_be_read_gives_the_systems_reason(digits, here):
    write_mnist(here, *digits)
    (here / "MNIST" / "raw" / "train-images-idx3-ubyte").unlink()
    (here / "MNIST" / "raw" / "train-images-idx3-ubyte").mkdir()  # root may read every file, but no folder as a file
    with pytest.raises(OSError, match="train-images"):
        load_digits(here)
    with pytest.raises(OSError):
        load_digits(here / "MNIST" / "raw" / "t10k-images-idx3-ubyte")


# The built-in digits


def test_built_in_digits_are_like_mnist():
    images, labels = built_in_digits(3000, seed=0)
    assert (images.shape, images.dtype, labels.dtype) == ((3000, 784), torch.uint8, torch.int64)
    assert all(200 < count < 400 for count in labels.bincount()) and len(labels.bincount()) == 10
    assert 0.10 < images.div(255).mean() < 0.17  # MNIST: 0.13
    assert 50 < (images > 250).sum(1).float().mean() < 90  # strokes are solid; MNIST: 57 pixels of an image
    images = images.view(-1, 28, 28)
    edge = torch.cat([images[:, [0, -1]].flatten(), images[:, :, [0, -1]].flatten()])
    assert edge.div(255).mean() < 0.02  # none is cut off


def test_built_in_digits_differ_in_font_slant_and_bend_and_can_be_read():
    images, labels = built_in_digits(3000, seed=0)
    others, answers = built_in_digits(500, seed=1)
    right = labels[torch.cdist(others / 255, images / 255).argmin(dim=1)] == answers
    assert 0.75 < right.float().mean() < 0.99 and all(right[answers == digit].float().mean() > 0.5 for digit in range(10))
    assert len({image.numpy().tobytes() for image in torch.cat([images, others])}) == 3500
    again, _ = built_in_digits(3000, seed=0)
    assert torch.equal(images, again)
