"""How fast and how good is cvae_mnist.py? Prints tables, asserts nothing. Needs MNIST: MNIST_ROOT or --data-dir.

    python tests/benchmark.py speed    seconds per epoch, in turns: the listing, cvae_mnist.py; peak memory
    python tests/benchmark.py quality  seconds that both take to given test losses
    python tests/benchmark.py recipe   loss, label accuracy and more after 10, 30, 100 epochs; three seeds
    python tests/benchmark.py known    losses of the textbook's recipe, epoch by epoch, beside published ones

The textbook's recipe: Adam at 1e-3, batches of 128, PyTorch's initial weights, the last weights of the run. The
listing is that recipe in the loop that tutorials show: a DataLoader that decodes every image, cross-entropy on the
sigmoid, .item() for every batch. Label accuracy: the share of 10,000 drawings, 1,000 of each digit, that a small CNN
assigns to the digit asked for. Everything runs on the CPU.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cvae_mnist  # noqa: E402, I001, before torch: it sets how PyTorch's threads wait
from cvae_mnist import CVAE, evaluate, generate, negative_elbo  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402


class Textbook:
    """The textbook's recipe, with the script's own model and loss."""

    def __init__(self, data_dir, **sizes):
        _, (self.images, self.labels), self.test_set = cvae_mnist.load_digits(data_dir)
        torch.manual_seed(0)
        self.model = CVAE(784, **sizes)
        for layer in self.model.children():
            layer.reset_parameters()  # PyTorch's own initial weights
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self):
        """Returns reconstruction loss and KL in nats per image, as they were during the epoch."""
        sums = torch.zeros(2)
        for batch in torch.randperm(len(self.images)).split(128):
            x, c = self.images[batch] / 255, self.model.one_hot(self.labels[batch])
            terms = torch.stack(negative_elbo(self.model, x, c)).sum(dim=1)
            self.optimizer.zero_grad()
            terms.sum().backward()
            self.optimizer.step()
            sums += terms.detach()
        return (sums / len(self.images)).tolist()

    def test_loss(self):
        return sum(evaluate(self.model, *self.test_set))


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


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ours(data_dir, out_dir, done, epochs):
    """Continues train_cvae for some epochs, all that it saves included; returns the seconds of each."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        cvae_mnist.train_cvae(done + epochs, data_dir=data_dir, out_dir=out_dir, resume=done > 0, device="cpu")
    lines = [line for line in lines.getvalue().splitlines() if line.startswith("epoch ")]
    return [float(line.split("  ")[-2].removesuffix(" s")) for line in lines]


