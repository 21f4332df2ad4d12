# %% [markdown]
# # Handwritten digits with a conditional VAE
# A variational autoencoder (VAE) has two parts. The *encoder* describes an image by a short list of
# numbers, the *latent* (hidden) *vector* `z`. The *decoder* turns a `z` back into an image. In a
# *conditional* VAE (CVAE) both are also given the label `c`: which digit it is. So `z` need only
# describe the style: slant, width, thickness. After training, any label and a random `z` decode to
# a new digit.
# ```text
#                   encoder                                  decoder
#  image x ───┐                ┌─► mu ──────┐
#             ├─► ReLU (600) ──┤            ├─► z (50) ──┐
#  label c ─┬─┘                └─► log_var ─┘            ├─► ReLU (600) ──► sigmoid (784): image
#           └────────────────────────────────────────────┘
# ```
# Part 1 is the idea. Part 2 trains a model and draws with it. The appendix is the rest. Run the
# file, or use it as a notebook: each `# %%` begins a cell, and only the last one starts training.
# %%
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib>=3.8"]
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
import time
from operator import index
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for torch: idle threads free the cores sooner
import torch
import torch.nn.functional as F
from matplotlib import get_data_path, patches, style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid


# %% [markdown]
# ## Part 1: the idea
# An image `x` is 28 x 28 = 784 gray values from 0 (black) to 1 (white). A label `c` is *one-hot*:
# ten numbers, 1 in the digit's place and 0 elsewhere. It is appended to `x` and to `z`. The decoder
# returns each pixel's probability of being white. These probabilities are shown as gray values, and
# the gray values of `x` count as probabilities. (`x [B, 784]` is a batch of B images.)
#
# The encoder does not return one point `z` but a normal distribution over `z`, with a mean `mu` and
# a variance for each of the 50 latent dimensions. Why? If it returned points, nothing would make
# the points between them decode to digits. With a distribution, another `z` near the mean is
# sampled each time an image is used, and the decoder must draw the image from all of them. The loss
# (below) also pulls every distribution towards the standard normal: no variance can vanish, no mean
# can drift away. So the distributions overlap and together fill the standard normal, and after
# training a `z` from it decodes to a digit. A variance is positive, but a layer may return any
# number. So the encoder returns the logarithm of the variance, `log_var`.
#
# In training, `z` is sampled from this distribution. But a random draw has no gradient for `mu` and
# `log_var`. Hence the *reparameterization trick*: sample standard normal noise, which does not
# depend on them, multiply it by the standard deviation exp(`log_var` / 2), and add `mu`.
# %%
class CVAE(nn.Module):
    """A conditional VAE with one hidden layer in each part. num_classes=0: a plain VAE, no label.

    Kingma and Welling, Auto-Encoding Variational Bayes, 2014. With labels: Kingma et al.,
    Semi-supervised Learning with Deep Generative Models, 2014 (model M2, with all labels known)."""

    def __init__(self, input_dim=784, h_dim=600, z_dim=50, num_classes=10):
        super().__init__()
        self.z_dim, self.num_classes = z_dim, num_classes
        self.fc1 = nn.Linear(input_dim + num_classes, h_dim)  # encoder
        self.fc2 = nn.Linear(h_dim, z_dim)  # mean
        self.fc3 = nn.Linear(h_dim, z_dim)  # log-variance
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)  # decoder
        self.fc5 = nn.Linear(h_dim, input_dim)  # pixels
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)  # lower loss than with PyTorch's default
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def one_hot(self, labels):
        """labels [B], integers -> c [B, num_classes]: 1 in the label's column, 0 elsewhere."""
        if self.num_classes == 0:
            return torch.zeros(len(labels), 0, device=labels.device)  # nothing to append
        if labels.is_floating_point():
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        return F.one_hot(labels.long(), self.num_classes).float()

    def encode(self, x, c):
        """x [B, 784] or [B, 1, 28, 28] in [0, 1], c [B, num_classes] -> mu, log_var [B, z_dim]."""
        h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))
        return self.fc2(h).float(), self.fc3(h).float()  # 32 bits: see mixed_precision

    def reparameterize(self, mu, log_var):
        """mu, log_var [B, z_dim] -> z [B, z_dim], sampled from this normal distribution."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def decode_logits(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> logits [B, 784], before the sigmoid; for the loss."""
        return self.fc5(F.relu(self.fc4(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> images [B, 784] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z, c))

    def forward(self, x, c):
        """model(x, c) -> recon [B, 784], mu, log_var. For your own use: nothing here calls it."""
        mu, log_var = self.encode(x, c)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var

# %% [markdown]
# ### The loss
# The model is made of three distributions. (p(a|b) is the probability of a, given b.) The *prior*
# p(z) is what we assume of `z` before we see an image: standard normal, whatever the label. The
# decoder is p(x|z,c): each pixel is white with its probability, else black. The encoder is
# q(z|x,c): independent normals with mean `mu` and variance exp(`log_var`).
#
# Training should make the training images probable: raise log p(x|c). But p(x|c) is the mean of
# p(x|z,c) over all `z` from the prior, and we cannot estimate it, since hardly any random `z` fits
# a given image. The encoder learns which ones do. With E for the mean over `z` sampled from q:
# ```text
# log p(x|c) = log E[ p(x|z,c) p(z) / q(z|x,c) ]      E weights z by q: p(z) / q corrects it
#           >= E[ log( p(x|z,c) p(z) / q(z|x,c) ) ]   Jensen: log is concave, log(mean) >= mean(log)
#            = E[ log p(x|z,c) ] - KL                 where KL = E[ log( q(z|x,c) / p(z) ) ]
# ```
# This is the *evidence lower bound* (ELBO; the evidence is p(x|c)). It equals log p(x|c) if q is
# p(z|x,c): then the ratio is p(x|c) for every `z`. We minimize -ELBO, the sum of two terms. The
# first is the *reconstruction loss*, -E[ log p(x|z,c) ]. For a pixel of gray value g, white with
# probability w, it is -g log w - (1-g) log(1-w), the *binary cross-entropy*. (Of a gray pixel it is
# never 0, not even if w = g.) The second is the *Kullback-Leibler (KL) divergence* of q from the
# prior. It is 0 if they are equal and grows as `z` tells more about the image. So the first term
# asks that `z` says much about the image, the second that it is like any sample from the prior.
#
# For the first term, one sample of `z` per image is enough: the noise averages out over many steps.
# The second has a formula. In this model, pixels (given `z`) and latent dimensions are independent,
# so log-probabilities add: the terms are sums. With natural logarithms, the unit is the *nat*.
# %%
def negative_elbo(model, x, c):
    """x [B, 784] or [B, 1, 28, 28], c [B, num_classes] -> reconstruction loss [B], KL [B].

    In nats. Kingma and Welling, section 2.2 (the bound) and appendix B (KL of two normals).
    The cross-entropy of logits avoids log(0) where a probability is rounded to 0."""
    mu, log_var = model.encode(x, c)
    logits = model.decode_logits(model.reparameterize(mu, log_var), c)
    losses = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none")
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(dim=1)  # the formula
    return losses.sum(dim=1), kl

# %% [markdown]
# ### Training
# An *epoch* takes every training image once, in random order, a batch at a time. All images fit
# into memory as one tensor, so indexing makes a batch, and no `DataLoader` is needed.
# %%
def train_epoch(model, optimizer, images, labels, batch_size):
    """A generator: it trains on images (uint8 [N, 784]) and labels [N] while you loop over it.

    Yields each batch's loss (a scalar tensor, in nats per image) as it was before the step."""
    for indices in torch.randperm(len(images), device=images.device).split(batch_size):
        model.train()  # matters only if you add Dropout or BatchNorm
        x = images[indices] / 255
        c = model.one_hot(labels[indices])
        with mixed_precision(x.device):  # bfloat16 on some CPUs, which is faster
            reconstruction, kl = negative_elbo(model, x, c)
        loss = (reconstruction + kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()

# %% [markdown]
# To draw, the encoder is not needed. Sample `z` from the prior, choose labels, decode.
# %%
@torch.no_grad()
def generate(model, z, labels):
    """z [N, z_dim] and N labels (integers) -> images [N, 1, 28, 28] in [0, 1], on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    c = model.one_hot(torch.as_tensor(labels, device="cpu"))  # the CPU reports a wrong label
    return model.decode(z.to(device), c.to(device)).view(-1, 1, 28, 28).cpu()

# %% [markdown]
# That is the whole idea. To try it in a notebook, run all cells but the last, then these lines:
# ```python
# name, (images, labels), test = load_digits("./mnist")  # from the appendix; downloads MNIST
# model = CVAE()
# optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
# for epoch in range(10):  # about a minute on two CPU cores; the loss falls to about 101
#     losses = [loss.item() for loss in train_epoch(model, optimizer, images, labels, 256)]
#     print(epoch, sum(losses) / len(losses))
# grid = make_grid(generate(model, torch.randn(10, model.z_dim), range(10)), nrow=10)[0]
# Image.fromarray((255 * (1 - grid)).byte().numpy())  # shows the digits, black on white
# ```
# ## Part 2: train, then draw
# With a constant learning rate the weights keep moving around an optimum. Their mean over many
# steps is closer to it. So a second model, `average`, has the mean weights of about the last tenth
# of all steps. It is used to evaluate, save and draw. Without it, the test loss is 2.4 nats higher.
# %%
@torch.no_grad()
def update_average(average, model, step):
    """Call it at every tenth step, and at the last one of an epoch."""
    means = average.state_dict()  # not a copy: what changes below are the weights of `average`
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # not BatchNorm's counter, if you add a BatchNorm
            means[name].lerp_(value, 100 / (100 + step))  # 10 of the last 10 + step / 10 steps

# %% [markdown]
# ### Train
# After each epoch the averaged model is evaluated on the 10,000 test images and on as many training
# images. In the pictures in `cvae_results`, a column is a digit, a row is a style. In
# `CVAE_loss.png`, the gap between training and test loss is overfitting.
# %%
def train_cvae(epochs=100, batch_size=256, learning_rate=3e-3, h_dim=600, z_dim=50, num_classes=10,
               data_dir="./mnist", out_dir=".", seed=0, resume=False, device=None):
    """Trains a CVAE (num_classes=0: a plain VAE) and returns it, with the averaged weights.

    Saves in out_dir: cvae_checkpoint.pth after every epoch, cvae_results/epoch_N.png after every
    tenth and the last, CVAE_loss.png at the end. resume=True continues from the checkpoint, on a
    CPU to the same weights, bit for bit, as if never stopped. Seeds PyTorch. Raises UserError."""
    if epochs < 1 or num_classes not in (0, 10):
        raise UserError(f"epochs must be >= 1 and num_classes 10 or 0, got {epochs}, {num_classes}")
    hyperparameters = dict(learning_rate=float(learning_rate), batch_size=index(batch_size),
                           h_dim=index(h_dim), z_dim=index(z_dim), num_classes=index(num_classes),
                           seed=index(seed))  # index(): numpy's integers become int
    device = pick_device(device)
    path = Path(out_dir).expanduser() / "cvae_checkpoint.pth"
    checkpoint = read_checkpoint(path) if resume else {}
    torch.manual_seed(seed)
    model = CVAE(784, h_dim, z_dim, num_classes).to(device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    states = {"model_state_dict": average, "training_state_dict": model,  # average: to use
              "optimizer_state_dict": optimizer}
    path.with_name("cvae_results").mkdir(parents=True, exist_ok=True)
    dataset, *sets = load_digits(data_dir)
    (images, labels), test_set = [[part.to(device) for part in pair] for pair in sets]
    history = (restore(checkpoint, states, epochs, hyperparameters, dataset) if resume
               else start_over(path))  # restore also loads the weights
    say(f"{dataset}: {len(images):,} training, {len(test_set[0]):,} test images. Device: {device}")
    say(f"{path} is saved after every epoch; use resume=True (--resume) to continue")
    steps = math.ceil(len(images) / batch_size)
    for epoch in range(len(history["test_loss"]) + 1, epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(index(seed) + 1_000_000 * epoch)  # the epoch's own, resumed or not
        optimizer.param_groups[0]["lr"] = float(learning_rate) * min(1, epoch / 2)  # epoch 1: half
        losses = train_epoch(model, optimizer, images, labels, hyperparameters["batch_size"])
        for step, loss in enumerate(losses, start=(epoch - 1) * steps):  # this loop trains
            if step % 10 == 0 or (step + 1) % steps == 0:
                update_average(average, model, step)
                say(f"epoch {step / steps:6.2f}/{epochs}  loss {loss:8.2f}", live=True)
        reconstruction, kl = evaluate(average, images[:10_000], labels[:10_000])
        test_loss = sum(evaluate(average, *test_set))
        if not math.isfinite(reconstruction + kl + test_loss):
            raise UserError(f"The loss is NaN or infinite in epoch {epoch}; "
                            f"try a lower learning_rate (it was {learning_rate})")
        history["train_loss"].append(reconstruction + kl)
        history["reconstruction"].append(reconstruction)
        history["kl"].append(kl)
        history["test_loss"].append(test_loss)
        checkpoint = {name: part.state_dict() for name, part in states.items()}
        checkpoint |= {"epoch": epoch, "hyperparameters": hyperparameters, "dataset": dataset,
                       "history": history}
        save(path, torch.save, checkpoint)
        seconds = time.perf_counter() - start
        say(f"epoch {epoch}/{epochs}  loss {reconstruction + kl:.2f} (reconstruction "
            f"{reconstruction:.2f}, KL {kl:.2f})  test loss {test_loss:.2f}  {seconds:.1f} s  "
            f"{seconds * (epochs - epoch) / 60:.1f} min left")
        if epoch % 10 == 0 or epoch == epochs:
            save_samples(path.parent / f"cvae_results/epoch_{epoch}.png", average, checkpoint)
    save_losses(path.with_name("CVAE_loss.png"), checkpoint)
    return average.eval()

@torch.no_grad()
def evaluate(model, images, labels):
    """images uint8 [N, 784], labels [N] -> mean reconstruction loss and KL, in nats per image."""
    model.eval()
    with mixed_precision(images.device):
        terms = [torch.stack(negative_elbo(model, x / 255, model.one_hot(y)))
                 for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(terms, dim=1).mean(dim=1).tolist()

# %% [markdown]
# ### Draw
# `temperature` multiplies `z`. At 1 the drawings are as varied as the model has learned; towards 0
# they get cleaner and more alike.
# %%
def inference_cvae(input=6, flag=False, temperature=1.0, seed=None, out_dir=".", device=None):
    """Draws the digits 0 to 9 or, with flag=True, ten different drawings of the digit `input`.

    Saves CVAE_0-9.png or, say, CVAE_6.png, and returns its images [10, 1, 28, 28] in [0, 1], on the
    CPU. seed=None: new z's. (`input` and `flag` are an old tutorial's.) Raises UserError."""
    checkpoint, model = load_checkpoint(out_dir)
    if flag and input not in range(model.num_classes):
        raise UserError(f"Cannot draw the digit {input}: the model has {model.num_classes} labels")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(index(seed))  # seed(): random
    z = temperature * torch.randn(10, model.z_dim, generator=generator)
    digits = [input] * 10 if flag else range(10)
    images = generate(model.to(pick_device(device)), z, digits)
    captions = digits if model.num_classes else [""] * 10  # a plain VAE has no labels
    name = f"CVAE_{input if flag else '0-9'}.png"
    save_grid(Path(out_dir).expanduser() / name, images, checkpoint, captions)
    return images

# %% [markdown]
# ### Keep the style, change the digit
# Encode a test digit. The mean of its `z` is its style. Decode it with each of the ten labels. (Not
# every style suits every digit.) A red box marks the reconstruction: the digit's own label.
# %%
@torch.no_grad()
def restyle_cvae(indices=None, data_dir="./mnist", out_dir=".", device=None):
    """Redraws test digits as 0 to 9, each row in the style of its test digit.

    indices: a list of test images; None: the first of each digit. Saves CVAE_styles.png, returns
    its images [rows, 11, 1, 28, 28] in [0, 1], on the CPU: the original, then 0 to 9; of a plain
    VAE, which can only reconstruct, [rows, 2, 1, 28, 28]. Raises UserError or IndexError."""
    checkpoint, model = load_checkpoint(out_dir)
    if checkpoint["dataset"] == BUILT_IN:  # see load_digits
        images, labels = built_in_digits(10_000, seed=1)
    else:
        images, labels = load_digits(data_dir)[2]
    if indices is None:
        indices = [labels.tolist().index(digit) for digit in labels.unique().tolist()]
    if len(indices) == 0:
        raise UserError("indices must not be empty")
    indices = [index(number) for number in indices]
    x, labels = images[indices].view(-1, 1, 28, 28) / 255, labels[indices]
    mu, _ = model.encode(x, model.one_hot(labels))  # on the CPU, where x is
    model.to(pick_device(device))
    captions = list(range(model.num_classes)) or ["redrawn"]
    columns = [generate(model, mu, [digit] * len(x)) for digit in range(len(captions))]
    rows = torch.stack([x, *columns], dim=1)
    boxes = [(row, 1 + label) for row, label in enumerate(labels.tolist()) if model.num_classes]
    save_grid(Path(out_dir).expanduser() / "CVAE_styles.png", rows.flatten(0, 1), checkpoint,
              ["original", *captions], boxes)
    return rows

# %% [markdown]
# ## Appendix: nothing in it is about VAEs
# **Data.** MNIST is 60,000 training images and 10,000 test images, kept as bytes on the device.
# Without MNIST and without a network, digits are made with the fonts of matplotlib.
# %%
BUILT_IN = "built-in digits"

def load_digits(data_dir):
    """Loads MNIST, downloading it if need be, or else makes the built-in digits.

    Returns the name of the data set, (images, labels) to train on, (images, labels) to test on:
    images uint8 [N, 784], labels int64 [N]. Raises UserError or OSError for unusable files."""
    raw = Path(data_dir).expanduser() / "MNIST" / "raw"  # torchvision's layout
    raw.mkdir(parents=True, exist_ok=True)
    names = [name.removesuffix(".gz") for name, md5 in datasets.MNIST.resources]
    if set(names) <= set(os.listdir(raw)) or download_mnist(raw):
        return "MNIST", read_mnist(raw, "train"), read_mnist(raw, "t10k")
    say(f"Using {BUILT_IN} instead. To use MNIST, place these files in {raw}: {' '.join(names)}")
    return BUILT_IN, built_in_digits(60_000, seed=0), built_in_digits(10_000, seed=1)

def download_mnist(raw):
    """Tries torchvision's mirrors, one after the other. Returns True if one had MNIST."""
    timeout = socket.getdefaulttimeout()
    for mirror in datasets.MNIST.mirrors:
        say(f"Downloading MNIST (11 MB) from {mirror} to {raw}")
        try:
            socket.setdefaulttimeout(30)  # seconds; torchvision would wait without end
            with contextlib.redirect_stderr(io.StringIO()):  # no progress bar in log files
                for name, md5 in datasets.MNIST.resources:
                    datasets.utils.download_and_extract_archive(mirror + name, raw, md5=md5)
            return True
        except Exception as error:
            say(f"warning: could not download MNIST: {reason(error)}")
        finally:
            socket.setdefaulttimeout(timeout)

def read_mnist(raw, part):
    try:
        images = datasets.mnist.read_image_file(f"{raw}/{part}-images-idx3-ubyte")
        labels = datasets.mnist.read_label_file(f"{raw}/{part}-labels-idx1-ubyte")
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError(f"{len(labels)} labels to {labels.max()}, images {list(images.shape)}")
    except OSError:  # its message is clear
        raise
    except Exception as error:
        raise UserError(f"Cannot use MNIST's {part} files in {raw}: {reason(error)}; expected "
                        "images of 28 x 28 pixels and as many labels, from 0 to 9") from error
    return images.flatten(1), labels

def built_in_digits(count, seed):
    """Makes digits like MNIST's: images uint8 [count, 784], labels int64 [count]."""
    glyphs, images = [], []
    for name in "DejaVuSans", "cmss10", "cmtt10", "STIXGeneralItalic":
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", 39)
        for digit in "0123456789":
            canvas = Image.new("L", (40, 40))
            ImageDraw.Draw(canvas).text((20, 33), digit, 255, font, anchor="ms")  # middle, baseline
            glyphs.append(pil_to_tensor(canvas) / 255)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(glyphs), [count], generator=generator)
    for part in choice.split(2000):  # `where`: the point that a pixel of the digit is taken from
        matrix = torch.eye(2, 3) + 0.1 * torch.randn(len(part), 2, 3, generator=generator)
        field = 0.07 * torch.randn(len(part), 2, 4, 4, generator=generator)
        bend = F.interpolate(field, size=28, mode="bicubic").permute(0, 2, 3, 1)
        where = F.affine_grid(matrix, [len(part), 1, 28, 28], align_corners=False) + bend
        drawn = F.grid_sample(torch.stack(glyphs)[part], where, align_corners=False).flatten(1)
        images.append((400 * drawn).clamp(max=255).to(torch.uint8))  # bolder than 255 * drawn
    return torch.cat(images), choice % 10  # each font has the glyphs 0 to 9

