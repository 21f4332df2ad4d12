import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cvae_mnist.py"
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import cvae_mnist  # noqa: E402, I001, before torch, as users import it
import torch  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count()))  # small models: more threads only get into each other's way


def write_mnist(folder, training, test):
    """Writes (images [N, 784], labels [N]) pairs as MNIST's four files, in torchvision's layout."""
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in ("train", training), ("t10k", test):
        header = struct.pack(">IIII", 2051, len(images), 28, 28)
        Path(raw, f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">II", 2049, len(labels))
        Path(raw, f"{part}-labels-idx1-ubyte").write_bytes(header + labels.to(torch.uint8).numpy().tobytes())
    return Path(folder)


@pytest.fixture(scope="session")
def digits():
    """Built-in digits, few: (images, labels) to train on and to test on."""
    return cvae_mnist.built_in_digits(2000, seed=0), cvae_mnist.built_in_digits(400, seed=1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, digits):
    """A small data set in MNIST's files. Read only: a test that damages it makes its own with write_mnist."""
    return write_mnist(tmp_path_factory.mktemp("data"), *digits)


@pytest.fixture(scope="session")
def mnist_root():
    if "MNIST_ROOT" not in os.environ:
        pytest.skip("needs the real MNIST: set MNIST_ROOT to the folder that holds MNIST/raw")
    return Path(os.environ["MNIST_ROOT"]).resolve()


@pytest.fixture(scope="session")
def small(data_dir):
    """Arguments that make train_cvae quick."""
    return dict(epochs=2, h_dim=64, z_dim=8, data_dir=data_dir, device="cpu")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small):
    """A folder with the checkpoint of a small CVAE. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    cvae_mnist.train_cvae(out_dir=folder, **small)
    return folder


@pytest.fixture
def run(tmp_path):
    """run("train", "--epochs", "1") runs the script in an empty folder, as a user would; returns what it left."""

    def run(*arguments, cwd=tmp_path, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "default", **options.pop("env", {})}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **options)

    return run
