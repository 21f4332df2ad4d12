# %% [markdown]
# # Handwritten digits with a conditional VAE
# A variational autoencoder (VAE) has two parts. The *encoder* describes an image by a short list of
# numbers, the *latent* (hidden) *vector* `z`. The *decoder* turns a `z` back into an image. They
# are trained together to return the image that the encoder was given. In a *conditional* VAE (CVAE)
# both are also given the label `c`: which digit it is. So `z` need only describe the style: slant,
# width, thickness. In the end, any label and a random `z` give a new digit.
# ```text
# to train           encoder                                     decoder
#  image x ───┐                ┌─► mu ──────┐
#             ├─► 600 ReLUs ───┤            ├─► z = mu + std * noise ──┐
#  label c ─┬─┘                └─► log_var ─┘                          ├─► 600 ReLUs ───► image
#           └──────────────────────────────────────────────────────────┘
# to draw                                     z = noise ──┐
#                                             label c ────┴─► 600 ReLUs ───► image
# ```
# Part 1 is the idea. Part 2 trains a model and draws with it: run the file and, after 5 to 15
# minutes without a GPU, look at new digits. The appendix is the rest. The file is a notebook, too:
# each `# %%` begins a cell, and only the last one starts training.
# %%
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib>=3.8"]
# ///
import argparse
import copy
import inspect
import io
import math
import os
import re
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # beside a busy program, 12 times as fast
import torch
import torch.nn.functional as F
from matplotlib import get_data_path, patches, style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets, transforms, utils

torch.log1p(torch.tensor(-0.0))  # makes the loss 2.7 times as fast on CPUs with AVX-512
BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # has it?