# %% [markdown]
# **Messages, the device, files, pictures.** A file is written under another name and then renamed.
# So a checkpoint is never half written, whenever the program dies.
# %%
class UserError(ValueError):
    """An error that the user can mend; the message says how."""

def reason(error):
    return str(error).partition("\n")[0] or type(error).__name__

def say(text, live=False):
    """Prints a line; live: one that the next line overwrites, on a terminal only."""
    try:
        if not live or sys.stdout.isatty():
            print(text, end="\r" if live else "\n")
            sys.stdout.flush()
    except UnicodeEncodeError:
        say(ascii(text), live)
    except BrokenPipeError:  # the reader of a pipe has left: end, as other programs do
        raise
    except Exception:  # no stdout, a closed one, one without isatty(): go on
        pass

@torch.enable_grad()  # for the trial below
def pick_device(device=None):
    """Returns the given device; for None an accelerator, if it can compute, else the CPU."""
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    chosen = device or found or "cpu"
    torch.log1p(torch.tensor([-2.0, -1.0, -0.0]))  # until called, the loss is slow on some CPUs
    try:
        weight = torch.ones(2, 2, device=chosen, requires_grad=True)
        (weight @ weight).sum().backward()
        weight.grad.cpu()
        return weight.device
    except Exception as error:
        if device is not None:
            raise UserError(f"Cannot use device {device}: {reason(error)}") from error
        say(f"warning: cannot use {chosen}: {reason(error)}. Using the CPU")
        return torch.device("cpu")

