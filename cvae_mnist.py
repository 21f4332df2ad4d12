# %% [markdown]
# # Handwritten digits with a conditional VAE
#
# A variational autoencoder (VAE) has two halves. The *encoder* describes an image by a short list
# of numbers, the *latent vector* `z` (latent means hidden: nobody says what its numbers mean).
# The *decoder* turns a latent vector back into an image. In a *conditional* VAE (CVAE) both halves
# are also given the label `c`: which digit it is. So `z` is left to describe the style: slant,
# width, thickness. After training, make up a `z`, choose a label, decode: a new handwritten digit.
#
# ```text
#                   encoder                                  decoder
#  image x ───┐                ┌─► mu ──────┐
#             ├─► ReLU (600) ──┤            ├─► z (50) ──┐
#  label c ─┬─┘                └─► log_var ─┘            ├─► ReLU (600) ──► sigmoid (784): image
#           └────────────────────────────────────────────┘
#                     z = mu + exp(log_var / 2) * noise
# ```
#
# Part 1 is the idea: model, loss, one epoch of training, new digits. To learn, read this. Part 2
# trains the model and draws with it. The appendix is not about VAEs. In a notebook, only the last
# cell starts anything; as a script, `python cvae_mnist.py` does the same, in minutes without a GPU.
# %%
import argparse
import contextlib
import copy
import inspect
import io
import os
import socket
import sys
import tempfile
import time
from numbers import Integral, Real
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # for busy machines: idle threads sleep sooner
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid


