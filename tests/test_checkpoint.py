"""Checkpoints: what they hold, others' and damaged ones, kills, full disks, a reader's model."""

import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import CHECKPOINT, SCRIPT, SOURCE, load, run, same
from test_model import TutorialCVAE

from cvae_mnist import UserError, inference_cvae, restyle_cvae, train_cvae


@pytest.fixture
def options(quick):
    return [f"--{name.replace('_', '-')}={value}" for name, value in quick.items()]


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


def test_the_tutorials_checkpoint_is_drawn_from_but_not_resumed(data):
    model = TutorialCVAE(600, 50)
    torch.save({"epoch": 99, "model_state_dict": model.state_dict()}, CHECKPOINT)
    images = inference_cvae(input=6, flag=True, seed=0, device="cpu")
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    h = torch.relu(model.fc4(torch.cat([z, torch.eye(10)[[6] * 10]], dim=1)))
    assert torch.allclose(images.view(10, 784), torch.sigmoid(model.fc5(h)), atol=1e-5)
    assert restyle_cvae([0], data_dir=data).shape == (1, 11, 1, 28, 28)
    with pytest.raises(UserError, match="Cannot resume"):
        train_cvae(100, data_dir=data, resume=True, device="cpu")


def test_a_checkpoint_that_was_saved_on_a_gpu_is_drawn_from_on_a_cpu(trained, here):
    cpu, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"  # each after its length
    with zipfile.ZipFile(trained / CHECKPOINT) as old, zipfile.ZipFile(CHECKPOINT, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(cpu, gpu))
    assert gpu in (here / CHECKPOINT).read_bytes()
    assert torch.equal(inference_cvae(seed=1), inference_cvae(seed=1, out_dir=trained))


class Code:
    def __reduce__(self):
        return open, ("ran", "w")  # writes a file when unpickled


@pytest.mark.parametrize("damage", [
    lambda path: torch.save({**load(path.parent), "extra": Code()}, path),
    lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
    lambda path: path.write_bytes(path.read_bytes()[:-10]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
    lambda path: torch.save({"epoch": 3}, path),
    lambda path: torch.save([1, 2, 3], path)])
def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays(quick, trained, here, damage):
    damage(Path(shutil.copy(trained / CHECKPOINT, here)))
    before, train = (here / CHECKPOINT).read_bytes(), partial(train_cvae, **quick)
    for call in (partial(train, resume=True), train, inference_cvae, restyle_cvae):
        with pytest.raises(UserError, match=CHECKPOINT) as error:
            call()
        assert not re.search("(?i)\n|weights_only|safe_globals|delete|remove", str(error.value))
    assert (here / CHECKPOINT).read_bytes() == before and not (here / "ran").exists()


def test_a_missing_checkpoint_says_how_to_train_and_one_that_cannot_be_read_why(quick, here):
    for call in (partial(train_cvae, resume=True), inference_cvae, restyle_cvae):
        with pytest.raises(UserError, match=f"{CHECKPOINT}.*python cvae_mnist.py train"):
            call()
    assert not any(here.iterdir())
    (here / CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    for call in (partial(train_cvae, **quick), inference_cvae):
        with pytest.raises(OSError, match=CHECKPOINT):
            call()


def test_a_rerun_keeps_a_copy_of_the_longest_run_and_resuming_keeps_none(quick):
    old = Path("cvae_checkpoint.old.pth")
    for epochs, resume, kept in (1, 0, None), (2, 1, None), (1, 0, 2), (3, 0, 2), (1, 0, 3):
        train_cvae(**{**quick, "epochs": epochs}, resume=resume)
        assert (torch.load(old)["epoch"] if old.exists() else None) == kept


def test_a_full_disk_or_a_kill_while_saving_loses_nothing(quick, options, trained, here):
    resource = pytest.importorskip("resource")
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    train_cvae(**{**quick, "epochs": 2})
    before = load(here)
    assert b"error: [Errno" in run("train", "--resume", *options, preexec_fn=fill).stderr
    assert same(load(here), before) and not any(here.rglob("*.tmp"))
    killed = SOURCE.replace("os.replace(unfinished, path)", "os._exit(9)")
    Path("mine.py").write_text(killed, encoding="utf-8")
    assert run("train", "--resume", *options, script="mine.py").returncode == 9
    assert same(load(here), before) and any(here.rglob("*.tmp"))
    train_cvae(**quick, resume=True)
    assert same(load(here), load(trained)) and not any(here.rglob("*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_two_runs_in_one_folder_both_end_well(options, here):
    command = [sys.executable, SCRIPT, "train", *options, "--epochs=30"]
    pair = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert load(here)["epoch"] == 30 and not any(here.rglob("*.tmp"))


def test_a_replacement_that_is_refused_for_a_moment_is_tried_again(quick, trained, monkeypatch):
    refused_first = Mock(wraps=os.replace, side_effect=[PermissionError] * 4 + [DEFAULT] * 99)
    monkeypatch.setattr(os, "replace", refused_first)
    train_cvae(**quick)
    assert same(load("."), load(trained))


def test_a_picture_that_cannot_be_saved_costs_no_epoch(quick, trained):
    Path("cvae_results/epoch_4.png").mkdir(parents=True)
    with pytest.raises(OSError, match="epoch_4.png"):
        train_cvae(**quick)
    assert same(load("."), load(trained))


def test_a_readers_model_trains_resumes_and_draws(quick, data, trained):
    layers = "nn.Linear(h_dim, h_dim, bias=False), nn.Dropout(), nn.BatchNorm1d(h_dim)"
    text = SOURCE.replace("self.fc1", "self.hidden")
    text = text.replace("self.fc2 =", f"self.more = nn.Sequential({layers}); self.fc2 =")
    text = text.replace("return self.fc2", "h = self.more(h); return self.fc2")
    Path("mine.py").write_text(text, encoding="utf-8")
    mine = runpy.run_path("mine.py")
    draw = partial(mine["inference_cvae"], seed=1)
    restyle = partial(mine["restyle_cvae"], data_dir=data)
    model, new = mine["train_cvae"](**quick), mine["CVAE"]()
    whole = load(".")
    mine["train_cvae"](**{**quick, "epochs": 2})
    mine["train_cvae"](**quick, resume=True)
    assert same(load("."), whole) and not model.training
    assert model.more[2].running_mean.any() and torch.equal(new.more[2].weight, torch.ones(600))
    assert new.more[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(draw(), draw()) and torch.equal(restyle(), restyle())  # no dropout
    with pytest.raises(RuntimeError, match="hidden.weight"):  # PyTorch's own error
        draw(out_dir=trained)


@pytest.mark.parametrize("bug", [AttributeError, ZeroDivisionError, ValueError, OSError])
def test_a_bug_keeps_its_traceback_but_an_oserror_is_a_message(trained, monkeypatch, bug):
    monkeypatch.setattr(sys, "argv", ["cvae_mnist.py", "draw", f"--out-dir={trained}"])
    monkeypatch.setattr(torch.nn.functional, "relu", Mock(side_effect=bug))
    with pytest.raises(SystemExit if bug is OSError else bug):
        runpy.run_path(str(SCRIPT), run_name="__main__")