def speed(data_dir, out_dir, rounds=5):
    bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    listing, times = Listing(data_dir), {"listing": [], "cvae_mnist.py": [], "without bfloat16": []}
    for number in range(rounds + 1):
        times["listing"].append(seconds(listing.epoch))
        # Four epochs, of which the first warms up and does not count.
        times["cvae_mnist.py"].append(statistics.mean(ours(data_dir, f"{out_dir}/a", 4 * number, 4)[1:]))
        with mock.patch.object(torch.cpu, "get_capabilities", dict):
            if bfloat16:
                times["without bfloat16"].append(statistics.mean(ours(data_dir, f"{out_dir}/b", 4 * number, 4)[1:]))
        print(f"round {number}:", *(f"{column[-1]:.2f}" for column in times.values() if column), flush=True)
    print(f"\n| seconds per epoch, {rounds} rounds in turns | median (min to max) | ratio, median |\n|---|---|---|")
    for name, column in times.items():
        if column:
            ratio = statistics.median(a / b for a, b in zip(column[1:], times["cvae_mnist.py"][1:], strict=True))
            middle, low, high = statistics.median(column[1:]), min(column[1:]), max(column[1:])
            print(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} |")
    code = "import resource, sys; sys.path.insert(0, {!r}); import cvae_mnist, matplotlib.pyplot; {}; "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, 'MiB at most')"
    job = f"cvae_mnist.main(['--epochs', '3', '--data-dir', {data_dir!r}, '--out-dir', '{out_dir}/c'])"
    for name, work in ("imports alone", "pass"), ("whole job, 3 epochs", job):
        command = [sys.executable, "-c", code.format(str(ROOT), work)]
        print(name, subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def quality(data_dir, out_dir, targets=(105, 100, 98), most=60):
    """Both train until they reach each target, or for `most` epochs; evaluating the listing is not its time."""
    listing, loss, spent = Listing(data_dir), float("inf"), 0.0
    took = ours(data_dir, out_dir, 0, 12)
    history = cvae_mnist.load_checkpoint(out_dir)[0]["history"]["test_loss"]
    reached = {}
    for epoch in range(1, most + 1):
        spent += seconds(listing.epoch)
        loss = min(loss, listing.test_loss())
        for target in targets:
            if loss <= target and target not in reached:
                reached[target] = spent, epoch
        if len(reached) == len(targets):
            break
    print("| test loss | listing | cvae_mnist.py | ratio |\n|---|---|---|---|")
    for target in targets:
        epochs = next((number for number, value in enumerate(history, 1) if value <= target), None)
        if target not in reached or epochs is None:
            print(f"| {target} | not reached | | |")
            continue
        theirs, mine = reached[target], sum(took[:epochs])
        print(f"| {target} | {theirs[0]:.0f} s, {theirs[1]} epochs | {mine:.0f} s, {epochs} epochs | "
              f"{theirs[0] / mine:.1f} |")


def train_reader(images, labels):
    """A small CNN that reads digits."""
    torch.manual_seed(0)
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
    return reader.eval()


@torch.no_grad()
def share_read(reader, images, labels):
    """Percentage of images [N, 1, 28, 28] that the reader assigns to their labels."""
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return 100 * sum((reader(x).argmax(1) == y).sum().item() for x, y in parts) / len(images)


def recipe(data_dir, out_dir, seeds=(0, 1, 2), stages=(10, 30, 100)):
    _, training, (test_images, test_labels) = cvae_mnist.load_digits(data_dir)
    reader = train_reader(*training)
    read = share_read(reader, test_images.view(-1, 1, 28, 28) / 255, test_labels)
    print(f"The CNN reads {read:.2f} % of the test digits")
    print("| seed | epochs | test loss | without averaging | label accuracy |\n|---|---|---|---|---|")
    labels = torch.arange(10_000) % 10
    for seed in seeds:
        for stage, epochs in enumerate(stages):
            with contextlib.redirect_stdout(io.StringIO()):
                model = cvae_mnist.train_cvae(epochs, data_dir=data_dir, out_dir=f"{out_dir}/{seed}", seed=seed,
                                              resume=stage > 0, device="cpu")  # fmt: skip
            checkpoint, last = cvae_mnist.load_checkpoint(f"{out_dir}/{seed}")
            last.load_state_dict(checkpoint["training_state_dict"])
            z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(seed))
            accuracy = share_read(reader, generate(model, z, labels), labels)
            losses = checkpoint["history"]["test_loss"][-1], sum(evaluate(last, test_images, test_labels))
            print(f"| {seed} | {epochs} | {losses[0]:.2f} | {losses[1]:.2f} | {accuracy:.1f} % |", flush=True)


KNOWN = {  # name: (sizes of the model, {epoch: training loss as published})
    "plain VAE, h_dim 400, z_dim 20": (
        dict(h_dim=400, z_dim=20, num_classes=0),
        {1: "163.2", 2: "120.6", 3: "114.2", 4: "111.3", 5: "109.7", 10: "106.3 (81.0 + 25.3)"},
    ),
    "CVAE, h_dim 600, z_dim 50": ({}, {1: "159.5"}),
}


def known(data_dir, out_dir):
    print("| model | epoch | published training loss | here | its terms |\n|---|---|---|---|---|")
    for name, (sizes, losses) in KNOWN.items():
        textbook = Textbook(data_dir, **sizes)
        for epoch in range(1, max(losses) + 1):
            reconstruction, kl = textbook.epoch()
            if epoch in losses:
                here = f"{reconstruction + kl:.1f} | {reconstruction:.1f} + {kl:.1f}"
                print(f"| {name} | {epoch} | {losses[epoch]} | {here} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality", "recipe", "known"])
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_ROOT", "./mnist"))
    options = parser.parse_args()
    data_dir = os.path.abspath(options.data_dir)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as out_dir:
        {"speed": speed, "quality": quality, "recipe": recipe, "known": known}[options.what](data_dir, out_dir)
