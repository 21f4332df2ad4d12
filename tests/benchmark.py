"""How fast and how good is cvae_mnist.py? Prints tables, asserts nothing. Needs MNIST: MNIST_ROOT or --data-dir.

    python tests/benchmark.py            seconds per epoch, in turns: textbook loop, cvae_mnist.py, matrix products
    python tests/benchmark.py --quality  seconds that the textbook loop and cvae_mnist.py take to given test losses
    python tests/benchmark.py --recipes  test loss and drawings read as the digit asked for, after 10, 30, 100 epochs
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cvae_mnist  # noqa: E402


class Textbook:
    """The loop that tutorials show: a DataLoader that decodes every image, BCE on the sigmoid, .item() per batch."""

    def __init__(self, data_dir):
        self.data = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
        self.test = datasets.MNIST(data_dir, train=False, transform=transforms.ToTensor())
        torch.manual_seed(0)
        self.model = cvae_mnist.CVAE()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def loss(self, x, labels):
        recon, mu, log_var = self.model(x.view(-1, 784), F.one_hot(labels, 10).float())
        reconstruction = F.binary_cross_entropy(recon, x.view(-1, 784), reduction="sum")
        return reconstruction - 0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())

    def epoch(self):
        total = 0.0
        for x, labels in DataLoader(self.data, batch_size=128, shuffle=True):
            loss = self.loss(x, labels)
            self.optimizer.zero_grad()
            loss.backward()
            total += loss.item()
            self.optimizer.step()
        return total / len(self.data)

    @torch.no_grad()
    def test_loss(self):
        return sum(self.loss(x, labels).item() for x, labels in DataLoader(self.test, batch_size=1000)) / len(self.test)


class Ours:
    """train_cvae itself, a few epochs at a time: what it measures, saves and prints after each is part of the time."""

    def __init__(self, data_dir, half=True):
        self.data_dir, self.out_dir, self.done = data_dir, tempfile.mkdtemp(), 0
        self.processor = contextlib.nullcontext() if half else mock.patch.object(torch.cpu, "get_capabilities", dict)

    def epochs(self, count):
        """Goes on for count epochs; returns the seconds and the test loss of each, as train_cvae's own lines say."""
        lines, resume = io.StringIO(), self.done > 0
        self.done += count
        with contextlib.redirect_stdout(lines), self.processor:
            cvae_mnist.train_cvae(self.done, data_dir=self.data_dir, out_dir=self.out_dir, resume=resume)
        lines = [line.split() for line in lines.getvalue().splitlines() if line.startswith("epoch")]
        return [(float(words[words.index("s") - 1]), float(words[words.index("test") + 1])) for words in lines]

    def epoch(self):
        """Seconds of an epoch within a run: the first one after a resume, which warms up, does not count."""
        return statistics.mean(took for took, _ in self.epochs(3)[1:])


def matrix_products(dtype=torch.float32):
    """The matrix products of an epoch, forward and backward, and nothing else."""
    shapes = [(784 + 10, 600), (600, 50), (600, 50), (60, 600), (600, 784)]
    layers = [[torch.randn(shape, dtype=dtype) for shape in ((128, i), (o, i), (128, o))] for i, o in shapes]
    for _ in range(469):
        for number, (x, weight, gradient) in enumerate(layers):
            x @ weight.T
            gradient.T @ x
            if number:  # nobody needs the gradient of the images
                gradient @ weight


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def speed(data_dir, rounds):
    textbook, ours = Textbook(data_dir), Ours(data_dir)
    with cvae_mnist.half_products(torch.device("cpu")):
        half = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    columns = {"textbook loop": lambda: seconds(textbook.epoch), "cvae_mnist.py": ours.epoch}
    if half:
        columns["the same with bfloat16 switched off"] = Ours(data_dir, half=False).epoch
    columns["only the matrix products of an epoch, in float32"] = lambda: seconds(matrix_products)
    if half:
        columns["the same in bfloat16"] = lambda: seconds(partial(matrix_products, torch.bfloat16))
    rows = []
    for number in range(rounds + 1):  # the first round warms up
        row = [measure() for measure in columns.values()]
        rows += [row] if number else []
        print(f"round {number}:", *(f"{value:.2f}" for value in row), "" if number else "(not counted)", flush=True)
    print(f"\n| {rounds} rounds, in turns | seconds per epoch, median (min to max) |", end="")
    print(" times cvae_mnist.py's, median of the rounds |")
    print("|---|---|---|")
    for column, name in enumerate(columns):
        times = [row[column] for row in rows]
        ratio = statistics.median(row[column] / row[1] for row in rows)
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        print(f"| {name} | {spread} | {ratio:.2f} |")


