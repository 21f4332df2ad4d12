"""How fast and how good is cvae_mnist.py? Prints tables. Needs MNIST in $MNIST_ROOT or ./mnist.

    python tests/benchmark.py speed     seconds per epoch beside the listing, in turns
    python tests/benchmark.py recipe    test loss and label accuracy after 10, 30, 100 epochs
    python tests/benchmark.py known     the textbook recipe's losses beside published ones
    python tests/benchmark.py built-in  label accuracy of the built-in digits after 10 epochs
    python tests/benchmark.py change    README's table and picture of what one change does

Label accuracy is the share of 10,000 drawings that a small CNN assigns to the digit asked for.
Everything runs on the CPU.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cvae_mnist  # noqa: E402, I001, before torch: it sets how PyTorch's threads wait
from cvae_mnist import CVAE, evaluate, generate, load_images, negative_elbo  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torchvision import datasets, transforms, utils  # noqa: E402


class Textbook:
    """Adam at 1e-3, batches of 128, PyTorch's initial weights, no averaging; our model and loss."""

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


def train(epochs, out_dir, **options):
    """train_cvae in silence; returns the model and the mean seconds from one save to the next."""
    times, save = [], cvae_mnist.save_checkpoint

    def timed(*arguments):
        save(*arguments)
        times.append(time.perf_counter())

    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, mock.patch.object(cvae_mnist, "save_checkpoint", timed):
        model = cvae_mnist.train_cvae(epochs, out_dir=out_dir, device="cpu", **options)
    return model, (times[-1] - times[0]) / (len(times) - 1)


def row(*values):
    """Prints a row of a table."""
    print(*(f"{each:.2f}" if isinstance(each, float) else each for each in values), sep=" | ")


def speed(data_dir, out_dir):
    """The listing: the textbook's recipe in the loop that tutorials show."""
    data = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(data, 128, shuffle=True)
    textbook, rounds = Textbook(data_dir), []
    row("seconds per epoch", "listing", "cvae_mnist.py", "without bfloat16", "ratios")
    for number in range(6):  # the first round warms up
        start = time.perf_counter()
        for x, labels in batches:
            recon, mu, log_var = textbook.model(x, F.one_hot(labels, 10).float())
            reconstruction = F.binary_cross_entropy(recon, x.flatten(1), reduction="sum")
            loss = reconstruction - 0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
            textbook.optimizer.zero_grad()
            loss.backward()
            loss.item()
            textbook.optimizer.step()
        listing = time.perf_counter() - start
        options = {"epochs": 4 * number + 4, "data_dir": data_dir, "resume": number > 0}
        _, script = train(out_dir=out_dir, **options)
        with mock.patch.object(cvae_mnist, "BFLOAT16", False):
            _, plain = train(out_dir=f"{out_dir}/plain", **options)
        rounds.append([listing, script, plain, listing / script, plain / script])
        row(f"round {number}", *rounds[-1])
    row("median", *torch.tensor(rounds[1:]).median(dim=0).values.tolist())


@torch.no_grad()
def share_read(reader, images, labels):
    """Percentage of images, in [0, 1], that the reader assigns to their labels."""
    answers = [reader(part).argmax(dim=1) for part in images.view(-1, 1, 28, 28).split(1000)]
    return 100 * (torch.cat(answers) == labels).float().mean().item()


def train_reader(data_dir, dataset="MNIST"):
    """Returns a small CNN that reads digits, and the test set; prints how well it does."""
    _, (images, labels), test_set = load_images(data_dir, dataset)
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
    images, labels = test_set
    print(f"A CNN reads {share_read(reader.eval(), images / 255, labels):.1f} % of the test digits")
    return reader, test_set


def label_accuracy(reader, model, seed=0):
    labels = torch.arange(10_000) % 10
    z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(seed))
    return share_read(reader, generate(model, z, labels), labels)


def recipe(data_dir, out_dir):
    reader, test_set = train_reader(data_dir)
    row("seed", "epochs", "test loss", "not averaged", "label accuracy, %")
    for seed in range(3):
        for epochs in 10, 30, 100:
            folder = f"{out_dir}/{seed}"
            model, _ = train(epochs, folder, data_dir=data_dir, seed=seed, resume=epochs > 10)
            checkpoint, last = cvae_mnist.load_checkpoint(folder)
            last.load_state_dict(checkpoint["training_state_dict"])
            test_loss, raw = checkpoint["history"]["test_loss"][-1], sum(evaluate(last, *test_set))
            row(seed, epochs, test_loss, raw, label_accuracy(reader, model, seed))


def known(data_dir, out_dir):
    published = {1: "164.4", 7: "107.6", 10: "106.1, 106.3"}  # README.md says where
    textbook = Textbook(data_dir, h_dim=400, z_dim=20, num_classes=0)
    row("epoch", "published training loss", "here", "reconstruction", "KL")
    for epoch in range(1, 11):
        reconstruction, kl = textbook.epoch()
        row(epoch, published.get(epoch, ""), reconstruction + kl, reconstruction, kl)


def built_in(data_dir, out_dir):
    reader, _ = train_reader(data_dir, "built-in digits")
    model, _ = train(10, out_dir, dataset="built-in digits")
    print(f"and {label_accuracy(reader, model):.1f} % of the drawings")


def change(data_dir, out_dir):
    """Ten epochs each: as it is, and one change. Saves change.png, a row of digits for each."""
    (reader, test_set), drawings = train_reader(data_dir), []
    row("times reconstruction", "times KL", "z_dim", "reconstruction", "KL", "label accuracy, %")
    for first, second, z_dim in (1, 1, 50), (1, 1, 2), (1, 0, 50), (1, 10, 50), (1 / 784, 1, 50):

        def loss(model, x, c, factors=(first, second)):
            terms = negative_elbo(model, x, c)
            return [factor * term for factor, term in zip(factors, terms, strict=True)]

        with mock.patch.object(cvae_mnist, "negative_elbo", loss):
            model, _ = train(10, f"{out_dir}/{len(drawings)}", data_dir=data_dir, z_dim=z_dim)
        terms = evaluate(model, *test_set)
        row(f"{first:.4g}", second, z_dim, *terms, label_accuracy(reader, model))
        z = torch.randn(10, z_dim, generator=torch.Generator().manual_seed(2))
        drawings.append(generate(model, z, range(10)))
    utils.save_image(1 - torch.cat(drawings), "change.png", nrow=10, padding=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = {f.__name__.replace("_", "-"): f for f in (speed, recipe, known, built_in, change)}
    parser.add_argument("command", choices=commands)
    command = commands[parser.parse_args().command]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as out_dir:
        command(os.environ.get("MNIST_ROOT", "./mnist"), out_dir)
