"""What the tests share: the script as a module, few digits, a small model, a clean machine."""

import os
import struct
import sys
import tempfile
from functools import partial, wraps
from inspect import signature
from pathlib import Path

import pytest

matplotlib_files = tempfile.TemporaryDirectory()  # the user's own may be read-only
os.environ.update(MPLCONFIGDIR=matplotlib_files.name, OMP_NUM_THREADS="1")
os.environ.pop("MPLBACKEND", None)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cvae_mnist.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT))
import cvae_mnist  # noqa: E402, I001, first, as users import it
import torch  # noqa: E402

CHECKPOINT = "cvae_checkpoint.pth"
MNIST_ROOT = os.getenv("MNIST_ROOT") and Path(os.environ["MNIST_ROOT"]).resolve()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_machine(tmp_path, monkeypatch):
    """An empty current folder and home, and no network."""
    for folder in "here", "home":
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    for name in "HOME", "USERPROFILE":
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in "http_proxy", "https_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def write_images(folder, train, test, dataset="MNIST"):
    """Writes (images, labels) to train on and to test on as torchvision's files; returns folder."""
    raw = Path(folder, dataset, "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in ("train", train), ("t10k", test):
        header = struct.pack(">IIII", 2051, len(images), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">II", 2049, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    return folder


@pytest.fixture(scope="session")
def digits():
    """(images, labels) to train on and to test on: 600 and 200 built-in digits."""
    return cvae_mnist.built_in_digits(600, seed=0), cvae_mnist.built_in_digits(200, seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory, digits):
    """A folder with these digits as MNIST's files. Read only."""
    return write_images(tmp_path_factory.mktemp("data"), *digits)


@pytest.fixture(scope="session")
def train(data):
    """train_cvae, but quick; a test may pass other arguments."""
    sizes = {"batch_size": 32, "h_dim": 16, "z_dim": 3}
    return partial(cvae_mnist.train_cvae, epochs=4, **sizes, device="cpu", data_dir=data)


@pytest.fixture(scope="session")
def options(train):
    """The same as options of the command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in train.keywords.items()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, train):
    """A folder with what four quick epochs leave behind; tests may draw into it."""
    folder = tmp_path_factory.mktemp("trained")
    train(out_dir=folder)
    return folder


@pytest.fixture
def watch(monkeypatch):
    """watch(name) returns a list that gets the arguments of each call, a dict, however written."""

    def watch(name, run=True):
        function, calls = getattr(cvae_mnist, name), []

        @wraps(function)
        def watched(*values, **named):
            bound = signature(function).bind(*values, **named)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return function(*values, **named) if run else None

        monkeypatch.setattr(cvae_mnist, name, watched)
        return calls

    return watch


def load(folder=".", name=CHECKPOINT):
    return torch.load(Path(folder, name), map_location="cpu", weights_only=True)


def same(one, other):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
