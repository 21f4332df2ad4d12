"""How fast and how good is cvae_mnist.py? Prints tables, asserts nothing. Needs MNIST: MNIST_ROOT or --data-dir.

    python tests/benchmark.py            seconds per epoch, in turns: listing, cvae_mnist.py, its products; memory
    python tests/benchmark.py --busy     seconds per epoch alone and beside a program that keeps one core busy
    python tests/benchmark.py --quality  seconds that the listing and cvae_mnist.py take to given test losses
    python tests/benchmark.py --recipe   test loss and label accuracy after 10, 30 and 100 epochs, for three seeds
    python tests/benchmark.py --known    losses of the textbook's recipe, epoch by epoch, beside published ones

The listing is the loop that tutorials show: a DataLoader that decodes every image, binary cross-entropy on the sigmoid,
.item() for every batch. The textbook's recipe is Adam at 1e-3, batches of 128, PyTorch's initial weights and the last
weights of the run. Label accuracy is the share of 10,000 drawings, 1,000 of each digit, that a small CNN assigns to the
digit asked for.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cvae_mnist  # noqa: E402, I001, before torch: it sets how PyTorch's threads wait

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402


class Textbook:
    """The textbook's recipe, with the script's own model and loss."""

    def __init__(self, data_dir, seed=0, **sizes):
        _, (self.images, self.labels), (self.test_images, self.test_labels) = cvae_mnist.load_digits(data_dir)
        torch.manual_seed(seed)
        self.model = cvae_mnist.CVAE(784, **sizes)
        for layer in self.model.children():
            layer.reset_parameters()  # PyTorch's own initial weights
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self):
        """Returns reconstruction and KL in nats per image, as they were during the epoch."""
        sums = torch.zeros(2)
        for batch in torch.randperm(len(self.images)).split(128):
            x, c = self.images[batch] / 255, self.model.one_hot(self.labels[batch])
            reconstruction, kl = cvae_mnist.negative_elbo(self.model, x, c)
            self.optimizer.zero_grad()
            (reconstruction + kl).backward()
            self.optimizer.step()
            sums += torch.stack([reconstruction, kl]).detach()
        return (sums / len(self.images)).tolist()

    def test_loss(self):
        return sum(cvae_mnist.evaluate(self.model, self.test_images, self.test_labels))


class Listing(Textbook):
    """The same recipe in the loop that tutorials show."""

    def __init__(self, data_dir):
        super().__init__(data_dir)
        data = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
        self.batches = DataLoader(data, batch_size=128, shuffle=True)

    def epoch(self):
        total = 0.0
        for x, labels in self.batches:
            x = x.view(-1, 784)
            recon, mu, log_var = self.model(x, F.one_hot(labels, 10).float())
            reconstruction = F.binary_cross_entropy(recon, x, reduction="sum")
            loss = reconstruction - 0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
            self.optimizer.zero_grad()
            loss.backward()
            total += loss.item()
            self.optimizer.step()
        return total / len(self.images)


class Ours:
    """train_cvae itself, a few epochs at a time: what it measures, saves and prints after each is part of the time."""

    def __init__(self, data_dir, bfloat16=True):
        self.data_dir, self.out_dir, self.done = data_dir, tempfile.mkdtemp(), 0
        self.processor = mock.patch.object(torch.cpu, "get_capabilities", dict) if not bfloat16 else None

    def epochs(self, count):
        """Goes on for count epochs; returns the seconds and the test loss of each, as train_cvae's own lines say."""
        lines, resume = io.StringIO(), self.done > 0
        self.done += count
        with contextlib.redirect_stdout(lines), self.processor or contextlib.nullcontext():
            cvae_mnist.train_cvae(self.done, data_dir=self.data_dir, out_dir=self.out_dir, resume=resume)
        return epoch_lines(lines.getvalue())

    def epoch(self):
        """Seconds of an epoch within a run: the first one after a resume, which warms up, does not count."""
        return statistics.mean(took for took, _ in self.epochs(4)[1:])


def epoch_lines(text):
    lines = [line.split() for line in text.splitlines() if line.startswith("epoch")]
    return [(float(words[words.index("s") - 1]), float(words[words.index("test") + 1])) for words in lines]