def mixed_precision(device):
    """For `with`: CPUs that can do it multiply matrices in 16 bits (bfloat16), twice as fast."""
    able = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=able and device.type == "cpu")

def save(path, write, *what):
    """Writes a file through write(*what, file), and removes the leftovers of killed runs."""
    content = io.BytesIO()
    write(*what, content)
    unfinished = path.with_name(f"{path.name}.{time.time_ns()}.tmp")
    for attempt in range(10):
        try:
            unfinished.write_bytes(content.getbuffer())
            return os.replace(unfinished, path)
        except OSError:  # a virus scanner has the file open, or another run removed it: try again
            if attempt == 9:
                raise
            time.sleep(0.2)
        finally:
            for leftover in path.parent.glob(f"{path.name}.*.tmp"):
                with contextlib.suppress(OSError):
                    leftover.unlink()

def read_checkpoint(path):
    """Returns the dict in a checkpoint. Runs no code that the file may hold."""
    if not path.exists():
        raise UserError(f"Checkpoint not found: {path}. Train first: python cvae_mnist.py train")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_state_dict"]  # KeyError if there is none
    except OSError:
        raise
    except Exception as error:  # without torch's advice to load unsafe files
        why = reason(error.__context__ or error).partition(". ")[0]
        raise UserError(f"{path} is no checkpoint of tensors and plain values ({why}). "
                        "Move it away, or use another out_dir") from None
    return {"dataset": "unknown data", "epoch": 0, "hyperparameters": {}, **checkpoint}

