"""What all tests share: the script as a module, small data, a small model, a clean machine."""

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

matplotlib_files = tempfile.TemporaryDirectory()  # the user's own may be read-only
os.environ.update(MPLCONFIGDIR=matplotlib_files.name, OMP_NUM_THREADS="1")  # in subprocesses too
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cvae_mnist.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import cvae_mnist  # noqa: E402, I001, first, as users import it
import torch  # noqa: E402
from torchvision import datasets  # noqa: E402

CHECKPOINT = "cvae_checkpoint.pth"
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
OFFLINE = "http://127.0.0.1:9"
QUICK = dict(epochs=4, batch_size=32, h_dim=16, z_dim=3, device="cpu")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_machine(tmp_path, monkeypatch):
    """An empty current folder and home, no windows, no settings of matplotlib, no network."""
    home, rc = tmp_path / "home", tmp_path / "rc"
    for folder in (tmp_path / "here", home, rc):
        folder.mkdir()
    (rc / "matplotlibrc").touch()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "FORCE_COLOR", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    variables = dict(MPLBACKEND="agg", MATPLOTLIBRC=rc, HOME=home, USERPROFILE=home,
                     http_proxy=OFFLINE, https_proxy=OFFLINE, no_proxy="127.0.0.1")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{OFFLINE}/"])


@pytest.fixture
def here():
    return Path.cwd()


@pytest.fixture(params=["cpu", *([ACCELERATOR.type] if ACCELERATOR else [])])
def device(request):
    return request.param


def write_mnist(folder, train, test):
    """Writes (images [N, 784], labels [N]) pairs as MNIST's four files, as torchvision does."""
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in ("train", train), ("t10k", test):
        header = struct.pack(">IIII", 2051, len(images), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">II", 2049, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    return Path(folder)


@pytest.fixture(scope="session")
def digits():
    """(images, labels) to train on and to test on: 600 and 200 built-in digits."""
    return cvae_mnist.built_in_digits(600, seed=0), cvae_mnist.built_in_digits(200, seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory, digits):
    """A folder with these digits as MNIST's files. Read only."""
    return write_mnist(tmp_path_factory.mktemp("data"), *digits)


@pytest.fixture
def quick(data):
    """Arguments that make train_cvae quick."""
    return {**QUICK, "data_dir": data}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A folder with what four quick epochs leave behind. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    cvae_mnist.train_cvae(**QUICK, data_dir=data, out_dir=folder)
    return folder


@pytest.fixture(scope="session")
def mnist_root():
    if "MNIST_ROOT" not in os.environ:
        pytest.skip("needs the real MNIST: set MNIST_ROOT to the folder that holds MNIST/raw")
    return Path(os.environ["MNIST_ROOT"]).resolve()


def run(*arguments, script=SCRIPT, env=(), **options):
    """Runs the script as a user would, in the current folder; its output is bytes."""
    options |= dict(env={**os.environ, **dict(env)}, capture_output=True, timeout=100)
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], **options)


def load(folder):
    return torch.load(Path(folder, CHECKPOINT), map_location="cpu", weights_only=True)


def same(one, other):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