# %% [markdown]
# ## Part 1: the idea
#
# ### The model
#
# An image `x` is 28 x 28 = 784 numbers from 0 (black) to 1 (white). For it the encoder returns not
# one `z` but a normal distribution over `z`: for each of its 50 numbers a mean, `mu`, and a
# variance. A layer may return any number, but a variance must be positive; so the layer returns its
# logarithm, `log_var`. The decoder returns, for each pixel, the probability that it is white, which
# is then shown as a shade of gray (in pictures inverted, like ink on paper).
#
# In training the decoder needs a `z` to decode, so one is sampled from the encoder's distribution.
# A plain random draw would stop the gradient on its way back to the encoder. Hence the
# *reparameterization trick*: sample standard normal noise, which depends on no weight, multiply it
# by the standard deviation, exp(log_var / 2), and add `mu`.
# %%
class CVAE(nn.Module):
    """A conditional VAE, with one hidden layer in each half. num_classes=0: the plain VAE.

    Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014. With a label: Kingma et al.,
    Semi-supervised Learning with Deep Generative Models, 2014, and Sohn et al., NIPS 2015.
    """

    def __init__(self, input_dim=784, h_dim=600, z_dim=50, num_classes=10):
        super().__init__()
        self.z_dim, self.num_classes = z_dim, num_classes
        self.fc1 = nn.Linear(input_dim + num_classes, h_dim)
        self.fc2 = nn.Linear(h_dim, z_dim)  # mean
        self.fc3 = nn.Linear(h_dim, z_dim)  # log-variance
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)
        self.fc5 = nn.Linear(h_dim, input_dim)
        for layer in self.children():  # small weights train to a lower loss than PyTorch's own
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def one_hot(self, labels):
        """labels [B] -> c [B, num_classes]: 1 in the label's column, 0 elsewhere."""
        return torch.eye(10, self.num_classes, device=labels.device)[labels]

    def encode(self, x, c):
        """x [B, 784] or [B, 1, 28, 28] in [0, 1], c [B, num_classes] -> mu, log_var [B, z_dim]."""
        h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))
        return self.fc2(h).float(), self.fc3(h).float()  # 32 bits, even where train_epoch uses 16

    def reparameterize(self, mu, log_var):
        """Samples z [B, z_dim] from the normal distribution with this mean and log-variance."""
        return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)

    def decode_logits(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> logits [B, 784], the values before the sigmoid."""
        return self.fc5(F.relu(self.fc4(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> images [B, 784] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z, c))

    def forward(self, x, c):
        """model(x, c) -> recon [B, 784], mu, log_var. For your own code: the loss needs logits."""
        mu, log_var = self.encode(x, c)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var

# %% [markdown]
# ### The loss
#
# The *prior* p(z) is the standard normal distribution, N(0, I): how `z` is distributed when nothing
# is known of the image. The model should give the training images a high probability, the integral
# of p(x|z,c) p(z) over every `z`. That is too much to compute, but its logarithm is never below the
# *evidence lower bound* (ELBO), which we can estimate. So instead we minimize -ELBO:
#
# $$-\mathrm{ELBO} = \mathbb{E}_{q(z|x,c)}\left[-\log p(x|z,c)\right]
#   + \mathrm{KL}\left(q(z|x,c)\,\|\,\mathcal{N}(0, I)\right)$$
#
# Here q is the encoder's distribution of `z`, p(x|z,c) is the decoder's distribution of the image,
# and E is the mean over `z` sampled from q, for which one sample per image will do.
#
# - The first term, the *reconstruction*, asks that the image can be rebuilt from `z`. Each pixel is
#   a Bernoulli variable: white with the decoder's probability, else black. So -log p is the binary
#   cross-entropy. A gray pixel counts as both, x white and 1 - x black: even a perfect copy costs.
# - The second, the *Kullback-Leibler (KL) divergence* of q from the prior, keeps the `z` of real
#   images close to standard normal noise, so that later such noise decodes into new digits. With
#   the means and variances of q it is $-\tfrac12\sum_j(1 + \log\sigma_j^2 - \mu_j^2 - \sigma_j^2)$.
#
# Both are in *nats*, the unit of information that goes with the natural logarithm. Sum or mean?
# Sum over the pixels and over the numbers of `z`; then the losses we report are means over the
# images. With a mean over the pixels, too, the KL divergence would weigh 784 times too much. (To
# train, a sum over the batch will do: the steps of Adam, the optimizer, ignore the loss's scale.)
# %%
def negative_elbo(model, x, c):
    """The two terms of the loss, in nats, each summed over the batch: reconstruction and KL.

    Kingma and Welling, section 2.2 (why it is a lower bound) and appendix B (the KL divergence).
    From the logits, reconstruction is finite even where a probability rounds to 0 or 1.
    """
    mu, log_var = model.encode(x, c)
    logits = model.decode_logits(model.reparameterize(mu, log_var), c)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
    return reconstruction, kl

# %% [markdown]
# ### One epoch of training
#
# An *epoch* takes every training image once, in random order, a batch at a time. With a constant
# learning rate the weights never settle: they keep moving around a good place. Their mean over many
# steps is closer to it. So a second model, `average`, holds their mean over about the last tenth of
# the steps so far. It is the one to test, to save and to draw with.
# %%
def train_epoch(model, average, optimizer, images, labels, batch_size, epoch):
    """One pass over images (uint8 [N, 784]) and labels (int64 [N]); epoch counts from 1."""
    batches = torch.randperm(len(images), device=images.device).split(batch_size)
    for number, indices in enumerate(batches):
        x = images[indices] / 255
        c = model.one_hot(labels[indices])
        with autocast(x.device):  # multiplies in 16 bits where that is faster
            reconstruction, kl = negative_elbo(model, x, c)
        loss = reconstruction + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            update_average(average, model, step=(epoch - 1) * len(batches) + number)
            show_progress(epoch, number / len(batches), loss / len(indices))


@torch.no_grad()
def update_average(average, model, step):  # at every tenth step; about the last tenth counts
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 100 / (100 + step))  # mean += (weight - mean) * 100 / (100 + step)

# %% [markdown]
# ### New digits
#
# Now forget the encoder. Sample a `z` from the prior, choose a label, decode. With a trained model,
# `generate(model, torch.randn(10, model.z_dim), range(10))` draws the digits 0 to 9.
# %%
@torch.no_grad()
def generate(model, z, labels):
    """Decodes z [N, z_dim] with N labels -> images [N, 1, 28, 28] in [0, 1], on the CPU."""
    device = next(model.parameters()).device
    c = model.one_hot(torch.as_tensor(labels, device=device))
    return model.decode(z.to(device), c).view(-1, 1, 28, 28).cpu()

# %% [markdown]
# That is the whole idea.
#
# ## Part 2: train, then draw
#
# After each epoch the loss of the averaged weights is computed, on the first 10,000 training images and on the 10,000
# test images, and a checkpoint is saved. Look at `cvae_results/epoch_10.png`, `epoch_20.png` and so on: a column is a
# digit, a row is a style, the same `z` in every picture. Then look at `CVAE_loss.png`. The gap between the curves of
# training and of test images is overfitting: how much better the model does on images it was trained on.
# %%
def train_cvae(epochs=100, batch_size=256, learning_rate=3e-3, h_dim=600, z_dim=50, num_classes=10,
               data_dir="./mnist", out_dir=".", seed=0, resume=False, device=None):  # fmt: skip
    """Trains a CVAE (num_classes=0: the plain VAE) and returns it, with the averaged weights.

    Saves, in out_dir, cvae_checkpoint.pth after every epoch, cvae_results/epoch_N.png after every tenth and the last,
    CVAE_loss.png at the end. With resume=True goes on from the checkpoint: on a CPU, to the same weights as without the
    stop, bit for bit. device=None: the accelerator that PyTorch finds, else the CPU. Seeds PyTorch's random numbers.
    Raises UserError for bad arguments or files, and when the loss is not finite.
    """
    (epochs, batch_size, learning_rate, h_dim, z_dim, num_classes,
     data_dir, out_dir, seed, resume, device) = check(train_cvae, locals())  # the same, checked  # fmt: skip
    hyperparameters = {"batch_size": batch_size, "learning_rate": learning_rate, "h_dim": h_dim, "z_dim": z_dim,
                       "num_classes": num_classes, "seed": seed}  # fmt: skip
    torch.manual_seed(seed)
    model = CVAE(784, h_dim, z_dim, num_classes).to(device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    history = {"train_loss": [], "reconstruction": [], "kl": [], "test_loss": []}
    path = out_dir / "cvae_checkpoint.pth"
    if resume:
        trained_on = restore(path, epochs, hyperparameters, into=(model, average, optimizer, history))
    elif path.exists():
        print(f"{path} will be replaced after the first epoch. To go on from it instead, stop now and resume it")
    make_folder(out_dir / "cvae_results")
    dataset, (images, labels), (test_images, test_labels) = load_digits(data_dir, device)
    if resume and dataset != trained_on:
        raise UserError(f"{path} was trained on {trained_on}, but data_dir={str(data_dir)!r} gives {dataset}. "
                        f"Train anew in another out_dir, or use a data_dir that gives {trained_on}")  # fmt: skip
    name = f"{'CVAE' if num_classes else 'VAE'} on {dataset}"
    print(f"{dataset}: {len(images):,} images to train on, {len(test_images):,} to test on. Device: {device}")
    print("Every finished epoch is saved: stop whenever you like, go on with resume=True (--resume)", flush=True)

    for epoch in range(len(history["test_loss"]) + 1, epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(seed * 100_003 + epoch)  # an epoch after a stop is the same as without
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, epoch / 2)  # half in epoch 1: ends at a lower loss
        train_epoch(model, average, optimizer, images, labels, batch_size, epoch)
        reconstruction, kl = evaluate(average, images[:10_000], labels[:10_000])
        test_loss = sum(evaluate(average, test_images, test_labels))
        if not all_finite([reconstruction, kl, test_loss, *model.parameters()]):
            raise UserError(f"The loss is not finite in epoch {epoch}. Train anew with a third of {learning_rate=}")
        for term, loss in zip(history, (reconstruction + kl, reconstruction, kl, test_loss), strict=True):
            history[term].append(loss)
        if epoch % 10 == 0 or epoch == epochs:
            save_samples(average, out_dir / "cvae_results" / f"epoch_{epoch}.png", f"{name}, epoch {epoch}")
        checkpoint = {"epoch": epoch, "model_state_dict": average.state_dict(), "history": history, "dataset": dataset,
                      "training_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(),
                      "hyperparameters": hyperparameters}  # fmt: skip
        atomic_write(path, torch.save, checkpoint)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch}/{epochs}  loss {reconstruction + kl:.2f} = {reconstruction:.2f} reconstruction + {kl:.2f}"
              f" KL  test {test_loss:.2f}  {seconds:.1f} s  {seconds * (epochs - epoch) / 60:.1f} min left", flush=True)
    title = f"{name}, epoch {epochs}"
    save_loss_figure(history, out_dir / "CVAE_loss.png", title)
    print(f"{title}: test loss {history['test_loss'][-1]:.2f} nats per image. The model is in {path}", flush=True)
    return average


@torch.no_grad()
def evaluate(model, images, labels):
    """Reconstruction and KL of images (uint8 [N, 784]), in nats per image. z is sampled here, too, as the ELBO asks."""
    sums = torch.zeros(2, device=images.device)
    for x, label in zip(images.split(500), labels.split(500), strict=True):
        with autocast(x.device):
            sums += torch.stack(negative_elbo(model, x / 255, model.one_hot(label)))
    return (sums / len(images)).tolist()

# %% [markdown]
# ### Draw
#
# `temperature` multiplies `z`. At 1, `z` is a sample from the prior, and drawings vary as much as the model learned.
# Towards 0 they get cleaner, and more and more alike.
# %%
def inference_cvae(input=6, flag=False, temperature=1.0, seed=None, out_dir=".", device=None):
    """Draws ten digits with the checkpoint in out_dir: 0 to 9 (plain VAE: any ten) or, with flag=True, ten of `input`.

    With flag=False `input` is ignored. Saves CVAE_0-9.png or, say, CVAE_6.png, and returns its images: [10, 1, 28, 28]
    in [0, 1], on the CPU. seed=None samples new z at each call. Raises UserError for bad arguments or files.
    """
    input = input if flag else 0
    input, flag, temperature, seed, out_dir, device = check(inference_cvae, locals())
    checkpoint, model = load_checkpoint(out_dir)
    if flag and not model.num_classes:
        raise UserError("flag=True will not do: this checkpoint is a plain VAE, which draws whatever digit it likes")
    seed = torch.Generator().seed() if seed is None else seed
    z = temperature * torch.randn(10, model.z_dim, generator=torch.Generator().manual_seed(seed))
    digits = [input] * 10 if flag else list(range(10))
    images = generate(model.to(device), z, digits)
    path = out_dir / f"CVAE_{input if flag else '0-9'}.png"
    title = f"{'CVAE' if model.num_classes else 'VAE'} on {checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    save_grid(images, path, title, columns=5, captions=digits if model.num_classes else [])
    print(f"{title}, draws {f'the digit {input}' if flag else 'ten digits'}: {path}", flush=True)
    return images

# %% [markdown]
# ### Keep the style, change the digit
#
# Encode a real test digit with its label: the mean of its `z` is its style. Decode it with each of the ten labels: ten
# digits in one style, though not every style suits every digit. A red box marks its own label: a reconstruction.
# %%
def restyle_cvae(indices=None, data_dir="./mnist", out_dir=".", device=None):
    """Redraws test digits as 0 to 9, each row in the style of its test digit; saves CVAE_styles.png.

    indices: which test images; None: the first of each digit. Returns what the picture shows, on the CPU, in [0, 1]:
    [rows, 11, 1, 28, 28], the original, then 0 to 9. A plain VAE has no label to change: [rows, 2, 1, 28, 28], the
    original and its reconstruction. Raises UserError for bad arguments or files.
    """
    indices, data_dir, out_dir, device = check(restyle_cvae, locals())
    checkpoint, model = load_checkpoint(out_dir)
    if checkpoint["dataset"] == BUILT_IN:  # handwriting would be strange to this model
        dataset, (images, labels) = BUILT_IN, built_in_digits(10_000, seed=1)
    else:
        dataset, _, (images, labels) = load_digits(data_dir)
    if indices is None:
        indices = [labels.tolist().index(digit) for digit in range(10)]
    if max(indices) >= len(images):
        raise UserError(f"indices={indices} will not do: the last of the test images is number {len(images) - 1}")
    x, labels = images[indices].view(-1, 1, 28, 28) / 255, labels[indices]
    with torch.no_grad():
        mu, _ = model.encode(x, model.one_hot(labels))
    captions = list(range(10)) if model.num_classes else ["redrawn"]
    z, new_labels = mu.repeat_interleave(len(captions), dim=0), torch.arange(len(captions)).repeat(len(x))
    redrawn = generate(model.to(device), z, new_labels).view(len(x), -1, 1, 28, 28)
    rows = torch.cat([x.unsqueeze(1), redrawn], dim=1)
    boxed = [11 * row + 1 + label for row, label in enumerate(labels.tolist())] if model.num_classes else []
    name = "CVAE" if model.num_classes else "VAE"
    title = f"{name} on {checkpoint['dataset']}, epoch {checkpoint['epoch']}, redraws {dataset}"
    path = out_dir / "CVAE_styles.png"
    save_grid(rows.flatten(0, 1), path, title, 1 + len(captions), ["original", *captions], boxed)
    print(f"{title}: {path}", flush=True)
    return rows

# %% [markdown]
# ## Appendix: nothing in it is about VAEs
#
# **Data.** MNIST is 60,000 images of handwritten digits to train on and 10,000 to test on, of 28 x 28 pixels. They are
# kept on the device, as bytes: gathering a batch is one indexing, without a `DataLoader`. Where there is no network,
# digits are made from fonts that come with matplotlib, distorted at random.
# %%
MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
BUILT_IN = "built-in digits"
FONTS = {"DejaVuSans": 36, "cmss10": 41, "cmtt10": 41, "STIXGeneralItalic": 39}  # and sizes; they come with matplotlib


def load_digits(data_dir, device="cpu"):
    """Loads MNIST from data_dir, downloading it first if need be; where that fails, makes the built-in digits.

    Returns its name, then (images uint8 [N, 784], labels int64 [N]) to train on, to test on. UserError if damaged.
    """
    raw = Path(data_dir).expanduser() / "MNIST" / "raw"
    if not raw.exists():
        print(f"Downloading MNIST (11 MB) into {raw}", flush=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds; without it, torchvision waits for a dead network forever
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # in a log file, the progress bar would be a mess
            sets = [datasets.MNIST(raw.parent.parent, train, download=True) for train in (True, False)]
        dataset, sets = "MNIST", [(part.data.flatten(1), part.targets) for part in sets]
        for images, labels in sets:
            if images.shape != (len(labels), 784) or labels.min() < 0 or labels.max() > 9:
                raise ValueError("images and labels do not fit together")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if all((raw / name).is_file() for name in MNIST_FILES):
            raise UserError(f"MNIST in {raw} is damaged ({reason}). Delete that folder and run again") from error
        print(f"MNIST is not in {raw} and could not be downloaded: {reason}")
        print(f"Going on with {BUILT_IN}. For MNIST, put these four files there, as they are or as .gz:", *MNIST_FILES)
        dataset, sets = BUILT_IN, [built_in_digits(60_000, seed=0), built_in_digits(10_000, seed=1)]
    finally:
        socket.setdefaulttimeout(timeout)
    return dataset, *[(images.to(device), labels.to(device)) for images, labels in sets]


def built_in_digits(count, seed):
    """Makes digits like MNIST's: images uint8 [count, 784], labels int64 [count]."""
    glyphs, images = [], []
    for name, size in FONTS.items():
        font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)
        for digit in "0123456789":
            canvas = Image.new("L", (40, 40))
            ImageDraw.Draw(canvas).text((20, 33), digit, 255, font, anchor="ms")  # the middle of the baseline
            glyphs.append(pil_to_tensor(canvas) / 255)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(glyphs), [count], generator=generator)
    # A random 2 x 2 matrix turns, slants and stretches in one; the third column shifts.
    mean, spread = torch.tensor([[[1.0, 0.15, 0], [0, 1.0, 0]], [[0.1, 0.2, 0.03], [0.08, 0.1, 0.03]]])
    for part in choice.split(2000):
        affine = mean + spread * torch.randn(len(part), 2, 3, generator=generator)
        bend = F.interpolate(0.07 * torch.randn(len(part), 2, 4, 4, generator=generator), size=28, mode="bicubic")
        where = F.affine_grid(affine, [len(part), 1, 28, 28], align_corners=False) + bend.permute(0, 2, 3, 1)
        drawn = F.grid_sample(torch.stack(glyphs)[part], where, align_corners=False).flatten(1)
        images.append((400 * drawn).clamp(max=255).to(torch.uint8))  # bolder than 255 * drawn
    return torch.cat(images), choice % 10  # each font has the glyphs 0 to 9