def load_checkpoint(out_dir):
    """Returns the checkpoint in out_dir, a dict, and its CVAE, on the CPU and in eval mode."""
    checkpoint = read_checkpoint(Path(out_dir).expanduser() / "cvae_checkpoint.pth")
    saved = checkpoint["hyperparameters"]
    sizes = {name: saved[name] for name in saved.keys() & {"h_dim", "z_dim", "num_classes"}}
    model = CVAE(784, **sizes)
    model.load_state_dict(checkpoint["model_state_dict"])
    return checkpoint, model.eval()

def restore(checkpoint, states, epochs, hyperparameters, dataset):
    """Loads the state of training and returns the history. UserError if the settings differ."""
    saved = {"dataset": checkpoint["dataset"], **checkpoint["hyperparameters"]}
    here = {"dataset": dataset, **hyperparameters}
    different = [f"{name} is {saved.get(name)} in the checkpoint but {here[name]} here"
                 for name in here if saved.get(name) != here[name] and name != "learning_rate"]
    if checkpoint["epoch"] > epochs:
        different.append(f"the checkpoint has {checkpoint['epoch']} epochs, more than {epochs}")
    if different:
        raise UserError(f"Cannot resume: {'; '.join(different)}")
    if saved["learning_rate"] != here["learning_rate"]:
        say(f"learning_rate is now {here['learning_rate']}, it was {saved['learning_rate']}")
    for name, part in states.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["history"]

