"""How fast and how good is cvae_mnist.py? Prints tables, asserts nothing. Needs the real MNIST.

    python tests/benchmark.py speed   seconds per epoch beside the listing, in turns; memory
    python tests/benchmark.py recipe  loss and label accuracy after 10, 30, 100 epochs, three seeds
    python tests/benchmark.py known   the textbook recipe's losses beside published ones

The textbook's recipe: Adam at 1e-3, batches of 128, PyTorch's initial weights, no averaging. The
listing is this recipe in the loop that tutorials show: a DataLoader that decodes every image,
cross-entropy on the sigmoid, .item() for every batch. Label accuracy is the share of 10,000
drawings that a small CNN assigns to the digit asked for. Everything runs on the CPU.
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
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
        _, (self.images, self.labels), _ = cvae_mnist.load_digits(data_dir)
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
    """Continues train_cvae, with all that it saves; returns the seconds of each epoch."""
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        cvae_mnist.train_cvae(done + epochs, data_dir=data_dir, out_dir=out_dir, resume=done > 0,
                              device="cpu")
    lines = [line for line in lines.getvalue().splitlines() if line.startswith("epoch ")]
    return [float(line.split("  ")[-2].removesuffix(" s")) for line in lines]


def speed(data_dir, out_dir, rounds=5):
    listing, times = Listing(data_dir), {"listing": [], "cvae_mnist.py": [], "no bfloat16": []}
    for number in range(rounds + 1):  # the first round warms up, as the first epoch of four
        times["listing"].append(seconds(listing.epoch))
        times["cvae_mnist.py"].append(statistics.mean(ours(data_dir, out_dir, 4 * number, 4)[1:]))
        with mock.patch.object(torch.cpu, "get_capabilities", dict):
            plain = ours(data_dir, f"{out_dir}/plain", 4 * number, 4)
        times["no bfloat16"].append(statistics.mean(plain[1:]))
        print(f"round {number}:", *(f"{column[-1]:.2f}" for column in times.values()), flush=True)
    print("| seconds per epoch | median (min to max) | ratio, median |\n|---|---|---|")
    for name, column in times.items():
        ratios = [a / b for a, b in zip(column, times["cvae_mnist.py"], strict=True)]
        print(f"| {name} | {statistics.median(column[1:]):.2f} ({min(column[1:]):.2f} to "
              f"{max(column[1:]):.2f}) | {statistics.median(ratios[1:]):.2f} |")
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")


def train_reader(images, labels):
    """A small CNN that reads digits."""
    torch.manual_seed(0)
    reader = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10))
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
    _, training, test_set = cvae_mnist.load_digits(data_dir)
    reader, labels = train_reader(*training), torch.arange(10_000) % 10
    read = share_read(reader, test_set[0].view(-1, 1, 28, 28) / 255, test_set[1])
    print(f"The CNN reads {read:.2f} % of the test digits")
    print("| seed | epochs | test loss | not averaged | label accuracy |\n|---|---|---|---|---|")
    for seed in seeds:
        for stage, epochs in enumerate(stages):
            with contextlib.redirect_stdout(io.StringIO()):
                folder = f"{out_dir}/{seed}"
                model = cvae_mnist.train_cvae(epochs, data_dir=data_dir, out_dir=folder, seed=seed,
                                              resume=stage > 0, device="cpu")
            report(reader, labels, test_set, seed, model, folder)


def report(reader, labels, test_set, seed, model, out_dir):
    checkpoint, last = cvae_mnist.load_checkpoint(out_dir)
    last.load_state_dict(checkpoint["training_state_dict"])
    z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(seed))
    accuracy = share_read(reader, generate(model, z, labels), labels)
    print(f"| {seed} | {checkpoint['epoch']} | {checkpoint['history']['test_loss'][-1]:.2f} | "
          f"{sum(evaluate(last, *test_set)):.2f} | {accuracy:.1f} % |", flush=True)


# Logs of the vae of pytorch/examples: a = allenlu2009.github.io, _posts/2021-09-29-VAE_coding.md;
# b = pull request 1416 of pytorch/examples; c = kampta/pytorch-distributions, README.md
KNOWN = {1: "164.4 (a)", 7: "107.6 (b)", 10: "106.1 (a), 106.3 (c)"}


def known(data_dir, out_dir):
    textbook = Textbook(data_dir, h_dim=400, z_dim=20, num_classes=0)
    print("| epoch | published training loss | here | its terms |\n|---|---|---|---|")
    for epoch in range(1, max(KNOWN) + 1):
        reconstruction, kl = textbook.epoch()
        here = f"{reconstruction + kl:.1f} | {reconstruction:.1f} + {kl:.1f}"
        print(f"| {epoch} | {KNOWN.get(epoch, '')} | {here} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "recipe", "known"])
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_ROOT", "./mnist"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as out_dir:
        globals()[options.what](options.data_dir, out_dir)