def memory(data_dir):
    """Peak memory of whole processes: the imports alone, and three epochs of the whole job. Linux only."""
    code = "import torch, torchvision, matplotlib.pyplot, sys; sys.path.insert(0, {root!r}); {work}; "
    code += "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    with tempfile.TemporaryDirectory() as out:
        job = f"import cvae_mnist; cvae_mnist.main(['--epochs', '3', '--data-dir', {data_dir!r}, '--out-dir', {out!r}])"
        for name, work in ("imports alone", "pass"), ("whole job, 3 epochs", job):
            command = [sys.executable, "-c", code.format(root=str(ROOT), work=work)]
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=out)
            print(f"| peak memory, {name} | {int(result.stdout.split()[-1]) / 1024:.0f} MiB | |")


def quality(data_dir, targets):
    textbook, ours = Textbook(data_dir), Ours(data_dir)
    print("| test loss | textbook loop | cvae_mnist.py | ratio |\n|---|---|---|---|")
    spent, epochs, best = [0.0, 0.0], [0, 0], [float("inf")] * 2
    for target in targets:
        while max(best) > target:  # in turns; whoever is there waits
            if best[0] > target:
                spent[0] += seconds(textbook.epoch)
                best[0], epochs[0] = textbook.test_loss(), epochs[0] + 1
            if best[1] > target:
                took, best[1] = ours.epochs(1)[0]
                spent[1], epochs[1] = spent[1] + took, epochs[1] + 1
        cells = " | ".join(f"{s:.0f} s, {e} epochs" for s, e in zip(spent, epochs, strict=True))
        print(f"| {target} | {cells} | {spent[0] / spent[1]:.1f} |", flush=True)


def train_reader(data_dir):
    """A small CNN that reads digits; trained on the real training images."""
    torch.manual_seed(0)
    _, (images, labels), (test_images, test_labels) = cvae_mnist.load_digits(data_dir)
    reader = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.Adam(reader.parameters())
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(reader(images[batch].unsqueeze(1) / 255), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    reader.eval()
    share = share_read(reader, test_images.unsqueeze(1) / 255, test_labels)
    print(f"The reader, a small CNN, reads {100 * share:.2f} % of the test digits")
    return reader


@torch.no_grad()
def share_read(reader, images, labels):
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return sum((reader(x).argmax(1) == y).sum().item() for x, y in parts) / len(images)


RECIPES = {"textbook": dict(textbook=True, learning_rate=1e-3), "default": {}}


def recipes(data_dir, names, seeds, stages, keep):
    reader = train_reader(data_dir)
    print("| recipe | seed | epochs | seconds per epoch | test loss | drawings read as asked |")
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        for name in names:
            options, out = RECIPES[name], Path(keep, f"{name}_{seed}")
            for stage, epochs in enumerate(stages):
                lines = io.StringIO()
                with contextlib.redirect_stdout(lines):
                    arguments = dict(data_dir=data_dir, out_dir=out, seed=seed, resume=stage > 0, **options)
                    model = cvae_mnist.train_cvae(epochs, **arguments)
                took = [line.split() for line in lines.getvalue().splitlines() if line.startswith("epoch")]
                took = statistics.median(float(words[words.index("s") - 1]) for words in took)
                checkpoint, _ = cvae_mnist.load_checkpoint(out)
                labels = torch.arange(10_000) % 10
                z = torch.randn(10_000, 50, generator=torch.Generator().manual_seed(seed))
                read = share_read(reader, cvae_mnist.draw(model, z, torch.eye(10)[labels]), labels)
                test_loss = checkpoint["history"]["test_loss"][-1]
                print(f"| {name} | {seed} | {epochs} | {took:.1f} | {test_loss:.2f} | {100 * read:.2f} % |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_ROOT", "./mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=float, nargs="*", metavar="LOSS")
    parser.add_argument("--recipes", choices=RECIPES, nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--keep", help="folder for what --recipes trains; by default it is thrown away")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if options.recipes is not None:
        with tempfile.TemporaryDirectory() as folder:
            names = options.recipes or list(RECIPES)
            recipes(options.data_dir, names, options.seeds, options.stages, options.keep or folder)
    elif options.quality is not None:
        quality(options.data_dir, options.quality or [110, 105, 102, 100])
    else:
        speed(options.data_dir, options.rounds)
        if sys.platform == "linux":
            memory(os.path.abspath(options.data_dir))


if __name__ == "__main__":
    main()
