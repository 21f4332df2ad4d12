# %% [markdown]
# # Handwritten digits with a conditional VAE
#
# A variational autoencoder (VAE) learns to squeeze an image into a few numbers and to draw it again from them.
# A *conditional* VAE (CVAE) is also told which digit it is looking at. So it need not store that, and once trained
# it draws the digit you ask for, each time in another hand.
#
# Run the cells in order. The last one trains the model and draws with it, in minutes on a laptop without a GPU. The
# same file is a script: `python cvae_mnist.py --help`. To learn, read the model, the loss, `train_epoch` and
# `inference_cvae`, some hundred lines; the rest is there so that these can be trusted.

# %%
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "matplotlib>=3.10.8"]
# ///
import argparse
import contextlib
import copy
import inspect
import io
import math
import os
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

# %% [markdown]
# ## The digits
#
# MNIST is 60,000 small grey images of handwritten digits to learn from and 10,000 to test on, 28 x 28 pixels each.
# All of it fits on any device, so that is where it goes, whole; a `DataLoader`, which fetches images one by one,
# would take longer than the learning.
#
# No network? Then we make our own data set from the fonts that ship inside matplotlib: every digit is turned,
# slanted, stretched, shifted and bent at random.

# %%
MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
BUILT_IN = "built-in digits"
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSansMono "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10"
)


def built_in_digits(count, seed):
    """Draws digits shaped like MNIST's: images uint8 [count, 28, 28], labels int64 [count]."""
    glyphs = []
    for name in FONTS.split():
        font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), 36)
        for digit in "0123456789":
            canvas = Image.new("L", (40, 40))
            left, top, right, bottom = font.getbbox(digit)
            ImageDraw.Draw(canvas).text((20 - (left + right) / 2, 20 - (top + bottom) / 2), digit, 255, font)
            glyphs.append(pil_to_tensor(canvas) / 255)
    glyphs = torch.stack(glyphs)

    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(glyphs), [count], generator=generator)
    # A random 2 x 2 matrix turns, slants and stretches in one; the third column shifts.
    mean = torch.tensor([[0.95, 0.12, 0], [0, 0.85, 0]])
    spread = torch.tensor([[0.13, 0.2, 0.06], [0.12, 0.08, 0.06]])
    images = []
    for part in choice.split(2000):
        affine = mean + spread * torch.randn(len(part), 2, 3, generator=generator)
        bend = F.interpolate(0.07 * torch.randn(len(part), 2, 4, 4, generator=generator), size=28, mode="bicubic")
        where = F.affine_grid(affine, [len(part), 1, 28, 28], align_corners=False) + bend.permute(0, 2, 3, 1)
        drawn = F.grid_sample(glyphs[part], where, align_corners=False).squeeze(1)
        images.append((400 * drawn).clamp(max=255).to(torch.uint8))
    return torch.cat(images), choice % 10


def load_digits(data_dir):
    """Loads MNIST from data_dir, downloading it first if need be; where that fails, makes the built-in digits.

    Returns the data set's name, then (images uint8 [N, 28, 28], labels int64 [N]) to train on and to test on.
    Raises RuntimeError if the files are there but damaged.
    """
    data_dir, timeout = Path(data_dir).expanduser(), socket.getdefaulttimeout()
    raw = data_dir / "MNIST" / "raw"
    try:
        socket.setdefaulttimeout(5)  # seconds; without it, torchvision waits for a dead network forever
        # In a log file the download's progress bar would be a mess of carriage returns.
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            sets = [datasets.MNIST(data_dir, train, download=True) for train in (True, False)]
        for part in sets:
            if part.data.shape != (len(part.targets), 28, 28) or not set(part.targets.tolist()) <= set(range(10)):
                raise ValueError("images and labels do not fit together")
        return "MNIST", *[(part.data, part.targets) for part in sets]
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if all((raw / name).is_file() for name in MNIST_FILES):
            raise RuntimeError(f"MNIST in {raw} is damaged ({reason}). Delete that folder and run again") from error
        print(f"MNIST is not in {raw} and could not be downloaded: {reason}")
        print(f"To use MNIST, put these four files there, as they are or as .gz: {', '.join(MNIST_FILES)}")
        print(f"Going on with {BUILT_IN} instead", flush=True)
        return BUILT_IN, built_in_digits(60_000, seed=0), built_in_digits(10_000, seed=1)
    finally:
        socket.setdefaulttimeout(timeout)


