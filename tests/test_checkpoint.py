"""Checkpoints: what they hold, other people's, kills and full disks, a reader's own model."""

import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import CHECKPOINT, OLD, SCRIPT, load, same
from test_model import TutorialCVAE
from torch import nn

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, load_checkpoint, restyle_cvae


def test_a_checkpoint_holds_what_the_readme_says_and_loads_into_the_tutorials_model(trained):
    checkpoint, model = load(trained), TutorialCVAE(16, 3)
    sizes = {"batch_size": 32, "h_dim": 16, "z_dim": 3, "num_classes": 10}
    assert checkpoint.pop("hyperparameters") == {
        **sizes, "learning_rate": 3e-3, "seed": 0, "dataset": "MNIST"
    }  # fmt: skip
    states = {"model_state_dict", "training_state_dict", "optimizer_state_dict"}
    assert set(checkpoint) == {"epoch", "history", *states} and checkpoint["epoch"] == 4
    assert not same(checkpoint["model_state_dict"], checkpoint["training_state_dict"])
    model.load_state_dict(checkpoint["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])


def test_the_tutorials_checkpoint_is_drawn_from_and_what_is_missing_is_said(train, data):
    model = TutorialCVAE(600, 50)
    optimizer = torch.optim.Adam(model.parameters())
    states = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save({"epoch": 2, **states}, CHECKPOINT)
    images = inference_cvae(input=6, flag=True, seed=0)
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    h = torch.relu(model.fc4(torch.cat([z, torch.eye(10)[[6] * 10]], dim=1)))
    assert torch.allclose(images.view(10, 784), torch.sigmoid(model.fc5(h)), atol=1e-5)
    with pytest.raises(UserError, match="dataset is missing"):
        restyle_cvae(data_dir=data)
    with pytest.raises(UserError, match="Cannot resume: batch_size is missing"):
        train(resume=True)


def test_a_checkpoint_that_was_saved_on_a_gpu_is_drawn_from_on_a_cpu(trained, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(load(trained), CHECKPOINT)
    assert b"cuda:0" in Path(CHECKPOINT).read_bytes()
    assert torch.equal(inference_cvae(seed=1), inference_cvae(seed=1, out_dir=trained))


class Code:
    def __reduce__(self):
        return open, ("ran", "w")  # writes a file when unpickled


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: torch.save({**load(), "extra": Code()}, path),
        lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
        lambda path: torch.save({"epoch": 3}, path),
        lambda path: torch.save([1, 2, 3], path),
    ],
)
def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays(train, trained, damage):
    path = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT))
    damage(path)
    before = path.read_bytes()
    for call in (partial(train, resume=True), train, inference_cvae):
        with pytest.raises(UserError, match=CHECKPOINT) as error:
            call()
        assert error.value.__suppress_context__  # its text may be advice to load unsafe files
        assert not re.search("(?i)\n|weights_only|safe_globals", str(error.value))
    assert path.read_bytes() == before and not Path("ran").exists()


def test_a_missing_checkpoint_names_an_old_one_and_one_that_cannot_be_read_says_why(train, trained):
    for call in (partial(train, resume=True), inference_cvae, restyle_cvae):
        with pytest.raises(UserError, match=f"{CHECKPOINT}.*[Tt]rain") as error:
            call()
        assert OLD not in str(error.value) and not os.listdir()
    shutil.copy(trained / CHECKPOINT, OLD)
    with pytest.raises(UserError, match=OLD):
        inference_cvae()
    Path(CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    for call in (train, inference_cvae):
        with pytest.raises(OSError, match=CHECKPOINT):
            call()


def test_a_new_run_keeps_the_checkpoint_before_and_says_so_and_a_resumed_run_keeps_none(
    train, capsys
):
    for epochs, kept in (2, None), (1, 2), (3, 1):  # kept: epochs in the old one
        train(epochs=epochs)
        assert (load(name=OLD)["epoch"] if Path(OLD).exists() else None) == kept
        output = capsys.readouterr().out
        assert (f"epoch {kept}" in output.split("epoch 1/")[0]) == bool(kept)
    train(resume=True)
    assert load(name=OLD)["epoch"] == 1 and "replaced" not in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="a limit for the size of files")