# %% [markdown]
# ## Part 1: the idea
# An image `x` is 28 x 28 = 784 gray values from 0 (black) to 1 (white). A label `c` is *one-hot*:
# ten numbers, 1 in the digit's place and 0 elsewhere. It is appended to `x` and to `z`. We treat
# pixels as black or white: a gray value of 0.3 means white with probability 0.3. The decoder
# returns each pixel's probability of being white. A drawing shows it as a gray value, black on
# white: the mean of all images that share this `z` and `c`, so it can look faint or blurred.
#
# The encoder does not return one point `z` but a normal distribution over `z`, with a mean `mu` and
# a variance for each of the 50 latent dimensions. Why? If it returned points, nothing would make
# the points between them decode to digits. With a distribution, a new `z` near the mean is sampled
# each time an image is used, and the decoder must return the image from all of them. The loss
# (below) makes it costly for a distribution to differ from the standard normal: to have a mean far
# from 0 or a variance far from 1. So the distributions overlap and together roughly cover the
# region where standard normal `z` fall. After training, most `z` from there decode to a digit.
# (Holes remain: some drawings are broken.) A variance is positive, but a layer may return any
# number. So the encoder returns the logarithm of the variance, `log_var`.
#
# In training, `z` is sampled from this distribution. But gradients cannot pass through sampling to
# `mu` and `log_var`. Hence the *reparameterization trick*: take standard normal noise, multiply it
# by `std` = exp(`log_var` / 2), the root of the variance, and add `mu`.
# %%
class CVAE(nn.Module):
    """A VAE with labels; num_classes=0: without. Kingma and Welling, Auto-Encoding Variational
    Bayes, 2014; with labels: Kingma et al., Semi-supervised Learning with Deep Generative Models,
    2014 (model M2, with all labels known)."""

    def __init__(self, input_dim=784, h_dim=600, z_dim=50, num_classes=10):
        super().__init__()
        self.z_dim = z_dim
        self.num_classes = num_classes
        self.fc1 = nn.Linear(input_dim + num_classes, h_dim)  # encoder
        self.fc2 = nn.Linear(h_dim, z_dim)  # mean
        self.fc3 = nn.Linear(h_dim, z_dim)  # log-variance
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)  # decoder
        self.fc5 = nn.Linear(h_dim, input_dim)  # pixels
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)  # lower loss than PyTorch's default
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def one_hot(self, labels):
        """labels [B], int64 -> c [B, num_classes]: 1 in the label's column, 0 elsewhere."""
        if self.num_classes == 0:
            return torch.zeros(len(labels), 0, device=labels.device)  # nothing to append
        return F.one_hot(labels, self.num_classes).float()

    def encode(self, x, c):
        """x [B, 784] or [B, 1, 28, 28] in [0, 1], c [B, num_classes] -> mu, log_var [B, z_dim]."""
        h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))
        return self.fc2(h).to(x.dtype), self.fc3(h).to(x.dtype)  # if autocast made them 16 bits

    def reparameterize(self, mu, log_var):
        """mu, log_var [B, z_dim] -> z [B, z_dim], sampled from this normal distribution."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def decode_logits(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> logits [B, 784], the pixels before the sigmoid."""
        return self.fc5(F.relu(self.fc4(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> images [B, 784] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z, c))

    def forward(self, x, c):
        """The usual interface, not used here: logits make the loss more precise, and faster."""
        mu, log_var = self.encode(x, c)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var


# %% [markdown]
# ### The loss
# As probabilities, the model is a prior and a decoder; the encoder helps to train it. The *prior*
# p(z) is what we assume of `z` before we see an image: standard normal, the same for every label,
# so that a style can be kept while the label changes. The decoder is p(x|z,c), the probability of
# `x`, given `z` and `c`: each pixel is white with a probability of its own. The encoder is
# q(z|x,c): independent normals with mean `mu` and variance exp(`log_var`).
#
# A model that makes the training images probable draws images like them. So training should raise
# log p(x|c). (Probabilities of images multiply, their logs add.) But p(x|c) sums over all `z`, and
# we would have to try far too many, since hardly any random `z` fits a given image. The encoder
# learns which ones do. With E for the mean over `z` sampled from q:
# ```text
# p(x|c) = sum over z of p(z) p(x|z,c)                              an integral, to be exact
#        = sum over z of q(z|x,c) [ p(z) p(x|z,c) / q(z|x,c) ]      times q, divided by q
#        = E[ p(z) p(x|z,c) / q(z|x,c) ]                            the mean over q
# log p(x|c) >= E[ log( p(z) p(x|z,c) / q(z|x,c) ) ]                Jensen: log(mean) >= mean(log)
#             = E[ log p(x|z,c) ] - KL                              KL = E[ log( q(z|x,c) / p(z) ) ]
# ```
# This is the *evidence lower bound* (ELBO; the evidence is p(x|c)). KL, the *Kullback-Leibler
# divergence* of q from the prior, tells how much they differ: 0 if they are equal, else more. The
# gap in `>=` is the KL divergence of q from p(z|x,c), the *posterior*, which says how probable each
# `z` is once `x` is known. To find the closest q in a family, here normals, is *variational
# inference*.
#
# We minimize -ELBO, the sum of two terms. The first, -E[ log p(x|z,c) ], is the *reconstruction
# loss*. For a pixel with gray value g in the image and w from the decoder it is the *binary
# cross-entropy*, -g log w - (1-g) log(1-w): the mean over white, with probability g, and black. It
# is lowest at w = g, but not 0 there if g is gray. (Squared error would follow from a normal
# p(x|z,c).) The second term is KL. To tell images apart, their q must overlap less: be narrower or
# farther from 0, and both cost. So the two terms pull against each other. To tell the digit through
# `z` would cost KL, while `c` tells it for free: so `z` holds the style.
#
# For the first term, one sample of `z` per image is enough: the noise averages out over many steps.
# The second has a formula: (mu² + var - 1 - log var) / 2 for each latent dimension. One that does
# not help the decoder ends at mu = 0, var = 1, where it is 0. Pixels (given `z` and `c`) and latent
# dimensions are independent in this model, so both terms are sums. Sums, not means: a mean over the
# pixels beside a sum over the dimensions would weaken the first term 784 times, and `z` would say
# nothing (*posterior collapse*). The unit, with natural logarithms, is the *nat*.
# %%
def negative_elbo(model, x, c):
    """x [B, 784] or [B, 1, 28, 28], c [B, num_classes] -> reconstruction loss [B], KL [B].

    In nats. Kingma and Welling, section 2.2 (the bound) and appendix B (KL of two normals).
    The cross-entropy of logits avoids log(0) where a probability is rounded to 0 or 1."""
    mu, log_var = model.encode(x, c)
    logits = model.decode_logits(model.reparameterize(mu, log_var), c)
    losses = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none")
    kl = (mu**2 + log_var.exp() - 1 - log_var) / 2
    return losses.sum(dim=1), kl.sum(dim=1)


# %% [markdown]
# ### Training
# A step on B images: find the gradient of their mean loss, move the weights a little against it.
# %%
def train_step(model, optimizer, x, c):
    """x [B, 784], c [B, num_classes] -> the batch's loss before the step, in nats per image."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):  # 16 bits where they are faster
        reconstruction, kl = negative_elbo(model, x, c)
    loss = (reconstruction + kl).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# %% [markdown]
# To draw, the encoder is not needed. Sample `z` from the prior, choose labels, decode.
# %%
@torch.no_grad()
def generate(model, z, labels):
    """z [N, z_dim] and N labels (integers) -> images [N, 1, 28, 28] in [0, 1], on the CPU."""
    c = model.one_hot(torch.as_tensor(labels, device="cpu"))  # a wrong one would crash CUDA
    device = next(model.parameters()).device
    return model.decode(z.to(device), c.to(device)).reshape(-1, 1, 28, 28).cpu()


# %% [markdown]
# That is the whole idea. To try it in a notebook, run all cells but the last, then these lines. (An
# *epoch* uses every training image once, in random order, a batch at a time.)
# ```python
# name, (images, labels), test = load_images("./mnist")  # from the appendix; downloads MNIST
# model = CVAE()
# optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
# for epoch in range(10):  # about a minute on two CPU cores
#     losses = []
#     for indices in torch.randperm(len(images)).split(256):
#         x = images[indices] / 255
#         losses.append(train_step(model, optimizer, x, model.one_hot(labels[indices])))
#     print(epoch + 1, torch.stack(losses).mean().item())
# model.eval()  # changes nothing here; with Dropout or BatchNorm it must come before you draw
# grid = utils.make_grid(generate(model, torch.randn(10, model.z_dim), range(10)), nrow=10)
# Image.fromarray((255 * (1 - grid[0])).byte().numpy())  # shows the digits, black on white
# ```
# On MNIST the losses fall from 167 to 101. (The first step's loss is 784 ln 2 = 543: every pixel at
# 1/2.) `evaluate(model, *test)`, see below, gives the two terms: 81 and 20. Try it: in `loss = ...`
# of `train_step`, write `0 * kl` for `kl`. They end at 57 and 700, and drawings are scribbles: no
# `z` from the prior is like those the decoder was trained on. With `10 * kl`, they end at 146 and
# 1.4: `z` says almost nothing, and drawings are blurred and alike.
#
# ## Part 2: train, then draw
# With a constant learning rate the weights keep moving around an optimum. Their mean over many
# steps is closer to it. So a second model, `average`, has the mean of the weights over all steps,
# in which the last tenth of the steps counts for two thirds. It is used to evaluate, save and draw.
# Without it, the test loss after ten epochs is 100.4 instead of 98.0. To evaluate, take the mean
# loss of many images. `z` is sampled there, too: with `z` = `mu` the loss would be no bound.
# %%
@torch.no_grad()
def update_average(average, model, step):
    """Polynomial-decay averaging with eta = 9 (Shamir and Zhang 2013); step: 0, 1, 2, ..."""
    means = average.state_dict()  # not a copy: what changes below are the weights of `average`
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # not BatchNorm's counter, if you add a BatchNorm
            means[name].lerp_(value, 10 / (10 + step))


@torch.no_grad()
def evaluate(model, images, labels):
    """images uint8 [N, 784], labels [N] -> mean reconstruction loss and KL, in nats per image."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        terms = negative_elbo(model, images / 255, model.one_hot(labels))
    return [term.mean().item() for term in terms]


# %% [markdown]
# ### Train
# These are the two loops of above. After each epoch the averaged model is evaluated on the test
# images and on 10,000 training images; the gap between the curves in `CVAE_loss.png` is what does
# not generalize. `cvae_checkpoint.pth` is saved after each epoch and, every ten epochs and at the
# end, a picture in `cvae_results`: a row per style, a column per digit (all equal in a plain VAE).
# %%
def train_cvae(
    epochs=100,
    batch_size=256,
    learning_rate=3e-3,
    h_dim=600,
    z_dim=50,
    num_classes=10,
    dataset="MNIST",
    data_dir="./mnist",
    out_dir=".",
    seed=0,
    resume=False,
    device=None,
):
    """Trains a CVAE (num_classes=0: a plain VAE); returns it, with averaged weights, in eval mode.

    dataset: see load_images. device: None for an accelerator, if it works. resume=True continues
    from the checkpoint to `epochs` in all; on a CPU, with as many threads as before, bit for bit as
    if never stopped. Seeds PyTorch. Raises UserError."""
    for size in epochs, batch_size, h_dim, z_dim:
        if not range(size):  # which is a TypeError if it is no integer
            raise UserError(f"epochs, batch_size, dimensions must be positive integers, got {size}")
    if num_classes not in (10, 0):
        raise UserError(f"num_classes must be 10 or 0, got {num_classes}")
    # plain numbers: torch.load would refuse numpy's
    batch_size, learning_rate, seed = int(batch_size), float(learning_rate), int(seed)
    sizes = {"h_dim": int(h_dim), "z_dim": int(z_dim), "num_classes": int(num_classes)}
    hyperparameters = dict(batch_size=batch_size, learning_rate=learning_rate, seed=seed, **sizes)
    device = pick_device(device)
    path = Path(out_dir).expanduser() / "cvae_checkpoint.pth"
    torch.manual_seed(seed)
    model = CVAE(**sizes).to(device)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    history = {name: [] for name in ("train_loss", "reconstruction", "kl", "test_loss")}
    if resume:
        checkpoint = read_checkpoint(path)
        check_resume(checkpoint, hyperparameters, epochs)
        average.load_state_dict(checkpoint["model_state_dict"])
        model.load_state_dict(checkpoint["training_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        history = checkpoint["history"]
        saved = checkpoint["hyperparameters"]["learning_rate"]
        if saved != learning_rate:
            print(f"learning_rate was {saved} and is {learning_rate} from now on")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
    elif path.exists():
        old = read_checkpoint(path)
        print(f"{path} (epoch {old.get('epoch')}) will be replaced and kept as {path.stem}.old.pth")
    pictures = path.with_name("cvae_results")
    pictures.mkdir(parents=True, exist_ok=True)
    dataset, train_set, test_set = load_images(data_dir, dataset)
    hyperparameters["dataset"] = dataset
    if resume:
        check_resume(checkpoint, hyperparameters, epochs)  # once more, with the data set's name
    images, labels = [part.to(device) for part in train_set]
    test_set = [part.to(device) for part in test_set]
    print(f"{dataset}: {len(images):,} training, {len(test_set[0]):,} test images, on {device}")
    print(f"{path} is saved after every epoch; use --resume (resume=True) to continue")
    styles = torch.randn(10, model.z_dim, generator=torch.Generator().manual_seed(0))
    for epoch in range(len(history["test_loss"]) + 1, epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(seed + 1_000_000 * epoch)  # so a resumed run samples the same
        batches = torch.randperm(len(images), device=device).split(batch_size)
        for step, indices in enumerate(batches, start=(epoch - 1) * len(batches)):
            train_step(model, optimizer, images[indices] / 255, model.one_hot(labels[indices]))
            update_average(average, model, step)
        reconstruction, kl = evaluate(average, images[:10_000], labels[:10_000])
        train_loss = reconstruction + kl
        test_loss = sum(evaluate(average, *test_set))
        if not math.isfinite(train_loss + test_loss):
            raise UserError(f"The loss is NaN or infinite in epoch {epoch}; lower learning_rate")
        history["train_loss"].append(train_loss)
        history["reconstruction"].append(reconstruction)
        history["kl"].append(kl)
        history["test_loss"].append(test_loss)
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": average.state_dict(),  # the one to use
            "training_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "hyperparameters": hyperparameters,
            "history": history,
        }
        save_checkpoint(path, checkpoint)
        seconds = time.perf_counter() - start
        minutes = seconds * (epochs - epoch) / 60
        print(
            f"epoch {epoch}/{epochs}  loss {train_loss:.2f} (reconstruction {reconstruction:.2f}, "
            f"KL {kl:.2f})  test loss {test_loss:.2f}  {seconds:.1f} s  {minutes:.1f} min left",
            flush=True,
        )
        if epoch % 10 == 0 or epoch == epochs:
            drawn = generate(average, styles.repeat_interleave(10, dim=0), [*range(10)] * 10)
            save_grid(pictures / f"epoch_{epoch}.png", drawn, checkpoint, range(10))
    save_losses(path.with_name("CVAE_loss.png"), checkpoint)
    return average


# %% [markdown]
# ### Draw
# `temperature` multiplies `z`. At 1 the drawings are as varied as the model has learned; towards 0
# they get cleaner and more alike.
# %%
def inference_cvae(input=6, flag=False, temperature=1.0, seed=None, out_dir="."):
    """Draws the digits 0 to 9 or, with flag=True, ten of the digit `input`. Raises UserError.

    Saves CVAE_0-9.png or, say, CVAE_6.png, and returns its images [10, 1, 28, 28] in [0, 1], on the
    CPU. seed=None: new z's. (`input` and `flag` are an old tutorial's names.)"""
    checkpoint, model = load_checkpoint(out_dir)
    if seed is None:
        seed = torch.Generator().seed()  # a random one
    generator = torch.Generator().manual_seed(int(seed))
    digits = [input] * 10 if flag else range(10)
    z = temperature * torch.randn(10, model.z_dim, generator=generator)
    images = generate(model, z, digits)
    name = f"CVAE_{input}.png" if flag else "CVAE_0-9.png"
    save_grid(Path(out_dir).expanduser() / name, images, checkpoint, digits)
    return images


# %% [markdown]
# ### Keep the style, change the digit
# Encode a test digit. The mean of its `z` is its style. Decode it with each of the ten labels. (Not
# every style suits every digit.) A red box marks the reconstruction: the digit's own label.
# %%
@torch.no_grad()
def restyle_cvae(indices=None, data_dir="./mnist", out_dir="."):
    """Redraws test digits as 0 to 9, each row in the style of its test digit. Raises UserError.

    indices: a list of test images; None: the first of each digit. Saves CVAE_styles.png, returns
    its images [rows, 11, 1, 28, 28] in [0, 1], on the CPU: the original, then 0 to 9."""
    checkpoint, model = load_checkpoint(out_dir)
    dataset = checkpoint["hyperparameters"].get("dataset", "missing in the checkpoint")
    name, _, (images, labels) = load_images(data_dir, dataset)
    if name != dataset:
        raise UserError(f"Cannot restyle: the model was trained on {dataset}, not on {name}")
    if indices is None:
        indices = [labels.tolist().index(digit) for digit in range(10)]
    x = images[indices] / 255
    labels = labels[indices]
    mu, _ = model.encode(x, model.one_hot(labels))
    columns = [generate(model, mu, [digit] * len(x)) for digit in range(10)]
    rows = torch.stack([x.view(-1, 1, 28, 28), *columns], dim=1)
    path = Path(out_dir).expanduser() / "CVAE_styles.png"
    save_grid(path, rows.flatten(0, 1), checkpoint, ["original", *range(10)], 1 + labels)
    return rows


# %% [markdown]
# ### To change things
# - *Other data*, 28 x 28 pixels with labels from 0 to 9: write another `load_images`.
# - *Other layers:* change `__init__`, `encode` and `decode_logits` in `CVAE`.
# - *Another loss*, or another weight of KL: change `train_step`.
# - *A new option of training:* add it to `train_cvae`'s arguments, to `hyperparameters` and to
#   `main`; one of the model also to `CVAE` and to `sizes` in `train_cvae` and `load_checkpoint`.
#
# ## Appendix: nothing in it is about VAEs
# **Data.** A set has 60,000 training images and 10,000 test images, kept as bytes on the device.
# The built-in digits are made with the fonts of matplotlib.
# %%
BUILT_IN = "built-in digits"
DATASETS = ["MNIST", "FashionMNIST", "KMNIST", BUILT_IN]  # torchvision's, of ten classes, and ours


def load_images(data_dir, dataset="MNIST"):
    """Returns the data set's name, (images, labels) to train on, (images, labels) to test on.

    images: uint8 [N, 784], labels: int64 [N]. Downloads the set if need be. If the network does not
    give MNIST, built-in digits stand in. Raises UserError for files that it cannot get or use."""
    if dataset == BUILT_IN:
        return BUILT_IN, built_in_digits(60_000, seed=0), built_in_digits(10_000, seed=1)
    if dataset not in DATASETS:
        raise UserError(f"dataset is {dataset}; it must be one of {', '.join(DATASETS)}")
    torchvision_class = getattr(datasets, dataset)
    root = Path(data_dir).expanduser()
    raw = root / dataset / "raw"
    files = [name.removesuffix(".gz") for name, _ in torchvision_class.resources]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait without end
    try:
        parts = []
        for train in True, False:
            part = torchvision_class(root, train, download=True)
            images, labels = part.data, part.targets
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                found = f"{len(labels)} labels up to {labels.max()}, images {list(images.shape)}"
                raise ValueError(f"expected labels up to 9, images of 28 x 28, found {found}")
            parts.append((images.flatten(1), labels))
        return dataset, *parts
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        offline = isinstance(error, (RuntimeError, TimeoutError, ConnectionError, HTTPException))
        if not offline or all(os.path.isfile(raw / name) for name in files):
            raise UserError(f"Cannot use {dataset} in {raw}: {reason}") from error
        advice = f"To use {dataset}, place these files in {raw}: {' '.join(files)}"
        if dataset != "MNIST":
            raise UserError(f"Cannot download {dataset}: {reason}. {advice}") from error
        print(f"Cannot download MNIST: {reason}. Using {BUILT_IN} instead. {advice}")
        return load_images(data_dir, BUILT_IN)
    finally:
        socket.setdefaulttimeout(timeout)


def built_in_digits(count, seed):
    """Makes digits like MNIST's: images uint8 [count, 784], labels int64 [count]."""
    glyphs = []
    for name in "DejaVuSans", "cmss10", "cmtt10", "STIXGeneralItalic":
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", 27)
        for digit in "0123456789":
            canvas = Image.new("L", (28, 28))
            ImageDraw.Draw(canvas).text((14, 23), digit, 255, font, anchor="ms")  # middle, baseline
            glyphs.append(transforms.functional.pil_to_tensor(canvas) / 255)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(40, [count], generator=generator)
    spread = torch.tensor([0.12, 0.12, 0.05])  # turned and stretched more than shifted
    matrix = torch.eye(2, 3) + spread * torch.randn(count, 2, 3, generator=generator)
    grid = F.affine_grid(matrix, [count, 1, 28, 28], align_corners=False)
    drawn = F.grid_sample(torch.stack(glyphs)[choice], grid, align_corners=False)
    images = (400 * drawn).clamp(max=255).byte()  # bolder than 255 * drawn
    return images.flatten(1), choice % 10  # each font has the glyphs 0 to 9


# %% [markdown]
# **The device and the checkpoint.** A checkpoint is written under another name and then renamed. So
# it is never half written, whenever the program dies.
# %%
class UserError(ValueError):
    """An error that the user can mend. On the command line it is one line, without a traceback."""


def pick_device(device=None):
    """Returns the given device; for None an accelerator, if it can compute, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        matrix = torch.ones(2, 2, device=device or found)
        (matrix @ matrix).cpu()  # old GPUs are seen, but cannot compute
        return matrix.device
    except Exception as error:
        if device:
            raise UserError(f"Cannot use device {device}: {str(error).splitlines()[0]}") from error
        print(f"warning: cannot use {found}: {str(error).splitlines()[0]}. Using the CPU")
        return torch.device("cpu")


def save_checkpoint(path, checkpoint):
    """Puts a checkpoint in place, whole; a new run's first one renames the one that is there."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    unfinished = Path(f"{path}.{os.getpid()}.tmp")  # two runs, two files
    unfinished.write_bytes(content.getbuffer())
    if checkpoint["epoch"] == 1 and path.exists():
        rename(path, path.with_suffix(".old.pth"))
    rename(unfinished, path)


def rename(old, new):
    """os.replace, tried for two seconds: on Windows a virus scanner may have the file open."""
    for _ in range(20):
        try:
            return os.replace(old, new)
        except PermissionError:
            time.sleep(0.1)
    os.replace(old, new)


def read_checkpoint(path):
    """Returns the dict in a checkpoint. Runs no code that the file may hold."""
    old = path.with_suffix(".old.pth")
    if not path.exists():
        hint = f"The one before is {old}" if old.exists() else "Train first"
        raise UserError(f"Checkpoint not found: {path}. {hint}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_state_dict"]
    except OSError:
        raise
    except Exception as error:  # without its text, which may advise to load unsafe files
        reason = f"damaged or not a checkpoint ({type(error).__name__}); move it away"
        raise UserError(f"Cannot read {path}: {reason}") from None
    return {"hyperparameters": {}, **checkpoint}


def load_checkpoint(out_dir):
    """Returns the checkpoint in out_dir, a dict, and its CVAE, on the CPU and in eval mode."""
    checkpoint = read_checkpoint(Path(out_dir).expanduser() / "cvae_checkpoint.pth")
    saved = checkpoint["hyperparameters"]
    sizes = {"h_dim", "z_dim", "num_classes"} & saved.keys()
    model = CVAE(**{name: saved[name] for name in sizes})
    model.load_state_dict(checkpoint["model_state_dict"])
    return checkpoint, model.eval()


def check_resume(checkpoint, hyperparameters, epochs):
    """Raises UserError unless a run with these hyperparameters can continue from the checkpoint."""
    problems = []
    for name, here in hyperparameters.items():
        saved = checkpoint["hyperparameters"].get(name, "missing")
        if saved != here and name != "learning_rate":
            problems.append(f"{name} is {saved} in the checkpoint but {here} here")
    if checkpoint.get("epoch", 0) > epochs:
        problems.append(f"epochs is {epochs} but the checkpoint has {checkpoint['epoch']}")
    if problems:
        raise UserError(f"Cannot resume: {'; '.join(problems)}")


# %% [markdown]
# **Pictures and the command line.** Pictures look the same whatever the user's matplotlibrc says.
# %%
def save_figure(path, figure, checkpoint):
    """Saves a figure; in a notebook, shows it."""
    dataset = checkpoint["hyperparameters"].get("dataset", "unknown data")
    figure.suptitle(f"{dataset}, epoch {checkpoint.get('epoch')}")
    figure.savefig(path)
    print(f"Saved {path}")
    if "ipykernel" in sys.modules:
        from IPython import display

        display.display(display.Image(filename=str(path)))


@style.context("default")
def save_grid(path, images, checkpoint, captions, boxes=()):
    """Saves images [N, 1, 28, 28] under captions; boxes: in each row, the column to box in red."""
    columns = len(captions)
    if checkpoint["hyperparameters"].get("num_classes") == 0:  # a plain VAE has no labels to show
        captions, boxes = [""] * columns, []
    figure = Figure((columns, len(images) / columns + 0.7), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(utils.make_grid(images, nrow=columns)[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(frame_on=False, yticks=[])
    axes.set_xticks(range(16, 30 * columns, 30), captions)  # an image has 28 pixels, a gap 2
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for row, column in enumerate(boxes):
        corner = (30 * column + 1, 30 * row + 1)
        axes.add_patch(patches.Rectangle(corner, 29, 29, fill=False, color="tab:red", linewidth=2))
    save_figure(path, figure, checkpoint)


@style.context("default")
def save_losses(path, checkpoint):
    """Saves the loss per epoch on training and on test images and, apart, its two terms."""
    figure = Figure((6, 7), dpi=100, layout="constrained")
    loss, reconstruction, kl = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    panels = {"train_loss": loss, "test_loss": loss, "reconstruction": reconstruction, "kl": kl}
    for name, axes in panels.items():
        losses = checkpoint["history"][name]
        axes.plot(range(1, len(losses) + 1), losses, ".-", label=f"{name}: {losses[-1]:.2f}")
        axes.grid(True)
        axes.legend()
    figure.supxlabel("epoch")
    figure.supylabel("nats per image")
    save_figure(path, figure, checkpoint)


def main(arguments):
    """Runs the command line; with no arguments, the whole job."""
    parameters = inspect.signature(train_cvae).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    seed = defaults.pop("seed")
    parser = argparse.ArgumentParser(description="Train a CVAE on images of digits; draw with it.")
    parser.set_defaults(**defaults)
    add = parser.add_argument
    add("job", nargs="?", choices=["train", "draw", "restyle"], help="what to do [all three]")
    add("--epochs", type=int, help="number of epochs in all [%(default)s]")
    add("--batch-size", type=int, help="images per step [%(default)s]")
    add("--learning-rate", type=float, help="step size of Adam [%(default)s]")
    add("--h-dim", type=int, help="size of the hidden layers [%(default)s]")
    add("--z-dim", type=int, help="latent dimensions [%(default)s]")
    add("--num-classes", type=int, help="10, or 0 for a plain VAE without labels [%(default)s]")
    add("--dataset", choices=DATASETS, help="what to train on [%(default)s]")
    add("--data-dir", help="directory of the data sets [%(default)s]")
    add("--out-dir", help="directory of all that is saved [%(default)s]")
    add("--resume", action="store_true", help="continue from the checkpoint")
    add("--device", help="cpu, cuda, mps, ... [an accelerator that works, else cpu]")
    add("--seed", type=int, default=argparse.SUPPRESS, help=f"to train [{seed}], to draw [random]")
    add("--digit", type=int, choices=range(10), help="draw this digit only")
    add("--temperature", type=float, default=1.0, help="scale of z when drawing [%(default)s]")
    options = vars(parser.parse_args(arguments))
    job = options.pop("job")
    digit = options.pop("digit")
    temperature = options.pop("temperature")
    if job in (None, "train"):
        train_cvae(**options)
    if job in (None, "draw"):
        for input, flag in [(6, True), (6, False)] if digit is None else [(digit, True)]:
            inference_cvae(input, flag, temperature, options.get("seed"), options["out_dir"])
    if job in (None, "restyle"):
        restyle_cvae(None, options["data_dir"], options["out_dir"])


# %% [markdown]
# ### Run
# This cell does the whole job. To continue it after a restart of the notebook's kernel, run all
# cells but this one, and then `train_cvae(resume=True)`.
# %%
if __name__ == "__main__":
    if re.search(r"(kernel_launcher|pydevconsole)\.py$|ipykernel[/\\]\w+\.py$", sys.argv[0]):
        main([])  # a notebook's or a console's own arguments are not for us
    else:
        if hasattr(sys.stdout, "reconfigure"):  # letters that it cannot show get a backslash
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(sys.argv[1:])
        except (UserError, OSError) as error:
            sys.exit(f"cvae_mnist.py: error: {error}")
