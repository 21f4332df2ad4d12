"""How fast and how good is cvae_mnist.py? Prints tables. Needs MNIST in $MNIST_ROOT or ./mnist.

    python tests/benchmark.py speed     seconds per epoch beside the listing, in turns
    python tests/benchmark.py recipe    test loss and label accuracy after 10, 30, 100 epochs
    python tests/benchmark.py known     the textbook recipe's losses, to compare with published ones
    python tests/benchmark.py change    README's table and picture of eight models

Label accuracy is the share of 10,000 drawings that a small CNN takes for the digit asked for.
Everything runs on the CPU.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).resolve().parent.parent / "cvae_mnist.py"
sys.path.insert(0, str(SCRIPT.parent))
import cvae_mnist  # noqa: E402, I001, before torch: it sets how PyTorch's threads wait
from cvae_mnist import CVAE, evaluate, generate, load_images, negative_elbo  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import nn  # noqa: E402
from torchvision import datasets, transforms, utils  # noqa: E402

DATA = os.environ.get("MNIST_ROOT", "./mnist")


def train(epochs, out_dir, script=cvae_mnist, **options):
    """train_cvae in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.train_cvae(epochs, out_dir=out_dir, device="cpu", data_dir=DATA, **options)


def row(*values):
    print(*(f"{each:.2f}" if isinstance(each, float) else each for each in values), sep=" | ")


def textbook(**sizes):
    """Adam at 1e-3 and PyTorch's initial weights, for our model."""
    torch.manual_seed(0)
    model = CVAE(784, **sizes)
    for layer in model.children():
        layer.reset_parameters()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def speed(out_dir):
    """The listing: the textbook's recipe in the loop that tutorials show."""
    data = datasets.MNIST(DATA, train=True, transform=transforms.ToTensor())
    batches = torch.utils.data.DataLoader(data, 128, shuffle=True)
    model, optimizer = textbook()
    rounds = []
    row("seconds per epoch", "listing", "cvae_mnist.py", "without bfloat16", "ratios")
    for number in range(6):  # the first round warms up
        start = time.perf_counter()
        for x, labels in batches:
            recon, mu, log_var = model(x, F.one_hot(labels, 10).float())
            reconstruction = F.binary_cross_entropy(recon, x.flatten(1), reduction="sum")
            loss = reconstruction - 0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
            optimizer.zero_grad()
            loss.backward()
            loss.item()
            optimizer.step()
        seconds = [time.perf_counter() - start]
        for bfloat16 in cvae_mnist.BFLOAT16, False:
            with mock.patch.object(cvae_mnist, "BFLOAT16", bfloat16):
                times = []  # of one epoch, then of four more; the difference is that of three
                for epochs in 1, 5:
                    start = time.perf_counter()
                    train(epochs, f"{out_dir}/{number}{bfloat16}", resume=epochs > 1)
                    times.append(time.perf_counter() - start)
            seconds.append((times[1] - times[0]) / 3)
        rounds.append([*seconds, seconds[0] / seconds[1], seconds[0] / seconds[2]])
        row(f"round {number}", *rounds[-1])
    row("median", *torch.tensor(rounds[1:]).median(dim=0).values.tolist())


@torch.no_grad()
def share_read(reader, images, labels):
    """Percentage of images, in [0, 1], that the reader assigns to their labels."""
    answers = [reader(part).argmax(dim=1) for part in images.view(-1, 1, 28, 28).split(1000)]
    return 100 * (torch.cat(answers) == labels).float().mean().item()


def train_reader():
    """Returns a small CNN that reads digits, and the test set; prints how well it does."""
    _, (images, labels), (test_images, answers) = load_images(DATA)
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
    read = share_read(reader.eval(), test_images / 255, answers)
    print(f"A CNN reads {read:.1f} % of the test digits")
    return reader, (test_images, answers)


def label_accuracy(reader, model):
    labels = torch.arange(10_000) % 10
    z = torch.randn(10_000, model.z_dim, generator=torch.Generator().manual_seed(0))
    return share_read(reader, generate(model, z, labels), labels)


def recipe(out_dir):
    reader, test_set = train_reader()
    row("seed", "epochs", "test loss", "not averaged", "label accuracy, %")
    for seed in range(3):
        for epochs in 10, 30, 100:
            model = train(epochs, f"{out_dir}/{seed}", seed=seed, resume=epochs > 10)
            checkpoint, last = cvae_mnist.load_checkpoint(f"{out_dir}/{seed}")
            last.load_state_dict(checkpoint["training_state_dict"])
            test_loss, raw = checkpoint["history"]["test_loss"][-1], sum(evaluate(last, *test_set))
            row(seed, epochs, test_loss, raw, label_accuracy(reader, model))


def known(out_dir):
    _, (images, labels), _ = load_images(DATA)
    model, optimizer = textbook(h_dim=400, z_dim=20, num_classes=0)
    row("epoch", "training loss", "reconstruction", "KL")
    for epoch in range(1, 11):
        sums = torch.zeros(2)
        for batch in torch.randperm(len(images)).split(128):
            terms = negative_elbo(model, images[batch] / 255, model.one_hot(labels[batch]))
            sums += torch.stack(terms).sum(dim=1).detach()
            optimizer.zero_grad()
            sum(terms).sum().backward()
            optimizer.step()
        row(epoch, *((sums.sum() / len(images)).item(), *(sums / len(images)).tolist()))


LOSS = "(reconstruction + kl).mean()"
CROSS_ENTROPY = 'F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none")'
CHANGES = [  # options of train_cvae; what to replace in the script by what
    ({}, "", ""),
    ({"z_dim": 2}, "", ""),
    ({"num_classes": 0}, "", ""),
    ({}, "[x.flatten(1), c]", "[x.flatten(1), 0 * c]"),
    ({}, CROSS_ENTROPY, "(torch.sigmoid(logits.float()) - x.flatten(1)) ** 2 / (2 * 0.2)"),
    ({}, LOSS, "reconstruction.mean()"),
    ({}, LOSS, "(reconstruction + 10 * kl).mean()"),
    ({}, LOSS, "(reconstruction / 784 + kl).mean()"),
]


def change(out_dir):
    """Ten epochs each: as it is, and one change. Saves change.png, a row of digits for each."""
    (reader, test_set), drawings = train_reader(), []
    row("row", "options", "in place of", "stands", "reconstruction", "KL", "label accuracy, %")
    for number, (options, old, new) in enumerate(CHANGES, start=1):
        source = SCRIPT.read_text(encoding="utf-8")
        assert old in source
        script = types.ModuleType("changed")
        exec(compile(source.replace(old, new) if old else source, "changed", "exec"), vars(script))
        model = train(10, f"{out_dir}/{number}", script, **options)
        terms = script.evaluate(model, *test_set)
        row(number, options, old, new, *terms, label_accuracy(reader, model))
        z = torch.randn(10, model.z_dim, generator=torch.Generator().manual_seed(2))
        drawings.append(generate(model, z, range(10)))
    figure = Figure((5.9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(utils.make_grid(torch.cat(drawings), nrow=10, padding=0)[0], cmap="gray_r")
    middles, numbers = range(14, 28 * len(CHANGES), 28), range(1, len(CHANGES) + 1)
    axes.set(frame_on=False, xticks=[], yticks=middles, yticklabels=numbers)
    axes.tick_params(length=0)
    figure.savefig("change.png")


if __name__ == "__main__":
    command = {"speed": speed, "recipe": recipe, "known": known, "change": change}[sys.argv[1]]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as out_dir:
        command(out_dir)
