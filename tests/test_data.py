"""Where the digits come from: MNIST's files, a download, the built-in digits."""

import gzip
import hashlib
import http.server
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_mnist
from torchvision import datasets

import cvae_mnist
from cvae_mnist import UserError, built_in_digits, load_digits

NAMES = TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PAGE = b"<html>Please sign in to this network</html>"


@pytest.fixture
def few(monkeypatch):
    """Where the script makes 70,000 built-in digits, it makes 700."""
    make = built_in_digits
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: make(count // 100, seed))


@pytest.fixture
def mirror(data, monkeypatch):
    """A server of MNIST's files. mirror.answer(file) returns (status, what is sent)."""
    raw = data / "MNIST" / "raw"
    files = {f"/{name}.gz": gzip.compress((raw / name).read_bytes()) for name in NAMES}

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

    sums = [(path[1:], hashlib.md5(file).hexdigest()) for path, file in files.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.answer = files, lambda file: (200, file)
        server.url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [server.url])
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("folder", [".", "mnist/MNIST/raw"])  # the second: of an earlier try
def test_mnist_is_downloaded_once_and_that_is_said_before(mirror, digits, capfd, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    name, train, test = load_digits("mnist")
    assert name == "MNIST"
    assert torch.equal(train[0], digits[0][0]) and torch.equal(test[1], digits[1][1])
    output, errors = capfd.readouterr()
    assert output.startswith("Downloading MNIST") and "\r" not in output and errors == ""
    mirror.answer = None  # from now on a request is an error
    assert load_digits("mnist")[0] == "MNIST" and capfd.readouterr().out == ""


def test_a_mirror_that_does_not_answer_is_followed_by_the_next(mirror, monkeypatch):
    real, seconds = socket.setdefaulttimeout, []

    def quicker(timeout):
        seconds.append(timeout)
        real(timeout and 0.3)

    monkeypatch.setattr(socket, "setdefaulttimeout", quicker)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [silent_url, mirror.url])
        assert load_digits("mnist")[0] == "MNIST"
    assert 20 <= seconds[0] <= 60 and socket.getdefaulttimeout() is None  # for slow mirrors


@pytest.mark.parametrize("answer", [
    lambda file: (200, PAGE),
    lambda file: (200, file) if len(file) > 3000 else (503, b""),
], ids=["a web page", "labels missing"])
def test_a_bad_download_is_not_used_and_mended_by_the_next_run(mirror, few, capfd, answer):
    good, mirror.answer = mirror.answer, answer
    assert load_digits("mnist")[0] == "built-in digits"
    output, errors = capfd.readouterr()
    assert "could not download" in output and all(name in output for name in NAMES)
    assert errors == ""
    mirror.answer = good
    name, (images, labels), _ = load_digits("mnist")
    assert name == "MNIST" and images.shape == (600, 784) and labels.shape == (600,)


def test_without_a_network_the_reason_is_given_and_built_in_digits_are_used(few, capfd):
    name, (train, _), (test, _) = load_digits("mnist")
    output, errors = capfd.readouterr()
    for text in ("127.0.0.1:9", "refused", str(Path("mnist/MNIST/raw"))):
        assert text in output
    assert name == "built-in digits" and errors == ""
    assert torch.equal(train, built_in_digits(600, seed=0)[0])
    assert torch.equal(test, built_in_digits(100, seed=1)[0])  # other digits than to train on


def test_files_put_there_by_hand_need_no_network(mirror, monkeypatch, digits, here):
    raw, processed = (Path.home() / "digits" / "MNIST" / name for name in ("raw", "processed"))
    for folder in (raw, processed):
        folder.mkdir(parents=True)
    for path, content in mirror.files.items():
        (raw / path[1:]).write_bytes(content)
    for name in ("training.pt", "test.pt"):  # they do not matter
        (processed / name).write_text("from an old torchvision")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    name, (images, _), _ = load_digits("~/digits")
    assert name == "MNIST" and torch.equal(images, digits[0][0]) and not any(here.iterdir())


@pytest.mark.parametrize(("name", "content", "why"), [
    (TRAIN_IMAGES, lambda old: old[:-100], ""),
    (TRAIN_IMAGES, lambda old: old.replace(b"\x02\x58", b"\x02\x57", 1)[:-784], "599"),
    (TEST_IMAGES, lambda old: old.replace(b"\x1c\0\0\0\x1c", b"\x0e\0\0\0\x38", 1), "14, 56"),
    (TRAIN_LABELS, lambda old: old[:-1] + bytes([22]), "22"),
    (TRAIN_LABELS, lambda old: PAGE, ""),
    (TEST_LABELS, lambda old: b"", ""),
], ids=["cut off", "one too few", "14 x 56 pixels", "a letter", "a web page", "empty"])
def test_files_that_cannot_be_used_are_an_error_with_a_reason_and_stay(
        digits, here, monkeypatch, name, content, why):
    raw = write_mnist(here, *digits) / "MNIST" / "raw"
    (raw / name).write_bytes(content((raw / name).read_bytes()))
    before = {path: path.read_bytes() for path in raw.iterdir()}
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda *_: pytest.fail("other digits"))
    with pytest.raises(UserError, match=re.escape(str(raw))) as error:
        load_digits(here)
    message = str(error.value)
    assert why in message and not re.search(": [.;]|delete", message, flags=re.IGNORECASE)
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


def test_a_data_set_that_cannot_be_read_gives_the_systems_reason(digits, here):
    raw = write_mnist(here, *digits) / "MNIST" / "raw"
    (raw / TRAIN_IMAGES).unlink()
    (raw / TRAIN_IMAGES).mkdir()  # root may read every file, but no folder as a file
    with pytest.raises(OSError, match="train-images"):
        load_digits(here)
    with pytest.raises(OSError):
        load_digits(raw / TEST_IMAGES)


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


def test_built_in_digits_are_shifted_and_bent(monkeypatch):
    images, _ = built_in_digits(2000, seed=0)
    square = images.view(-1, 28, 28) / 255
    center = (square.sum(dim=1) @ torch.arange(28.0)) / square.sum(dim=(1, 2))
    assert center.std() > 1.2  # pixels; the bend alone moves it by less
    interpolate = torch.nn.functional.interpolate
    straight = lambda *field, **options: 0 * interpolate(*field, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "interpolate", straight)
    assert not torch.equal(built_in_digits(2000, seed=0)[0], images)