# %% [markdown]
# **Checkpoints, pictures, helpers.** A file is written in one atomic step, so whenever the process dies, a complete
# checkpoint is on disk. Pictures are shown as they are made in a notebook, and at the end by a script.
# %%
class UserError(ValueError):
    """An error that the user can fix; the message says how."""


def autocast(device):
    """Inside, a CPU with instructions for it multiplies matrices in bfloat16 (16 bits), in less than half the time."""
    able = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=able and device.type == "cpu")


def show_progress(epoch, done, loss):
    if sys.stdout.isatty():  # a line that the next one overwrites
        print(f"epoch {epoch}  {done:4.0%}  loss {loss.item():.2f}", end="\r", flush=True)


def all_finite(values):
    return all(torch.as_tensor(value).isfinite().all() for value in values)


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # an error if files cannot be written there
    except OSError as error:
        raise UserError(f"out_dir will not do: {str(path)!r} cannot be written ({error.strerror})") from error


def atomic_write(path, save, *what):
    """Writes what save(*what, file) does. If the process dies, path holds all of the old content or all of the new."""
    content, unfinished = io.BytesIO(), path.with_name(path.name + ".unfinished")
    save(*what, content)
    try:
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); what it held before is safe") from error


def load_checkpoint(out_dir):
    """Returns a checkpoint's dict and its CVAE, on the CPU. Runs no code that a file may hold. May raise UserError."""
    path = Path(out_dir).expanduser() / "cvae_checkpoint.pth"
    if not path.exists():
        raise UserError(f"{path} does not exist. Train first: train_cvae() or `python cvae_mnist.py train`")
    try:
        checkpoint = {"dataset": "unnamed data", "epoch": "?", **torch.load(path, "cpu", weights_only=True)}
        weights = checkpoint["model_state_dict"]
        (z_dim, h_dim), num_classes = weights["fc2.weight"].shape, weights["fc1.weight"].shape[1] - 784
        with torch.device("meta"):  # takes no random numbers
            model = CVAE(784, h_dim, z_dim, num_classes).to_empty(device="cpu")
        model.load_state_dict(weights)
        if num_classes not in (0, 10) or not all_finite(model.parameters()):
            raise ValueError
    except Exception:  # `from None`: torch.load's own words say how to load unsafe files
        raise UserError(f"{path} is damaged, or no CVAE for MNIST. Move it away and train again") from None
    return checkpoint, model