def matrix_products(dtype=torch.float32, batch=256):
    """The matrix products of an epoch, forward and backward, and nothing else."""
    shapes = [(784 + 10, 600), (600, 50), (600, 50), (60, 600), (600, 784)]
    layers = [[torch.randn(shape, dtype=dtype) for shape in ((batch, i), (o, i), (batch, o))] for i, o in shapes]
    for _ in range(60_000 // batch):
        for number, (x, weight, gradient) in enumerate(layers):
            x @ weight.T
            gradient.T @ x
            if number:  # nobody needs the gradient of the images
                gradient @ weight


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(times):
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def speed(data_dir, rounds):
    with cvae_mnist.autocast(torch.device("cpu")):
        bfloat16 = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16
    columns = {"listing": partial(seconds, Listing(data_dir).epoch), "cvae_mnist.py": Ours(data_dir).epoch}
    if bfloat16:
        columns["the same without bfloat16"] = Ours(data_dir, bfloat16=False).epoch
        columns["its matrix products alone, in bfloat16"] = partial(seconds, partial(matrix_products, torch.bfloat16))
    columns["its matrix products alone, in float32"] = partial(seconds, matrix_products)
    rows = []
    for number in range(rounds + 1):  # the first round warms up
        row = [measure() for measure in columns.values()]
        rows += [row] if number else []
        print(f"round {number}:", *(f"{value:.2f}" for value in row), "" if number else "(not counted)", flush=True)
    print(f"\n| {rounds} rounds, in turns | seconds per epoch, median (min to max) | ratio to cvae_mnist.py, median |")
    print("|---|---|---|")
    for column, name in enumerate(columns):
        ratio = statistics.median(row[column] / row[1] for row in rows)
        print(f"| {name} | {spread([row[column] for row in rows])} | {ratio:.2f} |")


def memory(data_dir):
    """Peak memory of whole processes: the imports alone, and three epochs of the whole job. Linux only."""
    code = "import sys; sys.path.insert(0, {root!r}); import cvae_mnist, matplotlib.pyplot; {work}; "
    code += "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    with tempfile.TemporaryDirectory() as out:
        job = f"cvae_mnist.main(['--epochs', '3', '--data-dir', {data_dir!r}, '--out-dir', {out!r}])"
        for name, work in ("imports alone", "pass"), ("whole job, 3 epochs", job):
            command = [sys.executable, "-c", code.format(root=str(ROOT), work=work)]
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=out)
            print(f"| peak memory, {name} | {int(result.stdout.split()[-2]) / 1024:.0f} MiB | |")


BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with the benchmark, killed or not


def busy(data_dir, rounds, settings):
    """Whole runs of four epochs, in turns; the first epoch warms up and does not count."""
    command = [sys.executable, ROOT / "cvae_mnist.py", "train", "--epochs", "4", "--data-dir", data_dir]
    times = {setting: ([], []) for setting in settings}
    for number in range(rounds):
        for setting, (alone, beside) in times.items():
            environment = {**os.environ, **dict(part.split("=") for part in setting.split() if "=" in part)}
            for column in alone, beside:
                neighbour = column is beside and subprocess.Popen([sys.executable, "-c", BUSY])
                with tempfile.TemporaryDirectory() as out:
                    done = subprocess.run([*command, "--out-dir", out], env=environment, capture_output=True, text=True)
                if neighbour:
                    neighbour.kill()
                column.append(statistics.median(took for took, _ in epoch_lines(done.stdout)[1:]))
            print(f"round {number + 1}: {setting}: {alone[-1]:.2f} alone, {beside[-1]:.2f} beside", flush=True)
    print("\n| | seconds per epoch alone, median (min to max) | beside one busy program | ratio |\n|---|---|---|---|")
    for setting, (alone, beside) in times.items():
        ratio = statistics.median(beside) / statistics.median(alone)
        print(f"| {setting} | {spread(alone)} | {spread(beside)} | {ratio:.1f} |")


def quality(data_dir, targets):
    """Both train until they reach each target; evaluating the listing does not count as its time."""
    listing, ours = Listing(data_dir), Ours(data_dir)
    print("| test loss | listing | cvae_mnist.py | ratio |\n|---|---|---|---|")
    spent, epochs, best = [0.0, 0.0], [0, 0], [float("inf")] * 2
    for target in targets:
        while best[0] > target:
            spent[0] += seconds(listing.epoch)
            best[0], epochs[0] = min(best[0], listing.test_loss()), epochs[0] + 1
        while best[1] > target:
            took, best[1] = ours.epochs(1)[0]
            spent[1], epochs[1] = spent[1] + took, epochs[1] + 1
        cells = " | ".join(f"{s:.0f} s, {e} epochs" for s, e in zip(spent, epochs, strict=True))
        print(f"| {target} | {cells} | {spent[0] / spent[1]:.1f} |", flush=True)


