"""Checkpoints: what they hold, other people's, what is kept, kills, a reader's own model."""

import os
import pickle
import re
import traceback
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import CHECKPOINT, load, same
from test_model import TutorialCVAE
from torch import nn

import cvae_mnist
from cvae_mnist import CVAE, UserError, inference_cvae, load_checkpoint, restyle_cvae


def test_a_checkpoint_holds_what_the_readme_says_and_no_resuming_without(trained, train):
    checkpoint, model = load(trained), TutorialCVAE(16, 3)
    saved = {"batch_size": 32, "h_dim": 16, "z_dim": 3, "num_classes": 10, "learning_rate": 3e-3}
    assert checkpoint["hyperparameters"] == {**saved, "seed": 0, "dataset": "MNIST"}
    assert not same(checkpoint["model_state_dict"], checkpoint["training_state_dict"])
    model.load_state_dict(checkpoint["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])
    needed = ["epoch", "history", "training_state_dict", "optimizer_state_dict"]
    assert {*checkpoint} == {"model_state_dict", "hyperparameters", *needed}
    for name in *needed, *saved, "dataset":
        checkpoint = load(trained)
        del (checkpoint if name in needed else checkpoint["hyperparameters"])[name]
        torch.save(checkpoint, CHECKPOINT)
        error = pytest.raises(UserError, train, epochs=5, resume=True)
        error.match(f"Cannot resume: '?{name}'? is missing")


def test_the_tutorials_checkpoint_of_a_gpu_is_drawn_from_and_kept(train, data, monkeypatch):
    model = TutorialCVAE(600, 50)
    adam = torch.optim.Adam(model.parameters()).state_dict()
    theirs = {"model_state_dict": model.state_dict(), "optimizer_state_dict": adam}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(theirs, CHECKPOINT)
    assert b"cuda:0" in (whole := Path(CHECKPOINT).read_bytes())
    images = inference_cvae(input=6, flag=True, seed=0)
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    h = torch.relu(model.fc4(torch.cat([z, torch.eye(10)[[6] * 10]], dim=1)))
    assert torch.allclose(images.view(10, 784), torch.sigmoid(model.fc5(h)), atol=1e-5)
    pytest.raises(UserError, restyle_cvae, data_dir=data).match("does not say on which data")
    pytest.raises(UserError, train, resume=True).match("Cannot resume: batch_size is missing")
    train(epochs=1)
    assert Path("cvae_checkpoint.epoch_unknown.pth").read_bytes() == whole


class Code:
    def __reduce__(self):
        return open, ("ran", "w")  # writes a file when unpickled


def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays(train, trained):
    whole, path = (trained / CHECKPOINT).read_bytes(), Path(CHECKPOINT)
    files = [whole[:-10], b"", b"<html>404 Not Found</html>", pickle.dumps(Code(), protocol=2)]
    plain = load(trained)["model_state_dict"]
    for content in [*files, {**load(trained), "extra": Code()}, [1, 2, 3], plain]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        for call in partial(train, resume=True), train, inference_cvae:
            error = pytest.raises(UserError, call)
            error.match(
                CHECKPOINT + (": it has no model_state" if content is plain else ": damaged")
            )
            text = "".join(traceback.format_exception(error.value))  # no advice to load such files
            assert not re.search("(?i)weights_only=False|safe_globals", text)
        assert path.read_bytes() == before and os.listdir() == [CHECKPOINT]


def test_a_missing_checkpoint_names_the_newest_that_was_kept(train):
    for call in partial(train, resume=True), inference_cvae, restyle_cvae:
        pytest.raises(UserError, call).match(f"{CHECKPOINT}.*[Tt]rain")
        assert not os.listdir()
    for time, name in enumerate(("old", "epoch_9", "epoch_10")):
        Path(f"cvae_checkpoint.{name}.pth").touch()
        os.utime(f"cvae_checkpoint.{name}.pth", (time, time))
        pytest.raises(UserError, inference_cvae).match(f"rename cvae_checkpoint.{name}.pth")
    Path(CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    pytest.raises(OSError, inference_cvae).match(CHECKPOINT)


def test_a_new_run_keeps_the_one_before_whatever_happens(train, monkeypatch, capsys):
    before, replace = [], os.replace

    def killed_here(old, new):
        [new_one] = Path().glob("*.tmp")  # complete even while the old one is moved
        assert str(os.getpid()) in new_one.name  # a file of this process's own
        assert set(before) <= {load(name=path)["epoch"] for path in Path().glob("*.pth*")}
        replace(old, new)

    def another_run_comes_to_epoch_7(model, images, labels):
        torch.save({**load(), "epoch": 7}, CHECKPOINT)
        return 1.0, 2.0

    monkeypatch.setattr(os, "replace", killed_here)
    train(epochs=3)
    names = [f"cvae_checkpoint.epoch_{name}.pth" for name in ("3", "1", "2", "1-2", "1-3")]
    for number, epochs in enumerate((1, 2, 1, 1, 4)):
        before = [3, *([1, 2][:number])]
        capsys.readouterr()
        train(epochs=epochs)
        said = capsys.readouterr().out.splitlines()[0]
        assert names[number] in said and CHECKPOINT in said and load()["epoch"] == epochs
    train(epochs=5, resume=True)
    kept = {path.name: load(name=path)["epoch"] for path in Path().glob("*.*.pth")}
    assert kept == dict(zip(names, (3, 1, 2, 1, 1), strict=True)) and not [*Path().glob("*.tmp")]
    monkeypatch.setattr(cvae_mnist, "evaluate", another_run_comes_to_epoch_7)
    train(epochs=1)
    assert load(name="cvae_checkpoint.epoch_7.pth")["epoch"] == 7


def test_interruption_divergence_and_trouble_cost_one_epoch(train, trained, monkeypatch):
    evaluate = Mock(wraps=cvae_mnist.evaluate, side_effect=[DEFAULT] * 4 + [KeyboardInterrupt])
    monkeypatch.setattr(cvae_mnist, "evaluate", evaluate)
    pytest.raises(KeyboardInterrupt, train)
    evaluate.side_effect = None
    pytest.raises(UserError, train, learning_rate=1e30, resume=True).match("learning_rate")
    refused = Mock(wraps=os.replace, side_effect=PermissionError("no"))
    monkeypatch.setattr(os, "replace", refused)
    pytest.raises(PermissionError, train, resume=True)
    assert load()["epoch"] == 2
    refused.side_effect = [PermissionError] * 4 + [DEFAULT] * 2  # for a moment
    Path("cvae_results/epoch_4.png").mkdir()
    pytest.raises(OSError, train, resume=True).match("epoch_4.png")
    assert same(load(), load(trained))


def test_a_full_disk_is_an_error_that_costs_one_epoch(train):
    resource = pytest.importorskip("resource", reason="Windows limits no size of files")
    train(epochs=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        pytest.raises(OSError, train, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load()["epoch"] == 1


class Mine(CVAE):
    """A reader's own model: a layer renamed, others added."""

    def __init__(self, *sizes, **named):
        super().__init__(*sizes, **named)
        self.hidden = self.fc1
        del self.fc1
        self.more = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 16, bias=False))

    def encode(self, x, c):
        h = self.more(torch.relu(self.hidden(torch.cat([x.flatten(1), c], dim=1))))
        return self.fc2(h), self.fc3(h)


def test_a_readers_model_trains_resumes_and_draws(train, data, trained, monkeypatch):
    monkeypatch.setattr(cvae_mnist, "CVAE", Mine)
    model, whole = train(), load()
    train(epochs=2)
    train(resume=True)
    assert same(load(), whole) and not model.training and model.more[1].running_mean.any()
    for draw in partial(inference_cvae, seed=1), partial(restyle_cvae, [1], data):
        assert torch.equal(draw(), draw())  # no dropout
    pytest.raises(RuntimeError, load_checkpoint, trained).match("hidden.weight")  # PyTorch's own