def test_a_full_disk_is_an_error_that_costs_one_epoch(train, options, trained):
    train(epochs=2)
    before = load()
    done = subprocess.run(
        f'ulimit -f 50; exec "{sys.executable}" "{SCRIPT}" train --resume {" ".join(options)}',
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode and re.fullmatch("cvae_mnist.py: error: .+\n", done.stderr)
    assert same(load(), before)
    train(resume=True)
    assert same(load(), load(trained))


def train_until_killed(number, keywords):
    """Trains in a process that dies when it is about to rename a file for the number-th time."""
    real, calls = os.replace, []

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            os._exit(9)
        real(*arguments)

    os.replace = replace
    cvae_mnist.train_cvae(**keywords)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_while_it_saves_a_whole_checkpoint_is_left(train, number):
    train(epochs=3)
    before = load()
    arguments = (number, train.keywords)
    process = get_context("spawn").Process(target=train_until_killed, args=arguments)
    process.start()
    process.join(100)
    assert process.exitcode == 9
    left = [load(name=path) for path in (CHECKPOINT, OLD) if Path(path).exists()]
    assert any(same(checkpoint, before) for checkpoint in left)


@pytest.mark.skipif(os.name != "posix", reason="Windows refuses to replace a file in use")
def test_two_runs_in_one_folder_both_end_well(options):
    command = [sys.executable, SCRIPT, "train", *options, "--epochs=30"]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait(timeout=100) for run in runs] == [0, 0]
    assert load()["epoch"] == 30 and not any(Path().rglob("*.tmp"))


def test_a_replacement_that_is_refused_for_a_moment_is_tried_again(train, trained, monkeypatch):
    refused_first = Mock(wraps=os.replace, side_effect=[PermissionError] * 4 + [DEFAULT] * 99)
    monkeypatch.setattr(os, "replace", refused_first)
    train()
    assert same(load(), load(trained))
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError("no")))
    with pytest.raises(PermissionError):
        train(resume=True, epochs=5)


def test_a_picture_that_cannot_be_saved_costs_no_epoch(train, trained):
    Path("cvae_results/epoch_4.png").mkdir(parents=True)
    with pytest.raises(OSError, match="epoch_4.png"):
        train()
    assert same(load(), load(trained))


class Mine(cvae_mnist.CVAE):
    """A reader's own model: a layer renamed, others added."""

    def __init__(self, *arguments, **sizes):
        super().__init__(*arguments, **sizes)
        self.hidden = self.fc1
        del self.fc1
        h_dim = self.hidden.out_features
        self.more = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(h_dim))

    def encode(self, x, c):
        h = self.more(torch.relu(self.hidden(torch.cat([x.flatten(1), c], dim=1))))
        return self.fc2(h), self.fc3(h)


def test_a_readers_model_trains_resumes_and_draws(train, data, trained, monkeypatch):
    monkeypatch.setattr(cvae_mnist, "CVAE", Mine)
    model, whole = train(), load()
    train(epochs=2)
    train(resume=True)
    assert same(load(), whole) and not model.training and model.more[1].running_mean.any()
    for draw in (partial(inference_cvae, seed=1), partial(restyle_cvae, [1], data)):
        assert torch.equal(draw(), draw())  # no dropout
    with pytest.raises(RuntimeError, match="hidden.weight"):  # PyTorch's own error
        load_checkpoint(trained)


def test_layers_that_a_reader_adds_to_the_class_start_as_they_should():
    text = SCRIPT.read_text(encoding="utf-8")
    layers = "nn.Linear(99, 99, bias=False), nn.BatchNorm1d(9)"
    start = "super().__init__()\n"
    assert start in text
    text = text.replace(start, f"{start}        self.more = nn.ModuleList([{layers}])\n", 1)
    Path("mine.py").write_text(text, encoding="utf-8")
    linear, norm = runpy.run_path("mine.py")["CVAE"]().more
    assert 0.018 < linear.weight.std() < 0.022 and torch.equal(norm.weight, torch.ones(9))


def test_a_bug_keeps_its_traceback(trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cvae_mnist.py", "draw", f"--out-dir={trained}"])
    monkeypatch.setattr(torch.nn.functional, "relu", Mock(side_effect=ValueError))
    with pytest.raises(ValueError):
        runpy.run_path(str(SCRIPT), run_name="__main__")
