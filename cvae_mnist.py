# %% [markdown]
# # Handwritten digits with a conditional VAE
# This file trains a neural network that draws handwritten digits. You say which digit, and it draws
# that digit in as many styles as you like.
#
# The network is a *variational autoencoder* (VAE). It has two parts:
#
# - The *encoder* looks at an image and describes it by a short list of numbers, here 50. This list
#   is called `z`, the *latent vector*. (Latent means hidden: no image comes with its `z`.)
# - The *decoder* gets `z` and draws an image.
#
# The two are trained together. The encoder describes an image, and the decoder must draw the same
# image from the description. So `z` has to say what matters about the image.
#
# In a *conditional* VAE (CVAE), both parts are also told the *label* `c`: which digit the image
# shows. Then `z` need not say it again. It is left with the rest, the style: how slanted, how wide,
# how thick the digit is.
#
# After the training, the decoder alone draws new digits. It needs a label, which you choose, and a
# `z`, which is made of random numbers.
# ```text
# Training:            encoder                                     decoder
#  image x ────┐                 ┌─► mu ──────┐
#              ├─► 600 units ────┤            ├─► z = mu + std * noise ──┐
#  label c ─┬──┘                 └─► log_var ─┘                          ├─► 600 units ───► image
#           └────────────────────────────────────────────────────────────┘
# Drawing:                                      z = noise ───────────────┐
#                                               label c ─────────────────┴─► 600 units ───► image
# ```
# Each part has a layer of 600 units between its input and its output. Part 1 explains `mu`,
# `log_var`, `std` and the noise.
#
# - **Part 1** is the idea: the model, its loss, a training step, and drawing.
# - **Part 2** trains a model, saves it, and draws with it.
# - **The appendix** is the rest: data, files, pictures, options. Nothing in it is about VAEs.
#
# To do it all, run the file. It needs no GPU: after 5 to 15 minutes on a laptop you can look at new
# digits. You can also open the file as a notebook, in VS Code, PyCharm or Spyder: each `# %%`
# begins a cell, and only the last cell starts to train.
# %%
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib>=3.8"]
# ///
import argparse
import builtins
import copy
import inspect
import io
import math
import numbers
import os
import socket
import sys
import time
from functools import partial
from http.client import HTTPException
from pathlib import Path

# For speed only: PyTorch's threads keep their cores busy even while they wait for each other. So
# beside another busy program, on two cores, an epoch took 12 to 24 times as long. With this
# setting, which PyTorch reads when it is imported, they give up their cores sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from matplotlib import get_data_path, patches, style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets, transforms, utils


