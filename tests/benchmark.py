"""How fast and how good is cvae_mnist.py? Prints tables, asserts nothing. Needs the real MNIST.

    python tests/benchmark.py speed     seconds per epoch beside the listing, in turns
    python tests/benchmark.py recipe    test loss and label accuracy after 10, 30, 100 epochs
    python tests/benchmark.py known     the textbook recipe's losses beside published ones
    python tests/benchmark.py built-in  label accuracy of the built-in digits after 10 epochs
    python tests/benchmark.py change    README's table and picture of what one change does

The textbook's recipe: Adam at 1e-3, batches of 128, PyTorch's initial weights, no averaging. The
listing is this recipe in the loop that tutorials show: a DataLoader that decodes every image,
cross-entropy on the sigmoid, .item() for every batch. Label accuracy is the share of 10,000
drawings that a small CNN assigns to the digit asked for. Everything runs on the CPU.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cvae_mnist  # noqa: E402, I001, before torch: it sets how PyTorch's threads wait
from cvae_mnist import CVAE, evaluate, generate, load_images, negative_elbo  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms, utils  # noqa: E402


class Textbook:
    """The textbook's recipe, with the script's own model and loss."""

    def __init__(self, data_dir, **sizes):
        _, (self.images, self.labels), _ = load_images(data_dir)
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


def train(epochs, out_dir, **options):
    """train_cvae in silence; returns the model and the median of the seconds between two saves."""
    times, save = [], cvae_mnist.save_checkpoint

    def saved(*arguments):
        save(*arguments)
        times.append(time.perf_counter())

    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, mock.patch.object(cvae_mnist, "save_checkpoint", saved):
        model = cvae_mnist.train_cvae(epochs, out_dir=out_dir, device="cpu", **options)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return model, statistics.median(gaps) if gaps else None


def speed(data_dir, out_dir, rounds=5):
    listing, rows = Listing(data_dir), {"listing": [], "cvae_mnist.py": [], "no bfloat16": []}
    for number in range(rounds + 1):  # the first round warms up
        start = time.perf_counter()
        listing.epoch()
        rows["listing"].append(time.perf_counter() - start)
        options = {"epochs": 4 * number + 4, "data_dir": data_dir, "resume": number > 0}
        rows["cvae_mnist.py"].append(train(out_dir=out_dir, **options)[1])
        with mock.patch.object(cvae_mnist, "BFLOAT16", False):
            rows["no bfloat16"].append(train(out_dir=f"{out_dir}/plain", **options)[1])
        print(f"round {number}:", *(f"{row[-1]:.2f}" for row in rows.values()), flush=True)
    print("| seconds per epoch | median (min to max) | ratio, median |\n|---|---|---|")
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(row, rows["cvae_mnist.py"], strict=True)]
        middle, ratio = statistics.median(row[1:]), statistics.median(ratios[1:])
        print(f"| {name} | {middle:.2f} ({min(row[1:]):.2f} to {max(row[1:]):.2f}) | {ratio:.2f} |")


def train_reader(images, labels):
    """A small CNN that reads digits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)]
    reader = nn.Sequential(*layers)
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


def label_accuracy(reader, model, seed=0):
    labels = torch.arange(10_000) % 10
    z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(seed))
    return share_read(reader, generate(model, z, labels), labels)


def recipe(data_dir, out_dir):
    _, training, test_set = load_images(data_dir)
    reader = train_reader(*training)
    read = share_read(reader, test_set[0].view(-1, 1, 28, 28) / 255, test_set[1])
    print(f"The CNN reads {read:.2f} % of the test digits")
    print("| seed | epochs | test loss | not averaged | label accuracy |\n|---|---|---|---|---|")
    for seed in range(3):
        for epochs in 10, 30, 100:
            folder, options = f"{out_dir}/{seed}", {"data_dir": data_dir, "seed": seed}
            model, _ = train(epochs, folder, resume=epochs > 10, **options)
            checkpoint, last = cvae_mnist.load_checkpoint(folder)
            last.load_state_dict(checkpoint["training_state_dict"])
            loss = f"{checkpoint['history']['test_loss'][-1]:.2f}"
            raw = f"{sum(evaluate(last, *test_set)):.2f}"
            accuracy = f"{label_accuracy(reader, model, seed):.1f} %"
            print(f"| {seed} | {epochs} | {loss} | {raw} | {accuracy} |", flush=True)


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


def built_in(data_dir, out_dir):
    reader = train_reader(*cvae_mnist.built_in_digits(60_000, seed=0))
    test_set = cvae_mnist.built_in_digits(10_000, seed=1)
    read = share_read(reader, test_set[0].view(-1, 1, 28, 28) / 255, test_set[1])
    model, _ = train(10, out_dir, dataset="built-in digits")
    accuracy = label_accuracy(reader, model)
    print(f"The CNN reads {read:.1f} % of the test digits, {accuracy:.1f} % of the drawings")


def change(data_dir, out_dir):
    """Ten epochs each: as it is, and one change. Saves change.png, a row of digits for each."""
    _, training, test_set = load_images(data_dir)
    reader, rows = train_reader(*training), []
    print("| change | reconstruction loss | KL | label accuracy |\n|---|---|---|---|")
    for first, second, z_dim in (1, 1, 50), (1, 1, 2), (1, 0, 50), (1, 10, 50), (1 / 784, 1, 50):

        def loss(model, x, c, first=first, second=second):
            reconstruction, kl = negative_elbo(model, x, c)
            return first * reconstruction, second * kl

        with mock.patch.object(cvae_mnist, "negative_elbo", loss):
            model, _ = train(10, f"{out_dir}/{len(rows)}", data_dir=data_dir, z_dim=z_dim)
        reconstruction, kl = evaluate(model, *test_set)
        name = f"{first:.4g} x reconstruction + {second} x KL, z_dim {z_dim}"
        accuracy = label_accuracy(reader, model)
        print(f"| {name} | {reconstruction:.1f} | {kl:.1f} | {accuracy:.1f} % |", flush=True)
        z = torch.randn(10, z_dim, generator=torch.Generator().manual_seed(2))
        rows.append(generate(model, z, range(10)))
    utils.save_image(1 - torch.cat(rows), "change.png", nrow=10, padding=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = {f.__name__.replace("_", "-"): f for f in (speed, recipe, known, built_in, change)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_ROOT", "./mnist"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as out_dir:
        commands[options.command](options.data_dir, out_dir)
