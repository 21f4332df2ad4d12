"""Checkpoints: what they hold, other people's, kills and full disks, a reader's own model."""

import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import CHECKPOINT, SCRIPT, SOURCE, load, run, same
from test_model import TutorialCVAE

from cvae_mnist import UserError, inference_cvae, restyle_cvae


def test_a_checkpoint_holds_what_the_readme_says_and_loads_into_the_tutorials_model(trained):
    checkpoint, model = load(trained), TutorialCVAE(16, 3)
    assert set(checkpoint) == {"epoch", "model_state_dict", "training_state_dict", "dataset",
                               "optimizer_state_dict", "hyperparameters", "history"}
    assert checkpoint["epoch"] == 4 and checkpoint["dataset"] == "MNIST"
    assert checkpoint["hyperparameters"] == dict(
        batch_size=32, learning_rate=3e-3, h_dim=16, z_dim=3, num_classes=10, seed=0)
    assert not same(checkpoint["model_state_dict"], checkpoint["training_state_dict"])
    model.load_state_dict(checkpoint["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])


def test_the_tutorials_checkpoint_is_drawn_from_but_not_resumed(train, data):
    model = TutorialCVAE(600, 50)
    torch.save({"epoch": 2, "model_state_dict": model.state_dict()}, CHECKPOINT)
    images = inference_cvae(input=6, flag=True, seed=0, device="cpu")
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    h = torch.relu(model.fc4(torch.cat([z, torch.eye(10)[[6] * 10]], dim=1)))
    assert torch.allclose(images.view(10, 784), torch.sigmoid(model.fc5(h)), atol=1e-5)
    assert restyle_cvae([0], data_dir=data).shape == (1, 11, 1, 28, 28)
    with pytest.raises(UserError, match="Cannot resume"):
        train(resume=True)


def test_a_checkpoint_that_was_saved_on_a_gpu_is_drawn_from_on_a_cpu(trained, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(load(trained), CHECKPOINT)
    assert b"cuda:0" in Path(CHECKPOINT).read_bytes()
    assert torch.equal(inference_cvae(seed=1), inference_cvae(seed=1, out_dir=trained))


class Code:
    def __reduce__(self):
        return open, ("ran", "w")  # writes a file when unpickled


@pytest.mark.parametrize("damage", [
    lambda path: torch.save({**load(), "extra": Code()}, path),
    lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
    lambda path: path.write_bytes(path.read_bytes()[:-10]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
    lambda path: torch.save({"epoch": 3}, path),
    lambda path: torch.save([1, 2, 3], path)])
def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays(train, trained, damage):
    path = Path(shutil.copy(trained / CHECKPOINT, CHECKPOINT))
    damage(path)
    before = path.read_bytes()
    for call in (partial(train, resume=True), train, inference_cvae):
        with pytest.raises(UserError, match=CHECKPOINT) as error:
            call()
        assert not re.search("(?i)\n|weights_only|safe_globals|delete|remove", str(error.value))
    assert path.read_bytes() == before and not Path("ran").exists()


def test_a_missing_checkpoint_says_how_to_train_and_one_that_cannot_be_read_why(train):
    for call in (partial(train, resume=True), inference_cvae, restyle_cvae):
        with pytest.raises(UserError, match=f"{CHECKPOINT}.*python cvae_mnist.py train"):
            call()
    assert not os.listdir()
    Path(CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    for call in (train, inference_cvae):
        with pytest.raises(OSError, match=CHECKPOINT):
            call()


def test_a_rerun_keeps_a_copy_of_the_longest_run_and_resuming_keeps_none(train):
    old = Path("cvae_checkpoint.old.pth")
    for epochs, kept in (2, None), (1, 2), (3, 2), (1, 3):  # kept: epochs in the copy
        train(epochs=epochs)
        assert (torch.load(old)["epoch"] if old.exists() else None) == kept
    train(epochs=2, resume=True)
    assert torch.load(old)["epoch"] == 3


def test_a_full_disk_or_a_kill_while_saving_loses_nothing(train, options, trained, monkeypatch):
    def full_disk(path, content):
        path.touch()
        raise OSError("No space left on device")

    train(epochs=2)
    before = load()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_bytes", full_disk)
        train(resume=True)
    assert same(load(), before) and not any(Path().rglob("*.tmp"))
    killed = SOURCE.replace("os.replace(unfinished, path)", "os._exit(9)")
    Path("mine.py").write_text(killed, encoding="utf-8")
    assert run("train", "--resume", *options, script="mine.py").returncode == 9
    assert same(load(), before) and any(Path().rglob("*.tmp"))
    train(resume=True)
    assert same(load(), load(trained)) and not any(Path().rglob("*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="Windows refuses to replace a file in use")
def test_two_runs_in_one_folder_both_end_well(options):
    command = [sys.executable, SCRIPT, "train", *options, "--epochs=30"]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait(timeout=100) for run in runs] == [0, 0]
    assert load()["epoch"] == 30 and not any(Path().rglob("*.tmp"))


def test_a_replacement_that_is_refused_for_a_moment_is_tried_again(train, trained, monkeypatch):
    refused_first = Mock(wraps=os.replace, side_effect=[PermissionError] * 4 + [DEFAULT] * 99)
    monkeypatch.setattr(os, "replace", refused_first)
    Path(f"{CHECKPOINT}.1.tmp").mkdir()  # a leftover that cannot be removed
    train()
    assert same(load(), load(trained))
    assert len({call.args[0] for call in refused_first.call_args_list}) == 6  # a name for each file


def test_a_picture_that_cannot_be_saved_costs_no_epoch(train, trained):
    Path("cvae_results/epoch_4.png").mkdir(parents=True)
    with pytest.raises(OSError, match="epoch_4.png"):
        train()
    assert same(load(), load(trained))


def test_a_readers_model_trains_resumes_and_draws(train, data, trained):
    layers = "nn.Linear(h_dim, h_dim, bias=False), nn.Dropout(), nn.BatchNorm1d(h_dim)"
    text = SOURCE.replace("self.fc1", "self.hidden")
    text = text.replace("self.fc2 =", f"self.more = nn.Sequential({layers}); self.fc2 =")
    text = text.replace("return self.fc2", "h = self.more(h); return self.fc2")
    Path("mine.py").write_text(text, encoding="utf-8")
    mine = runpy.run_path("mine.py")
    train = partial(mine["train_cvae"], **train.keywords)
    model, whole = train(), load()
    linear, _, norm = mine["CVAE"]().more
    train(epochs=2)
    train(resume=True)
    assert same(load(), whole) and not model.training and model.more[2].running_mean.any()
    assert 0.019 < linear.weight.std() < 0.021 and torch.equal(norm.weight, torch.ones(600))
    for draw in (partial(mine["inference_cvae"], seed=1), partial(mine["restyle_cvae"], [1], data)):
        assert torch.equal(draw(), draw())  # no dropout
    with pytest.raises(RuntimeError, match="hidden.weight"):  # PyTorch's own error
        mine["inference_cvae"](out_dir=trained)


def test_a_bug_keeps_its_traceback(trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cvae_mnist.py", "draw", f"--out-dir={trained}"])
    monkeypatch.setattr(torch.nn.functional, "relu", Mock(side_effect=ValueError))
    with pytest.raises(ValueError):
        runpy.run_path(str(SCRIPT), run_name="__main__")