def train_reader(data_dir, built_in=False):
    """A small CNN that reads digits, trained on the training images."""
    torch.manual_seed(0)
    if built_in:
        images, labels = cvae_mnist.built_in_digits(60_000, seed=0)
        test_images, test_labels = cvae_mnist.built_in_digits(10_000, seed=1)
    else:
        _, (images, labels), (test_images, test_labels) = cvae_mnist.load_digits(data_dir)
    reader = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.Adam(reader.parameters())
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(reader(images[batch].view(-1, 1, 28, 28) / 255), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    reader.eval()
    share = share_read(reader, test_images.view(-1, 1, 28, 28) / 255, test_labels)
    print(f"The CNN reads {100 * share:.2f} % of the test digits")
    return reader


@torch.no_grad()
def share_read(reader, images, labels):
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return sum((reader(x).argmax(1) == y).sum().item() for x, y in parts) / len(images)


def label_accuracy(reader, model, seed):
    labels = torch.arange(10_000) % 10
    z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(seed))
    return 100 * share_read(reader, cvae_mnist.generate(model, z, labels), labels)


def recipe(data_dir, seeds, stages, textbook=False, built_in=False):
    reader = train_reader(data_dir, built_in)
    print("| seed | epochs | test loss | label accuracy | seconds per epoch, median |\n|---|---|---|---|---|")
    for seed in seeds:
        out, book = tempfile.mkdtemp(), Textbook(data_dir, seed) if textbook else None
        for stage, epochs in enumerate(stages):
            lines = io.StringIO()
            if textbook:
                took = [seconds(book.epoch) for _ in range(epochs - (stages[stage - 1] if stage else 0))]
                model, loss = book.model, book.test_loss()
            else:
                with contextlib.redirect_stdout(lines):
                    model = cvae_mnist.train_cvae(epochs, data_dir=data_dir, out_dir=out, seed=seed, resume=stage > 0)
                took, losses = zip(*epoch_lines(lines.getvalue()), strict=True)
                loss = losses[-1]
            accuracy = label_accuracy(reader, model, seed)
            print(f"| {seed} | {epochs} | {loss:.2f} | {accuracy:.1f} % | {statistics.median(took):.2f} |", flush=True)


KNOWN = {  # name: (sizes of the model, {epoch: training loss as published})
    "plain VAE, h_dim 400, z_dim 20": (
        dict(h_dim=400, z_dim=20, num_classes=0),
        {1: "163.2, 165.3", 2: "120.6", 3: "114.2", 4: "111.3", 5: "109.7", 10: "106.3 (81.0 + 25.3)"}
        | {100: "100.6 (75.3 + 25.3)"},
    ),
    "CVAE, h_dim 600, z_dim 50": ({}, {1: "159.5", 100: "94.3"}),
}


def known(data_dir, last):
    print("| model | epoch | published training loss | here | its terms | test loss here |\n|---|---|---|---|---|---|")
    for name, (sizes, losses) in KNOWN.items():
        textbook = Textbook(data_dir, **sizes)
        for epoch in range(1, last + 1):
            reconstruction, kl = textbook.epoch()
            if epoch in losses:
                here = f"{reconstruction + kl:.1f} | {reconstruction:.1f} + {kl:.1f} | {textbook.test_loss():.1f}"
                print(f"| {name} | {epoch} | {losses[epoch]} | {here} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_ROOT", "./mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", nargs="*", metavar="NAME=VALUE", help="environments to compare")
    parser.add_argument("--quality", type=float, nargs="*", metavar="LOSS")
    parser.add_argument("--recipe", action="store_true")
    parser.add_argument("--textbook", action="store_true", help="with --recipe: the textbook's instead")
    parser.add_argument("--built-in", action="store_true", help="with --recipe: on the built-in digits")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[10, 30, 100])
    options = parser.parse_args()
    data_dir = os.path.abspath(options.data_dir)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if options.busy is not None:
        busy(data_dir, options.rounds, ["as it is", *options.busy])
    elif options.quality is not None:
        quality(data_dir, options.quality or [110, 105, 100, 98, 96])
    elif options.recipe and options.built_in:
        with tempfile.TemporaryDirectory() as nothing, mock.patch.object(datasets.MNIST, "mirrors", []):
            recipe(nothing, options.seeds, options.stages, built_in=True)
    elif options.recipe:
        recipe(data_dir, options.seeds, options.stages, options.textbook)
    elif options.known:
        known(data_dir, max(options.stages))
    else:
        speed(data_dir, options.rounds)
        if sys.platform == "linux":
            memory(data_dir)


if __name__ == "__main__":
    main()
