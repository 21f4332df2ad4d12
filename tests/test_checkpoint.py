"""Checkpoints: what they hold, other people's, kills and full disks, a reader's own model."""

import os
import pickle
import re
import shutil
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import CHECKPOINT, OLD, load, same
from test_model import TutorialCVAE
from torch import nn

import cvae_mnist
from cvae_mnist import CVAE, UserError, inference_cvae, load_checkpoint, restyle_cvae


def test_a_checkpoint_holds_what_the_readme_says_and_loads_into_the_tutorials_model(trained):
    checkpoint, model = load(trained), TutorialCVAE(16, 3)
    saved = {"batch_size": 32, "h_dim": 16, "z_dim": 3, "num_classes": 10, "learning_rate": 3e-3}
    assert checkpoint.pop("hyperparameters") == {**saved, "seed": 0, "dataset": "MNIST"}
    states = {"model_state_dict", "training_state_dict", "optimizer_state_dict"}
    assert set(checkpoint) == {"epoch", "history", *states} and checkpoint["epoch"] == 4
    assert not same(checkpoint["model_state_dict"], checkpoint["training_state_dict"])
    model.load_state_dict(checkpoint["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])


def test_the_tutorials_checkpoint_of_a_gpu_is_drawn_from(train, data, monkeypatch):
    model = TutorialCVAE(600, 50)
    adam = torch.optim.Adam(model.parameters()).state_dict()
    theirs = {"epoch": 2, "model_state_dict": model.state_dict(), "optimizer_state_dict": adam}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(theirs, CHECKPOINT)
    assert b"cuda:0" in Path(CHECKPOINT).read_bytes()
    images = inference_cvae(input=6, flag=True, seed=0)
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    h = torch.relu(model.fc4(torch.cat([z, torch.eye(10)[[6] * 10]], dim=1)))
    assert torch.allclose(images.view(10, 784), torch.sigmoid(model.fc5(h)), atol=1e-5)
    pytest.raises(UserError, restyle_cvae, data_dir=data).match("dataset is missing")
    pytest.raises(UserError, train, resume=True).match("Cannot resume: batch_size is missing")


class Code:
    def __reduce__(self):
        return open, ("ran", "w")  # writes a file when unpickled


def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays(train, trained):
    whole, path = (trained / CHECKPOINT).read_bytes(), Path(CHECKPOINT)
    files = [whole[:-10], b"", b"<html>404 Not Found</html>", pickle.dumps(Code(), protocol=2)]
    for content in [*files, {**load(trained), "extra": Code()}, {"epoch": 3}, [1, 2, 3]]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        for call in partial(train, resume=True), train, inference_cvae:
            error = pytest.raises(UserError, call)
            error.match(CHECKPOINT)
            assert error.value.__suppress_context__  # its text may be advice to load unsafe files
            assert not re.search("(?i)\n|weights_only|safe_globals", str(error.value))
        assert path.read_bytes() == before and not Path("ran").exists()


def test_a_missing_checkpoint_names_an_old_one_and_one_that_cannot_be_read_says_why(train, trained):
    for call in partial(train, resume=True), inference_cvae, restyle_cvae:
        error = pytest.raises(UserError, call)
        error.match(f"{CHECKPOINT}.*[Tt]rain")
        assert OLD not in str(error.value) and not os.listdir()
    shutil.copy(trained / CHECKPOINT, OLD)
    pytest.raises(UserError, inference_cvae).match(OLD)
    Path(CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    pytest.raises(OSError, inference_cvae).match(CHECKPOINT)


def test_killed_at_any_rename_a_run_leaves_the_checkpoint_before(train, monkeypatch, capsys):
    left, replace = [], os.replace

    def noted(old, new):
        files = [path for path in Path().iterdir() if path.is_file() and path.suffix != ".png"]
        left.append(sorted(load(name=path)["epoch"] for path in files))  # all are whole
        replace(old, new)

    monkeypatch.setattr(os, "replace", noted)
    train(epochs=1)
    assert not Path(OLD).exists() and "replaced" not in capsys.readouterr().out
    train(epochs=2)
    assert "(epoch 1)" in capsys.readouterr().out.split("epoch 1/2")[0]
    train(epochs=3)
    train(resume=True)
    new_run, resumed = [[1, 1, 2], [1, 2], [1, 2, 2], [2, 2, 3]], [[2, 3, 4]]
    assert left == [[1], [1, 1], [1, 1], [1, 1, 2], *new_run, *resumed]
    assert "replaced" not in capsys.readouterr().out.split("3/3")[1]


def test_interruption_divergence_and_trouble_cost_one_epoch(train, trained, monkeypatch):
    with monkeypatch.context() as patch:
        stop = Mock(wraps=cvae_mnist.evaluate, side_effect=[DEFAULT] * 4 + [KeyboardInterrupt])
        patch.setattr(cvae_mnist, "evaluate", stop)
        pytest.raises(KeyboardInterrupt, train)
    pytest.raises(UserError, train, learning_rate=1e30, resume=True).match("learning_rate")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=PermissionError("no")))
        pytest.raises(PermissionError, train, resume=True)
    assert load()["epoch"] == 2
    refused = Mock(wraps=os.replace, side_effect=[PermissionError] * 4 + [DEFAULT] * 2)
    monkeypatch.setattr(os, "replace", refused)  # for a moment
    Path("cvae_results/epoch_4.png").mkdir()
    pytest.raises(OSError, train, resume=True).match("epoch_4.png")
    assert same(load(), load(trained))


def test_a_full_disk_is_an_error_that_costs_one_epoch(train):
    resource = pytest.importorskip("resource", reason="Windows limits no size of files")
    train(epochs=1)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        pytest.raises(OSError, train, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert load()["epoch"] == 1


def test_two_runs_in_one_folder_both_end_well(train, monkeypatch):
    replace = os.replace

    def replace_after_another_run(old, new):
        monkeypatch.setattr(os, "replace", replace)
        other = get_context("spawn").Process(target=train)
        other.start()
        other.join(timeout=100)
        assert other.exitcode == 0
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_after_another_run)
    train()
    assert load()["epoch"] == 4 and not any(Path().rglob("*.tmp"))


class Added(nn.Module):
    """Layers that a reader adds at the beginning of CVAE's constructor."""

    def __init__(self):
        super().__init__()
        self.more = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 16, bias=False))


class Mine(CVAE, Added):  # CVAE's super() is Added
    """A reader's own model: these layers, and one renamed."""

    def __init__(self, *arguments, **sizes):
        super().__init__(*arguments, **sizes)
        self.hidden = self.fc1
        del self.fc1

    def encode(self, x, c):
        h = self.more(torch.relu(self.hidden(torch.cat([x.flatten(1), c], dim=1))))
        return self.fc2(h), self.fc3(h)


def test_a_readers_model_trains_resumes_and_draws(train, data, trained, monkeypatch):
    model = Mine(784, 16, 200)
    layers = [model.hidden, model.fc2, model.fc3, model.fc4, model.fc5]
    assert not any(layer.bias.any() for layer in layers)
    for layer in *layers, model.more[2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(model.more[1].weight, torch.ones(16))
    monkeypatch.setattr(cvae_mnist, "CVAE", Mine)
    model, whole = train(), load()
    train(epochs=2)
    train(resume=True)
    assert same(load(), whole) and not model.training and model.more[1].running_mean.any()
    for draw in partial(inference_cvae, seed=1), partial(restyle_cvae, [1], data):
        assert torch.equal(draw(), draw())  # no dropout
    pytest.raises(RuntimeError, load_checkpoint, trained).match("hidden.weight")  # PyTorch's own