def restore(path, epochs, hyperparameters, into):
    """Puts a checkpoint back into (model, average, optimizer, history); returns the name of its data set."""
    model, average, optimizer, history = into
    checkpoint, _ = load_checkpoint(path.parent)
    before = checkpoint.get("hyperparameters", "no hyperparameters that it names")
    if before != hyperparameters:
        raise UserError(f"{path} was trained with {before}, not {hyperparameters}. Use the same, or do not resume")
    if checkpoint["epoch"] > epochs:
        raise UserError(f"epochs={epochs} will not do: {path} has {checkpoint['epoch']} already; use that or more")
    average.load_state_dict(checkpoint["model_state_dict"])
    model.load_state_dict(checkpoint["training_state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    history.update(checkpoint["history"])
    return checkpoint["dataset"]


def save_figure(figure, path):
    atomic_write(path, figure.savefig)
    if "ipykernel" in sys.modules:
        from IPython import display
        display.display(display.Image(filename=str(path)))


def save_grid(images, path, title, columns, captions=(), boxed=()):
    """Saves images [N, 1, 28, 28] in rows of `columns`, captions above the first of them, red boxes around some."""
    gap = 12 if len(captions) > columns else 3  # captions further down need room between the rows
    grid = make_grid(images, nrow=columns, padding=gap)[0].numpy()
    height, width = grid.shape
    margin = max(0, 212 - width) / 2  # the title needs room, too
    figure = Figure(figsize=(3 * (width + 2 * margin) / 100, 3 * (height + 22) / 100), dpi=100)  # 3 x 3 for a pixel
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-margin, width + margin), ylim=(height, -22))
    axes.axis("off")
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.text(width / 2, -16, title, ha="center", va="center", fontsize=13)
    corners = [(gap + i % columns * (28 + gap), gap + i // columns * (28 + gap)) for i in range(len(images))]
    for (left, top), caption in zip(corners, captions, strict=False):
        axes.text(left + 14, top - 2, caption, ha="center", va="bottom", fontsize=13)
    for left, top in [corners[i] for i in boxed]:
        axes.plot(left + 29 * torch.tensor([0, 1, 1, 0, 0]), top + 29 * torch.tensor([0, 0, 1, 1, 0]), "tab:red", lw=2)
    save_figure(figure, path)


def save_samples(model, path, title):
    """A column per digit, a row per style; of the plain VAE, a hundred digits of its own choice."""
    columns = max(model.num_classes, 1)
    z = torch.randn(100 // columns, model.z_dim, generator=torch.Generator().manual_seed(0))
    images = generate(model, z.repeat_interleave(columns, dim=0), torch.arange(10).repeat(10))
    save_grid(images, path, title, columns=10, captions=range(model.num_classes))


def save_loss_figure(history, path, title):
    epochs = range(1, len(history["test_loss"]) + 1)
    figure = Figure(figsize=(6, 7), dpi=100, layout="constrained")
    total, reconstruction, kl = figure.subplots(3, sharex=True, height_ratios=(3, 1.2, 1.2))
    total.set(title=title, ylabel="nats per image")
    for axes, name, label in [(total, "train_loss", "training images"), (total, "test_loss", "test images"),
                              (reconstruction, "reconstruction", "reconstruction, training images"),
                              (kl, "kl", "KL divergence, training images")]:  # fmt: skip
        axes.plot(epochs, history[name], ".-", label=f"{label}: {history[name][-1]:.2f}")
        axes.grid(alpha=0.3)
        axes.legend()
    kl.set_xlabel("epoch")
    save_figure(figure, path)


def open_windows(paths):
    """Opens saved pictures in windows, all at once, where there is a screen; returns when they are closed."""
    from matplotlib import pyplot as plt
    for path in paths:
        figure = plt.figure(path.name)
        if figure.canvas.required_interactive_framework is None:  # no screen
            return plt.close(figure)
        figure.figimage(plt.imread(path), resize=True)
    plt.show()

# %% [markdown]
# ### Arguments and the command line: both the check of a call and the options are made from one table
# %%
ARGUMENTS = {  # name: (type, lowest, highest, what is expected, what it is for)
    "epochs": (int, 1, 10**6, "a whole number from 1 to 1000000", "passes over the training images"),
    "batch_size": (int, 1, 10**6, "a whole number from 1 to 1000000", "images per step"),
    "learning_rate": (float, 1e-9, 1e6, "a number from 1e-9 to 1e6", "step size of Adam"),
    "h_dim": (int, 1, 10**6, "a whole number from 1 to 1000000", "width of the hidden layers"),
    "z_dim": (int, 1, 10**6, "a whole number from 1 to 1000000", "length of the latent vector z"),
    "num_classes": (int, 0, 10, "10, or 0 for the plain VAE", "10, or 0 for the plain VAE"),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 4294967295", "of training; if given, of drawing too"),
    "resume": (bool, 0, 1, "True or False", "go on from the checkpoint"),
    "input": (int, 0, 9, "a whole number from 0 to 9", "draw this digit only"),
    "flag": (bool, 0, 1, "True or False", None),
    "temperature": (float, 0, 1e6, "a number from 0 to 1e6", "scale of z when drawing"),
    "indices": (list, None, None, "a list of 1 to 100 whole numbers from 0 up", None),
    "data_dir": (Path, None, None, "the path of a folder, or of one to make", "where MNIST is, or shall be"),
    "out_dir": (Path, None, None, "the path of a folder, or of one to make", "where everything is written"),
    "device": (torch.device, None, None, "a device that PyTorch can use here", "cpu, cuda, mps, ...; else the best"),
}


def check(function, arguments):
    """Returns the arguments of a call, in the signature's order, as plain values. Raises UserError for a bad one."""
    parameters = inspect.signature(function).parameters
    return [check_one(name, arguments.get(name, p.default), p.default) for name, p in parameters.items()]


def check_one(name, value, default):
    kind, low, high, expected, _ = ARGUMENTS[name]
    if value is None and default is None and name != "device":
        return None
    with contextlib.suppress(Exception):  # whatever is wrong with the value, the message says what was expected
        if kind is Path:
            path = Path(value).expanduser()
            if [folder for folder in (path, *path.parents) if folder.exists()][0].is_dir():
                return path
        if kind is torch.device:
            value = (torch.accelerator.current_accelerator(True) or "cpu") if value is None else value
            # An error if it cannot be used. And log1p (in the loss) may be slow under AVX-512 until called with these.
            torch.log1p(torch.tensor([-2.0, -1.0, -0.0], device=value)).cpu()
            return torch.device(value)
        if kind is list and 1 <= len(value) <= 100:
            return [check_one("seed", index, 0) for index in value]  # a seed is a whole number from 0 up, too
        fits = isinstance(value, Integral if kind is int else Real) and isinstance(value, bool) == (kind is bool)
        if fits and low <= value <= high and not (name == "num_classes" and 0 < value < 10):
            return kind(value)
    raise UserError(f"{name}={value!r} will not do: expected {expected}")


def main(arguments):
    """Does the steps that are named, with the options that are given; [] is the whole job."""
    start, steps = time.time(), {"train": train_cvae, "draw": inference_cvae, "restyle": restyle_cvae}
    takes = {step: inspect.signature(function).parameters for step, function in steps.items()}
    defaults = takes["restyle"] | takes["draw"] | takes["train"]
    parser = argparse.ArgumentParser("cvae_mnist.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.usage = "%(prog)s [train] [draw] [restyle] [options], where no step named means all three"
    parser.add_argument("steps", nargs="*", choices=[*steps, "all"], default="all", help=argparse.SUPPRESS)
    flags = {name: "--digit" if name == "input" else "--" + name.replace("_", "-") for name in ARGUMENTS}
    for name, (kind, _, _, _, text) in ARGUMENTS.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind if kind in (int, float) else str}
        if text:
            default = "" if name in ("input", "resume", "device") else f" (default: {defaults[name].default})"
            parser.add_argument(flags[name], dest=name, help=text + default, **how)
    options = vars(parser.parse_intermixed_args(arguments))
    named = options.pop("steps")
    chosen = list(steps) if "all" in named else named  # "all" is what argparse puts in where none is named
    given = {step: {name: value for name, value in options.items() if name in takes[step]} for step in chosen}
    for name in options:
        if not any(name in given[step] for step in chosen):
            parser.error(f"{flags[name]} does nothing for {' and '.join(chosen)}")
    if options.get("num_classes") == 0 and "input" in options:
        parser.error("--digit needs a model that knows digits, and --num-classes 0 makes one that does not")
    for step in chosen:
        check(steps[step], given[step])
    out_dir = Path(options.get("out_dir", ".")).expanduser()
    if "train" in chosen:
        train_cvae(**given["train"])
    if "draw" in chosen and ("input" in options or load_checkpoint(out_dir)[1].num_classes):
        inference_cvae(**{"input": 6, "flag": True, **given["draw"]})
    if "draw" in chosen and "input" not in options:
        inference_cvae(**given["draw"])
    if "restyle" in chosen:
        restyle_cvae(**given["restyle"])
    open_windows(path for path in sorted(out_dir.glob("CVAE_*.png")) if path.stat().st_mtime >= start)

# %% [markdown]
# ### Run
#
# This cell starts the whole job. In a notebook whose kernel was restarted, `train_cvae(resume=True)` goes on instead.
# %%
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "matplotlib>=3.10.8"]
# ///
if __name__ == "__main__" and "get_ipython" in globals():  # in a notebook, the arguments are the kernel's
    main([])
elif __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"cvae_mnist.py: {error}")
    except KeyboardInterrupt:
        print("\nStopped", file=sys.stderr)
        sys.exit(130)