# %% [markdown]
# ## The model
#
# The encoder looks at an image `x` and its label `c` and answers with a normal distribution over the code `z`: a
# mean and a (log) variance for each of its 50 numbers. The decoder turns a `z` and a label into an image. Because it
# is handed the label, `z` is free to hold all the rest: slant, width, loops, what we call the style.
#
# Sampling `z` directly would stop the gradient. The *reparameterization trick* lets it through: sample noise that
# depends on nothing, then scale and shift it by what the encoder said.


# %%
class CVAE(nn.Module):
    """A conditional VAE of two MLPs. With num_classes=0 there is nothing to condition on: the plain VAE.

    VAE: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014. Conditioning: Kingma et al., Semi-supervised
    Learning with Deep Generative Models, NIPS 2014; Sohn et al., Learning Structured Output Representation using Deep
    Conditional Generative Models, NIPS 2015.
    """

    def __init__(self, input_dim=784, h_dim=600, z_dim=50, num_classes=10):
        super().__init__()
        self.z_dim, self.num_classes = z_dim, num_classes
        self.fc1 = nn.Linear(input_dim + num_classes, h_dim)
        self.fc2 = nn.Linear(h_dim, z_dim)  # mu
        self.fc3 = nn.Linear(h_dim, z_dim)  # log_var
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)
        self.fc5 = nn.Linear(h_dim, input_dim)

    def encode(self, x, c):
        """x [B, 784] or [B, 1, 28, 28] in [0, 1], c [B, num_classes] one-hot -> mu, log_var, each [B, z_dim]."""
        h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))
        return self.fc2(h), self.fc3(h)

    def reparameterize(self, mu, log_var):
        """Samples z [B, z_dim] from N(mu, exp(log_var)), differentiable in both."""
        return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)

    def decode_logits(self, z, c):
        """What decode returns, before its sigmoid."""
        return self.fc5(F.relu(self.fc4(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """z [B, z_dim], c [B, num_classes] one-hot -> images [B, 784] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z, c))

    def forward(self, x, c):
        mu, log_var = self.encode(x, c)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var


# %% [markdown]
# ## The loss
#
# The model should give the training images a high probability. That probability cannot be computed, but a lower
# bound on its logarithm can, the ELBO (evidence lower bound). Its negative is our loss. With q for the encoder, p for
# the decoder and E for the mean over sampled `z`, it has two parts:
#
# $$-\mathrm{ELBO} = \mathbb{E}_{q(z|x,c)}\left[-\log p(x|z,c)\right]
#   + \mathrm{KL}\left(q(z|x,c)\,\|\,\mathcal{N}(0, I)\right)$$
#
# The first, the *reconstruction*, asks that the image can be drawn again from its code. The second, the KL divergence,
# asks that codes look like plain normal noise, so that afterwards plain normal noise can be decoded into new digits.
# Both are in *nats*, the unit of information that goes with the natural logarithm. A grey pixel counts as the
# probability of ink, so even a perfect copy costs something.


# %%
def negative_elbo(model, x, c):
    """The two parts of the loss, each summed over the batch, in nats: reconstruction and KL divergence.

    Reconstruction is the binary cross-entropy over the 784 pixels, taken from the logits: the same number as from the
    sigmoid, but faster, and finite however sure the decoder is. KL, in closed form for two normals:
    Kingma and Welling 2014, appendix B.
    """
    mu, log_var = [part.to(x.dtype) for part in model.encode(x, c)]  # float32, even under half_products
    logits = model.decode_logits(model.reparameterize(mu, log_var), c)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
    return reconstruction, kl


# %% [markdown]
# ## Helpers
#
# Skip this cell at first reading. `check` meets bad arguments at the door, `write_whole` never leaves half a file
# behind, and `load_checkpoint` reads tensors and plain values only: a stranger's file runs no code.


# %%
CHECKPOINT = "cvae_checkpoint.pth"


def is_whole(value, low=0, high=math.inf):
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1e6


def is_finite(model):
    return all(weight.isfinite().all() for weight in model.parameters())


def is_folder(value):
    """Whether value is the path of a folder, or of one that can be made: nothing on the way is a file."""
    try:
        path = Path(value).expanduser()
        return next(folder for folder in (path, *path.parents) if folder.exists()).is_dir()
    except (TypeError, ValueError, OSError, RuntimeError):
        return False


RULES = {
    "epochs batch_size h_dim z_dim": ("a whole number from 1 to 1000000", lambda value: is_whole(value, 1, 10**6)),
    "learning_rate": ("a number above 0, at most 1e6", lambda value: is_number(value) and value > 0),
    "num_classes": ("10, or 0 for the plain VAE", lambda value: is_whole(value) and value in (0, 10)),
    "seed": ("a whole number from 0 to 4294967295", lambda value: is_whole(value, 0, 2**32 - 1)),
    "resume textbook flag": ("True or False", lambda value: isinstance(value, bool)),
    "input digit": ("a whole number from 0 to 9", lambda value: is_whole(value, 0, 9)),
    "temperature": ("a number from 0 to 1e6", is_number),
    "indices": (
        "a list of 1 to 100 whole numbers from 0 up",
        lambda value: isinstance(value, list | tuple | range) and 1 <= len(value) <= 100 and all(map(is_whole, value)),
    ),
    "data_dir out_dir": ("the path of a folder, or of one to make", is_folder),
}


def check(**arguments):
    """Raises ValueError for the first argument that breaks its rule."""
    for name, value in arguments.items():
        expected, fits = next(rule for names, rule in RULES.items() if name in names.split())
        if not fits(value):
            raise ValueError(f"{name}={value!r} will not do: expected {expected}")


def pick_device(device):
    """The device asked for, if it works; with None the accelerator that PyTorch sees (CUDA, MPS, ...), else the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        raise ValueError(f"device={device!r} will not do: PyTorch cannot use it here. Try 'cpu' or None") from error
    return torch.device(device)


def make_folder(path):
    """Makes the folder if need be, and makes sure that files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"out_dir will not do: {str(path)!r} cannot be written ({error.strerror})") from error


def write_whole(path, save):
    """Writes what save(file) writes, in one atomic step: whenever the process dies, path is all old or all new."""
    content, unfinished = io.BytesIO(), path.with_name(path.name + ".unfinished")
    save(content)
    try:
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise RuntimeError(f"{path} could not be written ({error.strerror}); what it held before is safe") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def load_checkpoint(out_dir):
    """Reads a checkpoint's dict and, on the CPU, its CVAE, whose sizes it reads off the weights.

    Raises FileNotFoundError where there is none and ValueError where it is damaged or of something else.
    """
    path = Path(out_dir).expanduser() / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Train first: train_cvae() or `python cvae_mnist.py train`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["model_state_dict"]
        (z_dim, h_dim), num_classes = weights["fc2.weight"].shape, weights["fc1.weight"].shape[1] - 784
        with torch.random.fork_rng(devices=[]):  # the random weights it starts with are no business of the caller's
            model = CVAE(784, h_dim, z_dim, num_classes)
        model.load_state_dict(weights)
        check(num_classes=num_classes)
        if not is_finite(model):
            raise ValueError("NaN")
    except Exception as error:  # `from None`: torch.load's own words say how to load unsafe files
        raise ValueError(
            f"{path} is damaged, or no CVAE for MNIST ({type(error).__name__}). Move it away and train again"
        ) from None
    return checkpoint, model


# %% [markdown]
# ## Pictures
#
# Every picture is saved first. Then a notebook shows it; a script opens its windows when all is done.


# %%
def save_figure(figure, path):
    write_whole(path, partial(figure.savefig, dpi=100))
    if "ipykernel" in sys.modules:
        from IPython import display

        display.display(display.Image(filename=str(path)))


def save_grid(images, path, columns, title, captions=(), boxed=()):
    """Saves images [N, 1, 28, 28] in rows of `columns`, captions above the first of them, red boxes around some."""
    gap = 12 if len(captions) > columns else 3  # captions further down need room between the rows
    grid = make_grid(images, nrow=columns, padding=gap)[0].numpy()
    height, width = grid.shape
    margin = max(0, 200 - width) / 2  # the title needs room, too
    figure = Figure(figsize=(3 * (width + 2 * margin) / 100, 3 * (height + 22) / 100))  # 3 x 3 for each pixel
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-margin, width + margin), ylim=(height, -22))
    axes.axis("off")
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.text(width / 2, -16, title, ha="center", va="center", fontsize=13)
    for cell in range(len(images)):
        left, top = gap + cell % columns * (28 + gap), gap + cell // columns * (28 + gap)
        if cell < len(captions):
            axes.text(left + 14, top - 2, captions[cell], ha="center", va="bottom", fontsize=13)
        if cell in boxed:
            axes.add_patch(Rectangle((left - 1, top - 1), 30, 30, fill=False, edgecolor="tab:red", linewidth=2))
    save_figure(figure, path)


def save_loss_figure(history, path, title):
    epochs = range(1, len(history["train_loss"]) + 1)
    figure = Figure(figsize=(6, 7), layout="constrained")
    figure.suptitle(title)
    total, reconstruction, kl = figure.subplots(3, sharex=True, height_ratios=(3, 1.2, 1.2))
    total.fill_between(epochs, history["train_loss_after"], history["test_loss"], color="tab:orange", alpha=0.3)
    for axes, key, color, label in [
        (total, "train_loss", "tab:gray", "training images, during the epoch"),
        (total, "train_loss_after", "tab:blue", "training images, after it"),  # as many as there are test images
        (total, "test_loss", "tab:orange", "test images, after it"),
        (reconstruction, "reconstruction", "tab:green", "reconstruction, during the epoch"),
        (kl, "kl", "tab:red", "KL divergence, during the epoch"),
    ]:
        marker = "." if len(epochs) < 30 else ""
        axes.plot(epochs, history[key], color=color, marker=marker, label=f"{label}: {history[key][-1]:.2f}")
        # Along a logarithmic axis the first epochs, where the loss falls most, have room of their own.
        axes.set(xscale="log", xlim=(0.95, 1.05 * max(len(epochs), 2)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3)
        axes.legend()
    reconstruction.set_ylabel("nats per image")
    kl.set_xlabel("epoch")
    kl.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    kl.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    kl.xaxis.set_minor_formatter(NullFormatter())
    save_figure(figure, path)


def open_windows(paths):
    """Opens saved pictures in windows, all at once, where there is a screen; returns when they are closed."""
    from matplotlib import pyplot as plt

    for path in paths:
        figure = plt.figure(path.name)
        if figure.canvas.required_interactive_framework is None:  # no screen
            return plt.close(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.imshow(plt.imread(path))
    plt.show()


def describe(model, dataset, epochs):
    return f"{'CVAE' if model.num_classes else 'VAE'} on {dataset}, epoch {epochs}"


# %% [markdown]
# ## Training
#
# Adam takes a step per batch. Its steps never quite settle; they wander around a good place, and the average of where
# they have been lately is closer to it than they are. So `average` follows `model`: the k-th time it goes 10/(10+k) of
# the way to it, which makes it remember mostly the last tenth of the run. It is what we test, save and return. It needs
# no plan for how long the run will be, so a run can end, or go on, at any epoch.
#
# No epoch is faster than its matrix products. All the rest is cut down by doing less: images stay on the device, the
# loss is read fifty times an epoch and not at every step, and a fused Adam goes over memory once, not several times.
#
# Look at `cvae_results/epoch_10.png`, `epoch_20.png` and so on: each row keeps its `z`, so you see the same ten styles
# grow clear. Then look at `CVAE_loss.png`. Reconstruction falls fast; KL rises at first, as the model finds that
# saying more is worth its price. The shaded gap is overfitting: what is learned by heart and does not help with others.


# %%
def half_products(device):
    """A context in which matrix products round what they multiply to bfloat16, on a CPU with instructions for that.

    There they take half the time, and the loss of a trained model changes by less than a ten-thousandth. Weights,
    their gradients and Adam's state stay float32. An older PyTorch does not tell what the CPU can: no, then.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=able and device.type == "cpu")


@torch.no_grad()
def average_loss(model, images, labels, one_hot):
    """The negative ELBO of images (uint8 [N, 784]), in nats per image."""
    batches = zip(images.split(1000), labels.split(1000), strict=True)
    with half_products(images.device):
        return sum(sum(negative_elbo(model, x / 255, one_hot[label])) for x, label in batches).item() / len(images)


@torch.no_grad()
def draw(model, z, c):
    """Decodes z [N, z_dim] and c [N, num_classes] on the model's device -> images [N, 1, 28, 28] on the CPU."""
    device = model.fc4.weight.device
    return model.decode(z.to(device), c.to(device)).view(-1, 1, 28, 28).cpu()


def save_samples(model, path, title):
    """A column per digit, a row per style; of the plain VAE, a hundred digits of its own choice."""
    columns = max(model.num_classes, 1)
    z = torch.randn(100 // columns, model.z_dim, generator=torch.Generator().manual_seed(0))
    images = draw(model, z.repeat_interleave(columns, 0), torch.eye(10, model.num_classes).repeat(10, 1))
    save_grid(images, path, 10, title, captions=range(model.num_classes))


def restore(path, hyperparameters, model, average, optimizer, history):
    """Puts a checkpoint back into model, average, optimizer and history; returns the name of its data set."""
    checkpoint, _ = load_checkpoint(path.parent)
    before = checkpoint.get("hyperparameters")
    if not isinstance(before, dict):
        raise ValueError(f"{path} holds no training state: it can be drawn from, but not resumed")
    other = {key: value for key, value in hyperparameters.items() if before.get(key) != value}
    if other:
        other = ", ".join(f"{key}={before.get(key)!r}, not {value!r}" for key, value in other.items())
        raise ValueError(f"{path} was trained with {other}. Ask for the same, or train anew without resume")
    try:
        average.load_state_dict(checkpoint["model_state_dict"])
        model.load_state_dict(checkpoint["training_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        moments = [(w, optimizer.state[w][name]) for w in model.parameters() for name in ("exp_avg", "exp_avg_sq")]
        fits = is_finite(model) and all(w.shape == moment.shape and moment.isfinite().all() for w, moment in moments)
        for key, losses in history.items():
            losses.extend(checkpoint["history"][key])
            fits = fits and len(losses) == checkpoint["epoch"] and math.isfinite(sum(losses))
        if not fits:
            raise ValueError("it does not fit together")
        return checkpoint["dataset"]
    except Exception as error:
        raise ValueError(f"{path} is damaged: its training state does not fit. Move it away and train again") from error


def train_epoch(model, average, optimizer, x, labels, one_hot, batch_size, epoch):
    """One pass over the images in random order; returns reconstruction and KL, in nats per image."""
    batches = torch.randperm(len(x)).to(x.device).split(batch_size)
    stride = math.ceil(len(batches) / 50)
    sums, seen = torch.zeros(2, device=x.device), 0
    for step, batch in enumerate(batches):
        with half_products(x.device):
            # index_select is x[batch], but it copies row by row, not byte by byte
            reconstruction, kl = negative_elbo(model, x.index_select(0, batch) / 255, one_hot[labels[batch]])
        optimizer.zero_grad()
        (reconstruction + kl).backward()
        optimizer.step()
        sums += torch.stack([reconstruction, kl]).detach()
        seen += len(batch)
        if step % stride == 0:  # some fifty times an epoch is enough to average, and to ask the device how it goes
            count = (epoch - 1) * math.ceil(len(batches) / stride) + step // stride
            with torch.no_grad():
                for kept, moving in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(moving, 10 / (10 + count))
            loss = sums.sum().item() / seen
            if not math.isfinite(loss):
                break
            if sys.stdout.isatty():
                print(f"epoch {epoch}  {seen / len(x):4.0%}  loss {loss:.2f}", end="\r", flush=True)
    return (sums / seen).tolist()


def train_cvae(epochs=100, batch_size=128, learning_rate=1.5e-3, h_dim=600, z_dim=50, num_classes=10,
               data_dir="./mnist", out_dir=".", seed=0, resume=False, device=None, textbook=False):  # fmt: skip
    """Trains a CVAE (num_classes=0: the plain VAE) and returns it.

    Writes, under out_dir: cvae_checkpoint.pth after every epoch, cvae_results/epoch_N.png every ten epochs and after
    the last, CVAE_loss.png in the end. resume=True goes on from the checkpoint, on the CPU to the last bit as if never
    interrupted. textbook=True starts from PyTorch's default weights and does not average; with learning_rate=1e-3 it
    is the recipe of most tutorials. Raises ValueError for arguments or a checkpoint that will not do,
    FileNotFoundError if there is none to resume, RuntimeError for damaged data, a failed write or a diverging loss.
    """
    check(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, h_dim=h_dim, z_dim=z_dim)
    check(num_classes=num_classes, data_dir=data_dir, out_dir=out_dir, seed=seed, resume=resume, textbook=textbook)
    # The checkpoint holds plain numbers only, and these may be NumPy's.
    epochs, batch_size, h_dim, z_dim = int(epochs), int(batch_size), int(h_dim), int(z_dim)
    num_classes, seed, learning_rate = int(num_classes), int(seed), float(learning_rate)
    hyperparameters = dict(batch_size=batch_size, learning_rate=learning_rate, h_dim=h_dim, z_dim=z_dim)
    hyperparameters |= dict(num_classes=num_classes, seed=seed, textbook=textbook)
    device, out_dir = pick_device(device), Path(out_dir).expanduser()
    path = out_dir / CHECKPOINT
    # Inside, random numbers of our own; afterwards, those of the CPU and of CUDA go on as before.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = CVAE(784, h_dim, z_dim, num_classes)
        if not textbook:  # small weights and zero biases to begin with: measured to end better
            for layer in model.children():
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        model.to(device)
        average = model if textbook else copy.deepcopy(model)  # averaging a model with itself changes nothing
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        history = {key: [] for key in ("train_loss", "reconstruction", "kl", "train_loss_after", "test_loss")}
        trained_on = restore(path, hyperparameters, model, average, optimizer, history) if resume else None
        first = done = len(history["train_loss"])
        if done > epochs:
            raise ValueError(f"epochs={epochs} will not do: {path} has {done} behind it. Ask for as many or more")

        make_folder(out_dir / "cvae_results")
        if path.exists() and not resume:
            print(f"{path} will be replaced after the first epoch; to go on from it, stop now and resume")
        dataset, *sets = load_digits(data_dir)
        if resume and dataset != trained_on:
            raise ValueError(f"{path} was trained on {trained_on}, this would be {dataset}. Train anew without resume")
        # The images stay bytes, 55 MB in all, until their batch is due. Row d of `one_hot` stands for the digit d.
        (x, labels), (test_x, test_labels) = [(part.flatten(1).to(device), digit.to(device)) for part, digit in sets]
        one_hot, n = torch.eye(10, num_classes, device=device), len(test_x)  # with no classes, rows of no columns
        size = sum(weight.numel() for weight in model.parameters())
        print(f"{dataset}: {len(x):,} images to train on, {n:,} to test on. {size:,} weights on {device}", flush=True)

        start = time.perf_counter()
        try:
            for epoch in range(done + 1, epochs + 1):
                began = time.perf_counter()
                torch.manual_seed(seed * 100_003 + epoch)  # so that resuming at an epoch needs no saved random state
                reconstruction, kl = train_epoch(model, average, optimizer, x, labels, one_hot, batch_size, epoch)
                loss = reconstruction + kl
                after = average_loss(average, x[:n], labels[:n], one_hot)
                test_loss = average_loss(average, test_x, test_labels, one_hot)
                if not (is_finite(model) and math.isfinite(loss + after + test_loss)):
                    raise RuntimeError(
                        f"The loss is no longer finite in epoch {epoch}: learning_rate={learning_rate} is probably too "
                        f"high, try a third. {f'{path} keeps epoch {done}' if done else 'Nothing was saved'}"
                    )
                for losses, value in zip(history.values(), (loss, reconstruction, kl, after, test_loss), strict=True):
                    losses.append(value)
                if epoch % 10 == 0 or epoch == epochs:
                    picture = out_dir / "cvae_results" / f"epoch_{epoch}.png"
                    save_samples(average, picture, describe(model, dataset, epoch))
                checkpoint = {
                    "epoch": epoch,
                    "model_state_dict": average.state_dict(),
                    "training_state_dict": model.state_dict(),
                    "optimizer_state_dict": optimizer.state_dict(),
                    "hyperparameters": hyperparameters,
                    "dataset": dataset,
                    "history": history,
                }
                write_whole(path, partial(torch.save, checkpoint))
                done, now = epoch, time.perf_counter()
                left = timedelta(seconds=round((now - start) / (epoch - first) * (epochs - epoch)))
                print(
                    f"epoch {epoch}/{epochs}  loss {loss:.2f} = {reconstruction:.2f} "
                    f"reconstruction + {kl:.2f} KL  test {test_loss:.2f}  {now - began:.1f} s  {left} left",
                    flush=True,
                )
        except KeyboardInterrupt:
            kept = f"{path} keeps epoch {done}; go on with resume=True (--resume)" if done else "No epoch was done yet"
            raise KeyboardInterrupt(f"Interrupted. {kept}") from None
    title = describe(model, dataset, epochs)
    save_loss_figure(history, out_dir / "CVAE_loss.png", title)
    print(f"{title}: test loss {history['test_loss'][-1]:.2f} nats per image. The model is in {path}", flush=True)
    return average


# %% [markdown]
# ## Drawing
#
# Now forget the encoder. Sample a `z`, say which digit, decode.
#
# `temperature` scales `z`. At 1 you get what the model believes handwriting is like; towards 0 the digits get cleaner
# and more and more alike.


# %%
def inference_cvae(input=6, flag=False, temperature=1.0, seed=None, out_dir=".", device=None):
    """Draws ten digits with the checkpoint in out_dir: 0 to 9 or, with flag=True, ten drawings of the digit `input`.

    Without flag=True `input` does not count. The images are saved as CVAE_0-9.png or, say, CVAE_6.png, and returned:
    [10, 1, 28, 28] in [0, 1], on the CPU. The same seed gives the same z, None a new one. Raises FileNotFoundError
    without a checkpoint, ValueError for arguments or a checkpoint that will not do, RuntimeError for a failed write.
    """
    check(flag=flag, temperature=temperature, out_dir=out_dir)
    check(input=input if flag else 0, seed=0 if seed is None else seed)
    device = pick_device(device)
    checkpoint, model = load_checkpoint(out_dir)
    if flag and not model.num_classes:
        raise ValueError("flag=True will not do: this checkpoint is a plain VAE, which draws whatever it likes")
    path = Path(out_dir).expanduser() / f"CVAE_{int(input) if flag else '0-9'}.png"
    make_folder(path.parent)
    digits = [int(input)] * 10 if flag else list(range(10))
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    z = float(temperature) * torch.randn(10, model.z_dim, generator=generator)
    images = draw(model.to(device), z, torch.eye(10, model.num_classes)[digits])
    title = describe(model, checkpoint.get("dataset", "unnamed data"), checkpoint.get("epoch", "?"))
    save_grid(images, path, 5, title, captions=digits if model.num_classes else ())
    print(f"{title}, draws {f'the digit {digits[0]}' if flag else 'ten digits'}: {path}", flush=True)
    return images


# %% [markdown]
# ## Whose handwriting is it?
#
# Encode a real test digit with its label and keep the mean of `z`: the style, without the content. Decode it with each
# of the ten labels, and you have ten digits in one person's hand. The red box marks the digit's own label, that is,
# its reconstruction.


# %%
def restyle_cvae(indices=None, data_dir="./mnist", out_dir=".", device=None):
    """Redraws test digits as 0 to 9, each in its own style; saves CVAE_styles.png, a row per digit.

    indices says which test images; None takes the first of each digit. Returns what the picture shows, [rows, 11, 1,
    28, 28] in [0, 1], on the CPU: the original, then 0 to 9. The plain VAE has no label to change: [rows, 2, 1, 28,
    28], the original and its reconstruction. Raises what inference_cvae raises, and RuntimeError for damaged data.
    """
    check(data_dir=data_dir, out_dir=out_dir, indices=[0] if indices is None else indices)
    device = pick_device(device)
    checkpoint, model = load_checkpoint(out_dir)
    path = Path(out_dir).expanduser() / "CVAE_styles.png"
    make_folder(path.parent)
    shown = dataset = checkpoint.get("dataset", "unnamed data")
    if dataset == BUILT_IN:  # real handwriting would be strange to this model
        images, labels = built_in_digits(10_000, seed=1)
    else:
        shown, _, (images, labels) = load_digits(data_dir)
    rows = [labels.tolist().index(digit) for digit in range(10)] if indices is None else list(map(int, indices))
    if max(rows) >= len(images):
        raise ValueError(f"indices={indices!r} will not do: there are {len(images)} test images")
    x, labels = images[rows].view(-1, 1, 28, 28) / 255, labels[rows]
    columns = max(model.num_classes, 1)
    with torch.no_grad():
        mu, _ = model.encode(x, torch.eye(10, model.num_classes)[labels])
    c = torch.eye(columns, model.num_classes).repeat(len(rows), 1)
    redrawn = draw(model.to(device), mu.repeat_interleave(columns, 0), c).view(len(rows), columns, 1, 28, 28)
    images = torch.cat([x.unsqueeze(1), redrawn], dim=1)
    boxed = [row * (1 + columns) + 1 + label % columns for row, label in enumerate(labels.tolist())]
    captions = ["original", *range(10)] if model.num_classes else ["original", "redrawn"]
    title = f"{describe(model, dataset, checkpoint.get('epoch', '?'))}, redraws test digits of {shown}"
    save_grid(images.flatten(0, 1), path, 1 + columns, title, captions, boxed)
    print(f"{title}: {path}", flush=True)
    return images


# %% [markdown]
# ## The whole job
#
# In a notebook, this last cell trains with the defaults and draws. Afterwards call `inference_cvae(input=3, flag=True)`
# or `restyle_cvae([7, 8, 9])` as often as you like, or train another: `train_cvae(epochs=5, out_dir="short")`.


# %%
OPTIONS = {
    "epochs": "passes over the training images",
    "batch_size": "images per step",
    "learning_rate": "step size of Adam",
    "h_dim": "width of the hidden layers",
    "z_dim": "length of the code z",
    "num_classes": "10, or 0 for the plain VAE",
    "seed": "of training; if given, of drawing too",
    "resume": "go on from the checkpoint",
    "textbook": "PyTorch's default initial weights, no averaging",
    "digit": "draw this digit only",
    "temperature": "scale of z when drawing",
    "data_dir": "where MNIST is, or shall be",
    "out_dir": "where everything is written",
    "device": "cpu, cuda, mps, ...; the best there is if left out",
}


def main(arguments):
    steps = {"train": train_cvae, "draw": inference_cvae, "restyle": restyle_cvae}
    takes = {step: dict(inspect.signature(function).parameters) for step, function in steps.items()}
    takes["draw"]["digit"] = takes["draw"]["input"]
    parser = argparse.ArgumentParser(description="Handwritten digits with a conditional VAE.", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"cvae_mnist.py: {message} (see --help)")
    parser.add_argument("steps", nargs="*", metavar="step", help="train, draw, restyle; none named: all, in this order")
    for name, text in OPTIONS.items():
        default = next(parameters[name].default for parameters in takes.values() if name in parameters)
        kind = str if default is None else type(default)
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__}
        text += "" if default is None or kind is bool or name == "digit" else f" (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), help=text, default=argparse.SUPPRESS, **how)
    options = vars(parser.parse_args(arguments))
    chosen = options.pop("steps") or list(steps)
    for step in set(chosen) - set(steps):
        parser.error(f"there is no step {step!r}: choose from train, draw, restyle")
    for name in options:
        if not any(name in takes[step] for step in chosen):
            parser.error(f"--{name.replace('_', '-')} does nothing for {' and '.join(chosen)}")
    if options.get("num_classes") == 0 and "digit" in options:
        parser.error("--digit needs a model that knows digits, and --num-classes 0 makes one that does not")
    check(**{name: value for name, value in options.items() if name != "device"})

    digit = options.pop("digit", None)
    given = {step: {name: value for name, value in options.items() if name in takes[step]} for step in steps}
    out_dir, pictures = Path(options.get("out_dir", ".")).expanduser(), []
    if "train" in chosen:
        train_cvae(**given["train"])
        pictures += ["CVAE_loss.png"]
    if "draw" in chosen:
        if digit is not None or load_checkpoint(out_dir)[1].num_classes:
            inference_cvae(6 if digit is None else digit, flag=True, **given["draw"])
            pictures += [f"CVAE_{6 if digit is None else digit}.png"]
        if digit is None:
            inference_cvae(**given["draw"])
            pictures += ["CVAE_0-9.png"]
    if "restyle" in chosen:
        restyle_cvae(**given["restyle"])
        pictures += ["CVAE_styles.png"]
    open_windows(out_dir / name for name in pictures)


if __name__ == "__main__":
    if "get_ipython" in globals():  # pasted into a notebook: the arguments are the kernel's, not ours
        main([])
    else:
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or "Interrupted", file=sys.stderr)
            sys.exit(130)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if last.filename != main.__code__.co_filename or not last.line.startswith("raise"):
                raise  # not one of our own messages but a bug, maybe in a change of yours: show where
            sys.exit(f"cvae_mnist.py: {error}")