# %% [markdown]
# ## Part 1: the idea
#
# ### Images and labels
# An image `x` has 28 x 28 = 784 pixels. A pixel is a number from 0 (black, the background) to 1
# (white, the ink). The pictures that this file saves are inverted: black ink on white paper.
#
# We treat a pixel as something that is either white or black, and its number as a probability: 0.3
# means white with probability 0.3. The decoder returns such a probability for each pixel. Shown as
# grays, they are the drawing.
#
# A label `c` is *one-hot*: ten numbers, a 1 at the digit's place and nine 0s. To tell the label to
# the encoder, these ten numbers are appended to `x`. For the decoder, they are appended to `z`.
#
# Images are processed in *batches*. In the code, [B, 784] is the shape of a batch: B images of 784
# pixels.
#
# ### Why the encoder returns a distribution
# Think first of an encoder that describes each image by one point `z`. (That is a plain
# *autoencoder*.) Its decoder learns what to draw at these points, and only there. Nothing tells it
# what to draw at the points between them. So from a random `z` it draws a scribble.
#
# The encoder of a VAE describes an image by a whole region of points: a normal distribution over
# `z`. For each of the 50 numbers in `z`, it returns a mean and a variance. (These 50 are called the
# *latent dimensions*.) The means are called `mu`. Each time an image is used in training, a new `z`
# is sampled from its distribution, and the decoder must draw the image from it. So it learns to
# draw the image at all points near `mu`.
#
# To draw a new digit, we need a random `z` at which the decoder knows what to draw. From where do
# we take it? We choose a distribution in advance: the *standard normal distribution*, with mean 0
# and variance 1 in each dimension. It is simple to sample from. The loss (below) has two terms. One
# asks for a good drawing. The other pulls the distribution of every image towards the standard
# normal one. The first works against this: if all distributions were equal, `z` would say nothing
# about the image, and the decoder could not draw it.
#
# The result is a compromise: the distributions are wide, and close together. Where two of them
# touch or overlap, the same `z` can come from both images, and the decoder must draw something that
# suits both. So its drawing tends to change smoothly from one to the next. A random `z` mostly lies
# between the distributions of several images, and there the decoder draws something between these
# images: a new digit. (Not always: some drawings are broken.)
#
# A variance is positive, but a layer may return any number. So for the variance the encoder returns
# its logarithm, `log_var`.
#
# ### The reparameterization trick
# To train the encoder, we need gradients: how does the loss change if `mu` and `log_var` change a
# little? If a library function just hands us a random `z`, there is no formula that leads from `mu`
# to `z`, and so there is no gradient.
#
# The *reparameterization trick* is to write such a formula. Sample noise from the standard normal
# distribution. Multiply it by the standard deviation `std` = exp(`log_var` / 2), the square root of
# the variance. Add `mu`. The result is normal, with mean `mu` and variance exp(`log_var`), as we
# wanted. But now the randomness comes from outside, and `z` is a product and a sum. Gradients pass
# through both, to `mu` and to `log_var`.
#
# ### The model
# The decoder's last layer returns any numbers, called *logits*. The *sigmoid* function turns them
# into probabilities, between 0 and 1.
# %%
class CVAE(nn.Module):
    """A VAE with labels; with num_classes=0, one without.

    Kingma and Welling, Auto-Encoding Variational Bayes, 2014. With labels: Kingma et al.,
    Semi-supervised Learning with Deep Generative Models, 2014, model M2 (here all labels are
    known)."""

    def __init__(self, input_dim=784, h_dim=600, z_dim=50, num_classes=10):
        super().__init__()
        self.z_dim = z_dim
        self.num_classes = num_classes
        self.fc1 = nn.Linear(input_dim + num_classes, h_dim)  # encoder: hidden layer
        self.fc2 = nn.Linear(h_dim, z_dim)  # encoder: mean
        self.fc3 = nn.Linear(h_dim, z_dim)  # encoder: log-variance
        self.fc4 = nn.Linear(z_dim + num_classes, h_dim)  # decoder: hidden layer
        self.fc5 = nn.Linear(h_dim, input_dim)  # decoder: pixels
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)  # the loss gets lower than with the default
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def one_hot(self, labels):
        """labels [B], int64 -> c [B, num_classes]: 1 in the label's column, 0 elsewhere."""
        c = F.one_hot(labels, self.num_classes or 10).float()
        return c[:, : self.num_classes]  # without labels: nothing to append, [B, 0]

    def encode(self, x, c):
        """x [B, 784] or [B, 1, 28, 28] in [0, 1], c [B, num_classes] -> mu, log_var [B, z_dim]."""
        h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))
        return self.fc2(h), self.fc3(h)

    def reparameterize(self, mu, log_var):
        """mu, log_var [B, z_dim] -> z [B, z_dim], sampled from this normal distribution."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def decode_logits(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> logits [B, 784]: the pixels before the sigmoid."""
        return self.fc5(F.relu(self.fc4(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """z [B, z_dim], c [B, num_classes] -> images [B, 784] in [0, 1]."""
        return torch.sigmoid(self.decode_logits(z, c))

    def forward(self, x, c):
        """x, c -> images, mu, log_var. For other programs; the loss below takes the logits."""
        mu, log_var = self.encode(x, c)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var


# %% [markdown]
# ### The loss: what we want
# Let us now see drawing as a random process in two steps.
#
# 1. Sample `z` from the standard normal distribution, p(z). It is called the *prior*: what we
#    assume about `z` before we have seen an image. It is the same for every label. So the model
#    assumes that any style can go with any digit.
# 2. Make each pixel white with the probability that the decoder gives it, each independently of the
#    others. The probability that this makes the image `x` is called p(x|z,c): the probability of
#    `x`, given `z` and `c`. (Here `x` is black and white. Gray pixels come below.)
#
# Both steps together make the image `x` with some probability p(x|c). Training should make it large
# for the images of the training set: a model that is likely to make these images also makes similar
# ones. The probability to make all of them is the product of their probabilities. The logarithm of
# a product is the sum of the logarithms, and sums are easier. So we want log p(x|c) to be large, on
# average.
#
# ### Why we cannot compute it
# Every `z` can lead to `x`, though most do so with a tiny probability. So p(x|c) is a sum over all
# `z`. (An integral, to be exact.) Each `z` adds p(z) p(x|z,c): the probability to sample it, times
# the probability to make `x` from it. To estimate this sum, we could sample many `z` from p(z) and
# take the mean of p(x|z,c). But hardly any random `z` fits a given image. We would need far too
# many.
#
# Here the encoder helps. Its task is to tell where the `z` are that fit the image: in the normal
# distribution with mean `mu` and variance exp(`log_var`). This distribution is called q(z|x,c).
# What follows is true for any q, also at the start of training, when it is a bad one.
#
# ### What we can compute
# E[...] means: the mean over `z` sampled from q.
# ```text
#     p(x|c) = sum over z of  p(z) p(x|z,c)                        all z that can lead to x
#            = sum over z of  q(z|x,c) p(z) p(x|z,c) / q(z|x,c)    times q, divided by q
#            = E[ p(z) p(x|z,c) / q(z|x,c) ]                       sum of q * something = its mean
#
# log p(x|c) >= E[ log( p(z) p(x|z,c) / q(z|x,c) ) ]               log of a mean >= mean of the logs
#             = E[ log p(x|z,c) + log( p(z) / q(z|x,c) ) ]         log of a product: a sum of logs
#             = E[ log p(x|z,c) ] - E[ log( q(z|x,c) / p(z) ) ]    log(1/a) = -log(a)
#             = E[ log p(x|z,c) ] - KL                             a name for the second mean
# ```
# Why `>=`? The curve of the logarithm bends down. Take the numbers 1 and 9. Their mean is 5, and
# its logarithm is 1.6. The mean of their logarithms, 0 and 2.2, is only 1.1. It is like this for
# all numbers (*Jensen's inequality*).
#
# The last line is the *evidence lower bound*, ELBO. (The evidence is p(x|c), and the ELBO is never
# above its logarithm.) KL is the *Kullback-Leibler divergence* of q from the prior. It measures how
# much the two distributions differ: it is 0 if they are equal, and else more than 0.
#
# How far is the ELBO below log p(x|c)? The probability to get both `z` and `x` can be written in
# two ways: p(z) p(x|z,c) or p(x|c) p(z|x,c). The new factor, p(z|x,c), is called the *posterior*.
# It says how probable each `z` is once we have seen `x`. In the line with `>=`, the right side is
# the ELBO. Write the second product there in place of the first:
# ```text
# ELBO = E[ log( p(x|c) p(z|x,c) / q(z|x,c) ) ]
#      = E[ log p(x|c) ] + E[ log( p(z|x,c) / q(z|x,c) ) ]    log of a product: a sum of logs
#      = log p(x|c) - E[ log( q(z|x,c) / p(z|x,c) ) ]         no z in p(x|c); log(1/a) = -log(a)
# ```
# So the gap is a KL divergence, too: that of q from the posterior. If we raise the ELBO, log p(x|c)
# rises, or the gap shrinks. The first makes the training images more probable. The second brings
# the encoder's q closer to the posterior, so it is better at finding the `z` that fit. Both are
# what we want.
#
# To look for the simple distribution (here q) that is closest to a complicated one (here the
# posterior) is called *variational inference*. The variational autoencoder has its name from there.
#
# ### The loss: two terms
# Optimizers minimize. So the loss is -ELBO, which is the sum of two terms.
#
# **The reconstruction loss** is the first term, -E[ log p(x|z,c) ]. It is small if the decoder can
# draw the image from the encoder's `z`. Now the gray pixels: take one, and let its cost be minus
# the logarithm of its probability. Let its value in the image be g, and let the decoder say that it
# is white with probability w. The pixel is white with probability g, and then costs -log w. It is
# black with probability 1 - g, and then costs -log(1 - w). The mean cost is called the *binary
# cross-entropy*:
# ```text
# -g log w - (1-g) log(1-w)
# ```
# It is lowest if w = g. For a gray pixel it is not 0 even then: even the best decoder cannot know
# whether the pixel will be white. Given `z` and `c`, the pixels are independent. So their
# probabilities are multiplied, and their costs, which are logarithms, are added. The mean E is
# estimated from one sample of `z` per image. That is enough, for the noise averages out over many
# steps.
#
# **KL** is the second term. For normal distributions there is a formula. With var for the variance,
# each latent dimension costs
# ```text
# (mu² + var - 1 - log var) / 2
# ```
# The dimensions are independent, so these costs are added, too. A dimension with mu = 0 and var = 1
# is distributed like the prior. It costs nothing, and says nothing about the image.
#
# **The two terms pull against each other.** Their unit is the *nat*, because their logarithms are
# natural ones. To draw the image, the decoder must find out from `z` which image it was. For this
# alone, the distributions of different images should not overlap at all. They would be narrow, or
# far from 0, and both make KL larger. Training makes the sum of the terms small. So the encoder
# adds a nat to KL only if this saves more than a nat of the reconstruction loss. To tell the digit
# through `z` would add to KL and save nothing, since the decoder has `c`. And the encoder need not
# tell it, for it has `c`, too. So `z` is left with the style.
#
# **Sums, not means.** Both terms are sums: over the pixels and over the dimensions. Suppose that
# you take the mean over the pixels instead. Then the first term is 784 times smaller, and nothing
# in the image is worth its price in KL. All distributions become equal to the prior, and `z` says
# nothing about the image. This is called *posterior collapse*: q, which is used in place of the
# posterior, no longer depends on the image. (A mean over the images of a batch does no harm, for it
# changes both terms alike.)
# %%
def negative_elbo(model, x, c):
    """x [B, 784] or [B, 1, 28, 28], c [B, num_classes] -> reconstruction loss [B], KL [B].

    In nats. Kingma and Welling, section 2.2 (the bound) and appendix B (KL of two normals).
    The cross-entropy takes logits: it avoids log(0) where a probability is rounded to 0 or 1."""
    mu, log_var = [
        value.to(x.dtype) for value in model.encode(x, c)
    ]  # 32 bits, like x, even if layers use 16
    logits = model.decode_logits(model.reparameterize(mu, log_var), c)
    losses = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none")
    kl = (mu**2 + log_var.exp() - 1 - log_var) / 2
    return losses.sum(dim=1), kl.sum(dim=1)


# %% [markdown]
# ### A training step
# A step takes a batch of B images and their mean loss. The gradient says in which direction of the
# weights the loss rises. The optimizer moves the weights a little in the opposite direction.
# %%
def train_step(model, optimizer, x, c):
    """x [B, 784], c [B, num_classes] -> the batch's loss before the step, in nats per image."""
    reconstruction, kl = negative_elbo(model, x, c)
    loss = (reconstruction + kl).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# %% [markdown]
# ### Drawing
# To draw, we do not need the encoder. Sample `z` from the prior, choose labels, and decode.
# %%
@torch.no_grad()
def generate(model, z, labels):
    """z [N, z_dim] and N labels (integers) -> images [N, 1, 28, 28] in [0, 1], on the CPU."""
    # On the CPU a wrong label is an error with a message; on a GPU it would crash the program.
    c = model.one_hot(torch.tensor(torch.as_tensor(labels).tolist()))
    device = next(model.parameters()).device
    return model.decode(z.to(device), c.to(device)).reshape(-1, 1, 28, 28).cpu()


# %% [markdown]
# ### That is the whole idea
# The lines below train a model with nothing but what stands above, and draw with it. (The images
# come from the appendix.) Where to run them:
#
# - In a notebook, run all cells of this file but the last one. Then copy the lines into a new cell.
# - In a terminal, save these lines, without their `# `, in a file `idea.py` beside this one. Above
#   them write `from cvae_mnist import *`. Then run `python idea.py`.
#
# An *epoch* uses every training image once, in random order, a batch at a time.
# ```python
# name, (images, labels), test_set = load_images("./mnist")  # in the appendix; downloads MNIST
# model = CVAE()
# optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
# for epoch in range(10):  # about a minute on two CPU cores
#     losses = []
#     for indices in torch.randperm(len(images)).split(256):
#         x, c = images[indices] / 255, model.one_hot(labels[indices])
#         losses.append(train_step(model, optimizer, x, c))
#     print(epoch + 1, torch.stack(losses).mean().item())
# model.eval()  # changes nothing here, but layers like Dropout need it before you draw
# grid = utils.make_grid(generate(model, torch.randn(10, model.z_dim), range(10)), nrow=10)
# picture = Image.fromarray((255 * (1 - grid[0])).byte().numpy())  # black on white
# picture.save("idea.png")
# picture  # a notebook shows it
# ```
# Each printed number is the mean loss of an epoch's steps. They fall from about 170 to 101. (The
# very first step's loss is 543: an untrained model gives every pixel the probability 1/2, which
# costs log 2, and 784 log 2 = 543.) For the two terms on test images, write `evaluate(model,
# *test_set)`, a function of Part 2. In the end they are near 81 and 20.
#
# Now change the weight of a term. In the line `loss = ...` of `train_step`, write `0 * kl` for
# `kl`. Images are then reconstructed better than ever, but drawings are scribbles: no `z` from the
# prior is like those that the decoder has seen. With `10 * kl`, `z` says almost nothing, and the
# drawings of a digit are blurred and alike. README.md shows both in pictures.
#
# ## Part 2: train, then draw
#
# ### The mean of the weights
# The step size of the optimizer is constant. So the weights never come to rest: each batch pushes
# them a little to another side of the best place. The mean of the weights over many steps is closer
# to that place. So we keep a second model, `average`, which has the mean weights. It is the model
# that is evaluated, saved and drawn with. After ten epochs its test loss is 98.0. That of the model
# without averaging is 100.4.
#
# Late steps are better than early ones, so they count more: the share of step number t grows like
# t**9, and the last tenth of all steps has two thirds. To get these shares, each step moves the
# average a part of the way to the model: 10 / (10 + step).
# %%
@torch.no_grad()
def update_average(average, model, step):
    """Moves the averaged weights 10 / (10 + step) of the way to the model's.

    step: 0, 1, 2, ... Polynomial-decay averaging with eta = 9 (Shamir and Zhang 2013)."""
    means = average.state_dict()  # not a copy: lerp_ below changes the weights of `average`
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # not BatchNorm's counter, if you add a BatchNorm
            means[name].lerp_(value, 10 / (10 + step))


# %% [markdown]
# ### How good is the model?
# To evaluate a model, take the mean of the two terms over many images. `z` is sampled as in
# training. With `z` = `mu` the sum would look better, but it would not be -ELBO: the derivation
# above needs a mean over samples.
# %%
@torch.no_grad()
def evaluate(model, images, labels):
    """images uint8 [N, 784], labels [N] -> mean reconstruction loss and KL, in nats per image."""
    total = 0
    for part in torch.arange(len(images)).split(1000):  # in parts: a big model needs much memory
        terms = negative_elbo(model, images[part] / 255, model.one_hot(labels[part]))
        total = total + torch.stack(terms).sum(dim=1)
    return (total / len(images)).tolist()


# %% [markdown]
# ### Train
# The two loops below are those of the short program at the end of Part 1. After each epoch,
#
# - the averaged model is evaluated on all test images and on 10,000 training images. These losses
#   are printed and plotted. How far the test loss lies above the training loss shows how much the
#   model has learned that holds for the training images only (*overfitting*).
# - the checkpoint `cvae_checkpoint.pth` is saved. It has all that is needed to draw or to resume.
#
# After every tenth epoch and at the end, two pictures are saved. `CVAE_loss.png` shows the losses
# of all epochs. In the folder `cvae_results`, a picture shows drawings: a row for each style, a
# column for each digit. (A VAE without labels is not told the digit: its columns are all alike.)
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
    if num_classes not in (10, 0):
        raise UserError(f"num_classes must be 10 or 0, got {num_classes}")
    epochs, batch_size = positive("epochs", epochs), positive("batch_size", batch_size)
    hyperparameters = {
        "batch_size": batch_size,
        "learning_rate": positive("learning_rate", learning_rate, float, "number"),
        "h_dim": positive("h_dim", h_dim),
        "z_dim": positive("z_dim", z_dim),
        "num_classes": int(num_classes),
        "seed": int(seed),
    }
    device = pick_device(device)
    torch.manual_seed(seed)
    model = new_model(hyperparameters).to(device)
    average = copy.deepcopy(model).eval()
    betas = (0.9, 0.99)  # after ten epochs 0.5 nats better than the usual 0.999
    optimizer = torch.optim.Adam(model.parameters(), float(learning_rate), betas, fused=True)
    path = Path(out_dir).expanduser() / "cvae_checkpoint.pth"
    first_epoch, history = 1, {}
    if resume:
        first_epoch, history = restore(path, epochs, hyperparameters, model, average, optimizer)
    elif path.exists():
        print(f"{path} will be replaced and kept as {name_to_keep(path)}")
    path.with_name("cvae_results").mkdir(parents=True, exist_ok=True)
    dataset, train_set, test_set = load_images(data_dir, dataset)
    saved = hyperparameters.setdefault("dataset", dataset)  # a resumed run has it already
    if dataset != saved:
        raise UserError(f"Cannot resume: dataset is {saved} in the checkpoint but {dataset} here")
    images, labels = check_images(*train_set, device)
    test_set = check_images(*test_set, device)
    print(f"{dataset}: {len(images):,} training, {len(test_set[0]):,} test images, on {device}")
    print(f"{path} is saved after every epoch; use --resume (resume=True) to continue")
    styles = torch.randn(10, model.z_dim, generator=torch.Generator().manual_seed(0))
    first_save = not resume
    for epoch in range(first_epoch, epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(seed + 1_000_000 * epoch)  # so a resumed run samples the same
        batches = torch.randperm(len(images), device=device).split(batch_size)
        # 16 bits, for speed: see the appendix. A cache would keep the weights of the first step.
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16, cache_enabled=False):
            for step, indices in enumerate(batches, start=(epoch - 1) * len(batches)):
                train_step(model, optimizer, images[indices] / 255, model.one_hot(labels[indices]))
                update_average(average, model, step)
            reconstruction, kl = evaluate(average, images[:10_000], labels[:10_000])
            losses = {
                "train_loss": reconstruction + kl,
                "reconstruction": reconstruction,
                "kl": kl,
                "test_loss": sum(evaluate(average, *test_set)),
            }
        if not math.isfinite(sum(losses.values())):
            raise UserError(f"The loss is NaN or infinite in epoch {epoch}; lower learning_rate")
        for name, loss in losses.items():
            history.setdefault(name, []).append(loss)
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": average.state_dict(),  # the one to use
            "training_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "hyperparameters": hyperparameters,
            "history": history,
        }
        save_checkpoint(path, checkpoint, first_save)
        first_save = False
        seconds = time.perf_counter() - start
        minutes = seconds * (epochs - epoch) / 60
        print(
            f"epoch {epoch}/{epochs}  loss {losses['train_loss']:.2f} (reconstruction "
            f"{reconstruction:.2f}, KL {kl:.2f})  test loss {losses['test_loss']:.2f}  "
            f"{seconds:.1f} s  {minutes:.1f} min left",
            flush=True,
        )
        if epoch % 10 == 0 or epoch == epochs:
            drawn = generate(average, styles.repeat_interleave(10, dim=0), [*range(10)] * 10)
            save_grid(out_dir, f"cvae_results/epoch_{epoch}.png", drawn, checkpoint, range(10))
            save_losses(out_dir, checkpoint)
    return average


# %% [markdown]
# ### Draw
# `temperature` multiplies `z`. At 1, the drawings are as varied as the model has learned. Closer to
# 0, they are cleaner and more alike.
# %%
def inference_cvae(input=6, flag=False, temperature=1.0, seed=None, out_dir="."):
    """Draws the digits 0 to 9 or, with flag=True, ten of the digit `input`. Raises UserError.

    Saves CVAE_0-9.png or, say, CVAE_6.png, and returns its images [10, 1, 28, 28] in [0, 1], on the
    CPU. seed: the same one gives the same z's; None: new ones. (`input` and `flag` are an old
    tutorial's names.)"""
    checkpoint, model = load_checkpoint(out_dir)
    if seed is None:
        seed = torch.Generator().seed() % 1_000_000
    print(f"Drawing with seed {seed}")
    generator = torch.Generator().manual_seed(int(seed))
    digits = [input] * 10 if flag else range(10)
    z = temperature * torch.randn(10, model.z_dim, generator=generator)
    images = generate(model, z, digits)
    name = f"CVAE_{input}.png" if flag else "CVAE_0-9.png"
    save_grid(out_dir, name, images, checkpoint, digits)
    return images


# %% [markdown]
# ### Keep the style, change the digit
# Take an image of the test set. The mean that the encoder gives for it, `mu`, is its style. Decode
# this style with each of the ten labels. In the picture a red box marks the image's own label:
# there the decoder has drawn the image itself, as well as it can. (In truth, not every style suits
# every digit, and some drawings show it.)
# %%
@torch.no_grad()
def restyle_cvae(indices=None, data_dir="./mnist", out_dir="."):
    """Redraws test images as 0 to 9, each row in the style of its image. Raises UserError.

    indices: which test images; None: the first of each digit. Saves CVAE_styles.png, returns its
    images [rows, 11, 1, 28, 28] in [0, 1], on the CPU: the original, then 0 to 9."""
    checkpoint, model = load_checkpoint(out_dir)
    dataset = checkpoint["hyperparameters"].get("dataset")
    if dataset is None:
        raise UserError("Cannot restyle: the checkpoint does not say on which data it was trained")
    name, _, test_set = load_images(data_dir, dataset)
    if name != dataset:
        raise UserError(f"Cannot restyle: the model was trained on {dataset}, not on {name}")
    images, labels = check_images(*test_set)
    if indices is None:
        indices = [labels.tolist().index(digit) for digit in labels.unique().tolist()]
    indices = torch.as_tensor(indices)
    x, labels = images[indices] / 255, labels[indices]
    mu, _ = model.encode(x, model.one_hot(labels))
    columns = [generate(model, mu, [digit] * len(x)) for digit in range(10)]
    rows = torch.stack([x.view(-1, 1, 28, 28), *columns], dim=1)
    captions = ["original", *range(10)]
    save_grid(out_dir, "CVAE_styles.png", rows.flatten(0, 1), checkpoint, captions, 1 + labels)
    return rows


# %% [markdown]
# ### To change things
# - *Your own pictures*, 28 x 28 pixels with labels from 0 to 9: write another `load_images`.
# - *Other layers:* change `__init__`, `encode` and `decode_logits` in `CVAE`.
# - *Another loss*, or another weight of KL: change `train_step`.
# - *A new option of the training:* add it to the arguments of `train_cvae`, to its
#   `hyperparameters`, and to `main`. If it belongs to the model, add it to `CVAE` and to
#   `new_model` as well.
#
# README.md has examples.
#
# ## Appendix: nothing in it is about VAEs
#
# ### Data
# MNIST has 60,000 training images and 10,000 test images. They are kept on the device as whole
# numbers from 0 to 255, a byte per pixel. FashionMNIST (clothes) and KMNIST (Japanese letters) are
# data sets of the same form. If there is no network to download MNIST, the script makes digits from
# the fonts that come with matplotlib.
# %%
BUILT_IN = "built-in digits"
DATASETS = ["MNIST", "FashionMNIST", "KMNIST", BUILT_IN]  # torchvision's, of ten classes, and ours
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
FILES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def load_images(data_dir, dataset="MNIST"):
    """Returns the data set's name, (images, labels) to train on, (images, labels) to test on.

    images: uint8 [N, 784], labels: int64 [N]. Downloads the set if need be. If the network does not
    give MNIST, built-in digits stand in. Raises UserError for files that it cannot get or use."""
    if dataset == BUILT_IN:
        return BUILT_IN, built_in_digits(60_000, seed=0), built_in_digits(10_000, seed=1)
    if dataset not in DATASETS:
        raise UserError(f"dataset is {dataset}; it must be one of {', '.join(DATASETS)}")
    root = Path(data_dir).expanduser()
    raw = root / dataset / "raw"
    try:
        missing = not [os.stat(raw / name) for name in FILES]  # may raise PermissionError
    except FileNotFoundError:
        missing = True
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait without end
    try:
        parts = []
        for train in True, False:
            part = getattr(datasets, dataset)(root, train, download=missing)
            parts.append(check_images(part.data, part.targets))
        return dataset, *parts
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        files = f"place these files in {raw}, complete and not compressed: {' '.join(FILES)}"
        offline = isinstance(error, (RuntimeError, TimeoutError, ConnectionError, HTTPException))
        if missing and offline and dataset == "MNIST":
            print(
                f"Cannot download MNIST: {reason}. Using {BUILT_IN} instead. To use MNIST, {files}"
            )
            return load_images(data_dir, BUILT_IN)
        raise UserError(f"Cannot use {dataset}: {reason}. To use {dataset}, {files}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def check_images(images, labels, device="cpu"):
    """Returns uint8 [N, 784] and int64 [N] on the device; UserError if they are no images, labels.

    Called with what load_images returned, whoever wrote it."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    digits = labels.unique().tolist()
    fit = images.numel() == 784 * labels.numel() > 0 and {*digits} <= {*range(10)}
    if not fit or images.dtype != torch.uint8 or labels.is_floating_point():
        raise UserError(
            "load_images must return images uint8 [N, 784] and labels int64 [N] from 0 to 9; got "
            f"images {images.dtype} {list(images.shape)}, labels {labels.dtype}: {digits[:20]}"
        )
    return images.reshape(-1, 784).to(device), labels.flatten().long().to(device)


def built_in_digits(count, seed):
    """Makes digits like MNIST's: images uint8 [count, 784], labels int64 [count]."""
    glyphs = []
    for name in "DejaVuSans", "cmss10", "cmtt10", "STIXGeneralItalic":
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", 25)
        for digit in "0123456789":
            glyph = Image.new("L", (28, 28))
            middle = (14, 22)  # of the baseline
            ImageDraw.Draw(glyph).text(middle, digit, 255, font, anchor="ms", stroke_width=1)
            glyphs.append(glyph)
    smooth = transforms.InterpolationMode.BILINEAR
    distort = transforms.RandomAffine(
        12, (0.05, 0.05), (0.8, 1.1), 12, smooth
    )  # turns, shifts, ...
    with torch.random.fork_rng([]):  # afterwards PyTorch's random numbers go on as before
        torch.manual_seed(seed)
        choice = torch.randint(40, [count])
        images = [transforms.functional.pil_to_tensor(distort(glyphs[i])) for i in choice.tolist()]
    return torch.stack(images).flatten(1), choice % 10  # each font has the glyphs 0 to 9


# %% [markdown]
# ### Speed
# Some CPUs have instructions for numbers of 16 bits (bfloat16), which PyTorch's layers can use in
# place of those of 32. If PyTorch reports them, the layers use them in `train_cvae`. Weights and
# losses keep 32 bits. On two cores of an Intel Xeon (Sapphire Rapids), an epoch takes 2.7 seconds
# with them and 3.2 without.
#
# The last line below computes something that nobody uses. On a CPU from AMD with AVX-512 (Zen 4),
# the loss takes 2.7 times as long if `log1p` was never called before. We do not know why. On one
# from Intel (Sapphire Rapids) it makes no difference.
# %%
BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
_ = torch.log1p(torch.tensor(-0.0))


# %% [markdown]
# ### The device and the checkpoint
# A checkpoint is written under another name, then renamed. So the file is whole at any moment, even
# if the program is killed. A new run does not throw away the checkpoint that it finds: it renames
# it after the number of its epochs.
# %%
class UserError(ValueError):
    """An error that the user can mend. On the command line it is one line, without a traceback."""


def pick_device(device=None):
    """Returns the given device; for None an accelerator, if it can compute, else the CPU."""
    tried = device
    if device is None and torch.accelerator.is_available():
        tried = torch.accelerator.current_accelerator()
    try:
        matrix = torch.ones(2, 2, device=tried)
        (matrix @ matrix).cpu()  # old GPUs are seen, but cannot compute
        return matrix.device
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if device is not None:
            raise UserError(f"Cannot use device {device}: {reason}") from error
        print(f"warning: cannot use {tried}: {reason}. Using the CPU")
        return torch.device("cpu")


def positive(name, value, kind=int, word="integer"):
    """Returns a plain number, for torch.load would refuse numpy's. Raises UserError."""
    real = isinstance(value, numbers.Real)
    if not real or not 0 < value < math.inf or kind(value) != value:
        raise UserError(f"{name} must be a positive {word}, got {value}")
    return kind(value)


def new_model(hyperparameters):
    """Returns an untrained CVAE of these sizes; for a size that is missing, CVAE's default."""
    names = "h_dim", "z_dim", "num_classes"
    return CVAE(**{name: hyperparameters[name] for name in names if name in hyperparameters})


def save_checkpoint(path, checkpoint, first_save):
    """Puts a checkpoint in place, whole; the first save of a new run keeps the one before."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    unfinished = Path(f"{path}.{os.getpid()}.tmp")  # two runs in a folder have a file each
    unfinished.write_bytes(content.getbuffer())
    if first_save and path.exists():
        rename(path, path.with_name(name_to_keep(path)))
    rename(unfinished, path)


def name_to_keep(path):
    """Returns a free name for the checkpoint at path, after its epochs; UserError if it is none."""
    epoch = read_checkpoint(path).get("epoch", "unknown")
    name = f"{path.stem}.epoch_{epoch}.pth"
    number = 2
    while path.with_name(name).exists():
        name = f"{path.stem}.epoch_{epoch}-{number}.pth"
        number += 1
    return name


def rename(old, new):
    """os.replace, tried for two seconds: on Windows a virus scanner may have the file open."""
    for _ in range(20):
        try:
            return os.replace(old, new)
        except PermissionError:
            time.sleep(0.1)
    os.replace(old, new)


def read_checkpoint(path):
    """Returns the dict in a checkpoint. Runs no code that the file may hold. Raises UserError."""
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        kept = max(path.parent.glob(f"{path.stem}.*.pth"), key=os.path.getmtime, default=None)
        hint = f"To use the newest that was kept, rename {kept}" if kept else "Train first"
        raise UserError(f"Checkpoint not found: {path}. {hint}") from None
    except OSError:
        raise
    except Exception as error:  # without its text, which may advise to load unsafe files
        reason = f"damaged or not a checkpoint ({type(error).__name__}); move it away"
        raise UserError(f"Cannot read {path}: {reason}") from None
    if "model_state_dict" not in checkpoint:
        raise UserError(f"Cannot use {path}: it has no model_state_dict; move it away")
    return {"hyperparameters": {}, **checkpoint}


def load_checkpoint(out_dir):
    """Returns the checkpoint in out_dir, a dict, and its CVAE, on the CPU and in eval mode."""
    checkpoint = read_checkpoint(Path(out_dir).expanduser() / "cvae_checkpoint.pth")
    model = new_model(checkpoint["hyperparameters"])
    model.load_state_dict(checkpoint["model_state_dict"])
    return checkpoint, model.eval()


def restore(path, epochs, hyperparameters, model, average, optimizer):
    """Puts all in the state of the checkpoint at path; returns the next epoch and the history.

    Raises UserError unless the checkpoint is of a run with these hyperparameters."""
    checkpoint = read_checkpoint(path)
    saved = checkpoint["hyperparameters"]
    problems = []
    for name, here in hyperparameters.items():
        there = saved.get(name, "missing")
        if there != here and name != "learning_rate":
            problems.append(f"{name} is {there} in the checkpoint but {here} here")
    if checkpoint.get("epoch", 0) > epochs:
        problems.append(f"epochs is {epochs} but the checkpoint has {checkpoint['epoch']}")
    if problems:
        raise UserError(f"Cannot resume: {'; '.join(problems)}")
    try:
        average.load_state_dict(checkpoint["model_state_dict"])
        model.load_state_dict(checkpoint["training_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        hyperparameters["dataset"] = saved["dataset"]
        before, now = saved["learning_rate"], hyperparameters["learning_rate"]
        result = checkpoint["epoch"] + 1, checkpoint["history"]
    except KeyError as error:
        raise UserError(f"Cannot resume: {error} is missing in the checkpoint") from None
    if before != now:  # else the optimizer keeps its own, which a scheduler may have changed
        print(f"learning_rate was {before} and is {now} from now on")
        for group in optimizer.param_groups:
            group["lr"] = now
    return result


# %% [markdown]
# ### Pictures and the command line
# Pictures look the same whatever the user's settings of matplotlib are.
# %%
def save_figure(out_dir, name, figure, checkpoint):
    """Saves a figure; in a notebook, shows it."""
    dataset = checkpoint["hyperparameters"].get("dataset", "unknown data")
    figure.suptitle(f"{dataset}, epoch {checkpoint.get('epoch')}")
    path = Path(out_dir).expanduser() / name
    figure.savefig(path)
    print(f"Saved {path}")
    if hasattr(builtins, "__IPYTHON__"):
        from IPython import display, get_ipython

        if "terminal" not in str(type(get_ipython())):  # a terminal's IPython cannot show pictures
            display.display(display.Image(path))


@style.context("default")
def save_grid(out_dir, name, images, checkpoint, captions, boxes=()):
    """Saves images [N, 1, 28, 28] under captions; boxes: in each row, the column to box in red."""
    columns = len(captions)
    if checkpoint["hyperparameters"].get("num_classes") == 0:  # a plain VAE has no labels to show
        captions, boxes = [""] * columns, []
    figure = Figure((columns, len(images) / columns + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(utils.make_grid(images, nrow=columns)[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    middles = range(16, 30 * columns, 30)  # an image has 28 pixels, a gap 2
    axes.set(frame_on=False, yticks=[], xticks=middles, xticklabels=captions)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for row, column in enumerate(boxes):
        corner = (30 * column + 1, 30 * row + 1)
        axes.add_patch(patches.Rectangle(corner, 29, 29, fill=False, color="tab:red", linewidth=2))
    save_figure(out_dir, name, figure, checkpoint)


@style.context("default")
def save_losses(out_dir, checkpoint):
    """Saves the loss per epoch on training and on test images and, apart, its two terms."""
    figure = Figure((6, 7), layout="constrained")
    panels = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    for name, losses in checkpoint["history"].items():
        axes = panels[{"reconstruction": 1, "kl": 2}.get(name, 0)]
        axes.plot([None, *losses], ".-", label=f"{name}: {losses[-1]:.2f}")  # from epoch 1
        axes.grid(True)
        axes.legend()
    figure.supxlabel("epoch")
    figure.supylabel("nats per image")
    save_figure(out_dir, "CVAE_loss.png", figure, checkpoint)


def main(arguments):
    """Runs the command line; with no arguments, the whole job."""
    parameters = inspect.signature(train_cvae).parameters.values()  # the defaults stand there only
    defaults = {parameter.name: parameter.default for parameter in parameters}
    seed = defaults.pop("seed")  # drawing has another default, so the parser has none
    parser = argparse.ArgumentParser(
        description="Train a CVAE on images of digits; draw with it.",
        argument_default=argparse.SUPPRESS,  # what is neither given nor a default is not there
    )
    parser.set_defaults(**defaults)
    add = parser.add_argument
    jobs = ["train", "draw", "restyle"]
    add("job", nargs="?", choices=jobs, default=None, help="what to do [all three]")
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
    add("--seed", type=int, help=f"to train [{seed}], to draw [random]")
    add("--digit", dest="input", type=int, choices=range(10), help="draw: this digit only")
    add("--temperature", type=float, help="draw: scale of z [1.0]")
    options = vars(parser.parse_args(arguments))
    job = options.pop("job")
    drawing = {name: options.pop(name) for name in ("input", "temperature") if name in options}
    if drawing and job is None:
        parser.error("--digit and --temperature need the job draw: cvae_mnist.py draw ...")
    if job in (None, "train"):
        train_cvae(**options)
    if job in (None, "draw"):
        seed = options.get("seed", torch.Generator().seed() % 1_000_000)  # one for both pictures
        draw = partial(inference_cvae, seed=seed, out_dir=options["out_dir"], **drawing)
        draw(flag=True)
        if "input" not in drawing:
            draw()
    if job in (None, "restyle"):
        restyle_cvae(data_dir=options["data_dir"], out_dir=options["out_dir"])


# %% [markdown]
# ### Run
# This cell does the whole job. To continue it after a restart of the notebook's kernel, run all
# cells but this one, and then `train_cvae(resume=True)`.
# %%
if __name__ == "__main__":
    kernel = "pydevconsole" in sys.argv[0]  # PyCharm's console
    if hasattr(builtins, "__IPYTHON__"):  # IPython runs: this is a notebook's cell, or a script
        this_file = os.path.realpath(globals().get("__file__", "none"))
        kernel = os.path.realpath(sys.argv[0]) != this_file or ".json'" in str(sys.argv)
    if kernel:
        main([])  # the arguments are its own
    else:
        if hasattr(sys.stdout, "reconfigure"):  # letters that it cannot show get a backslash
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(sys.argv[1:])
        except (UserError, OSError) as error:
            sys.exit(f"cvae_mnist.py: error: {error}")