def start_over(path):
    """Returns an empty history. Copies the checkpoint, unless an earlier copy has more epochs."""
    old = path.with_suffix(".old.pth")
    if path.exists():
        checkpoint = read_checkpoint(path)
        if not old.exists() or checkpoint["epoch"] >= read_checkpoint(old)["epoch"]:
            save(old, torch.save, checkpoint)
        say(f"warning: {path} exists and will be overwritten; {old} keeps the longest earlier run")
    return {"train_loss": [], "reconstruction": [], "kl": [], "test_loss": []}

def save_figure(path, figure, checkpoint):
    name = "CVAE" if checkpoint["hyperparameters"].get("num_classes", 10) else "VAE"
    title = f"{name} on {checkpoint['dataset']}, epoch {checkpoint['epoch']}"
    figure.suptitle(title)
    save(path, figure.savefig)
    say(f"Saved {path}: {title}")
    if "ipykernel" in sys.modules:  # in a notebook
        from IPython import display
        display.display(display.Image(filename=str(path)))

@style.context("default")  # whatever a matplotlibrc says
def save_grid(path, images, checkpoint, captions, boxes=()):
    """Saves images [N, 1, 28, 28], a caption above each column, a red box at some (row, column)."""
    columns = len(captions)
    figure = Figure((max(columns, 5), len(images) / columns + 0.7), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(make_grid(images, nrow=columns)[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(frame_on=False, yticks=[])
    axes.set_xticks([16 + 30 * column for column in range(columns)], captions)  # 2 pixels between
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for row, column in boxes:
        corner = (30 * column + 1, 30 * row + 1)
        axes.add_patch(patches.Rectangle(corner, 29, 29, fill=False, color="tab:red", linewidth=2))
    save_figure(path, figure, checkpoint)

def save_samples(path, model, checkpoint):
    """A column per digit, a row per style; of a plain VAE, a hundred random digits."""
    z = torch.randn(100, model.z_dim, generator=torch.Generator().manual_seed(0))
    if model.num_classes:
        z = z[:10].repeat_interleave(10, dim=0)
    images = generate(model, z, [*range(10)] * 10)
    save_grid(path, images, checkpoint, range(model.num_classes) or [""] * 10)

@style.context("default")
def save_losses(path, checkpoint):
    figure = Figure((6, 7), dpi=100, layout="constrained")
    panels = figure.subplot_mosaic([["loss"], ["reconstruction"], ["kl"]], sharex=True,
                                   height_ratios=(3, 1, 1))
    for name, losses in checkpoint["history"].items():
        axes = panels.get(name, panels["loss"])  # train_loss and test_loss share one
        axes.plot(range(1, len(losses) + 1), losses, ".-", label=f"{name}: {losses[-1]:.2f}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supxlabel("epoch")
    figure.supylabel("nats per image")
    save_figure(path, figure, checkpoint)

def open_windows(paths):
    """Opens pictures in windows, where there is a screen; returns when they are closed."""
    from matplotlib import pyplot as plt
    for path in paths:
        figure = plt.figure(path.name)
        if figure.canvas.required_interactive_framework is None:  # no screen
            return plt.close(figure)
        figure.figimage(plt.imread(path), resize=True)
    plt.show()

# %% [markdown]
# ### The command line
# %%
def at_least(low, kind):
    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {low}, got {text}")
        return kind(text)
    return number

def make_parser():
    train = inspect.signature(train_cvae).parameters
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)  # functions have defaults
    add, positive = parser.add_argument, at_least(1, int)
    add("step", nargs="?", choices=["train", "draw", "restyle"], default=None, help="[all three]")
    add("--epochs", type=positive, help=f"number of epochs [{train['epochs'].default}]")
    add("--batch-size", type=positive, help=f"images per step [{train['batch_size'].default}]")
    add("--learning-rate", type=at_least(1e-9, float), help=f"[{train['learning_rate'].default}]")
    add("--h-dim", type=positive, help=f"size of the hidden layers [{train['h_dim'].default}]")
    add("--z-dim", type=positive, help=f"latent dimensions [{train['z_dim'].default}]")
    add("--num-classes", type=int, choices=[10, 0], help="0: a plain VAE, without labels [10]")
    add("--resume", action="store_true", help="continue from the checkpoint")
    add("--digit", dest="input", type=int, choices=range(10), help="draw this digit only")
    add("--temperature", type=at_least(0, float), help="scale of z "
        f"[{inspect.signature(inference_cvae).parameters['temperature'].default}]")
    add("--seed", type=int, help=f"of training [{train['seed'].default}]; of drawing [at random]")
    add("--data-dir", help=f"directory of MNIST [{train['data_dir'].default}]")
    add("--out-dir", help=f"output directory [{train['out_dir'].default}]")
    add("--device", help="cpu, cuda, mps, ... [an accelerator, or else the CPU]")
    return parser

def main(arguments):
    """Runs the command line; with no arguments, the whole job."""
    start = time.time()
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    step = given.pop("step")
    if given.get("num_classes") == 0 and "input" in given:
        parser.error("argument --digit: not allowed with --num-classes 0")
    def options(function):
        names = inspect.signature(function).parameters
        for name in given:
            if step and name not in names:
                option = name.replace("_", "-").replace("input", "digit")
                parser.error(f"argument --{option}: not allowed with {step}")
        return {name: given[name] for name in given if name in names}
    out_dir = Path(given.get("out_dir", ".")).expanduser()
    if step in (None, "train"):
        train_cvae(**options(train_cvae))
    if step in (None, "draw"):
        draw = options(inference_cvae)
        if "input" in given or load_checkpoint(out_dir)[1].num_classes:
            inference_cvae(flag=True, **draw)
        if "input" not in given:
            inference_cvae(**draw)
    if step in (None, "restyle"):
        restyle_cvae(**options(restyle_cvae))
    try:
        open_windows(path for path in out_dir.glob("CVAE_*.png") if path.stat().st_mtime >= start)
    except Exception as error:
        say(f"Cannot open windows: {reason(error)}. The pictures are in {out_dir.resolve()}")

# %% [markdown]
# ### Run
# This cell starts the whole job. To continue after a restart of the notebook's kernel, run all
# cells but this one, and then `train_cvae(resume=True)`.
# %%
if __name__ == "__main__":
    if os.path.realpath(sys.argv[0]) != os.path.realpath(globals().get("__file__", "")):
        main([])  # in a notebook, whose sys.argv is not for us
    else:
        try:
            main(sys.argv[1:])
        except BrokenPipeError:  # whoever read our output has left
            os._exit(1)  # without Python's complaint that it cannot write
        except (UserError, OSError) as error:
            sys.exit(f"cvae_mnist.py: error: {error}")
        except KeyboardInterrupt:
            sys.exit("\nInterrupted")
