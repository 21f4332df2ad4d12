"""Checkpoints: what they hold, other people's, damaged ones, kills, full disks, two runs, a reader's own model."""

import io
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import sys
import time
import zipfile

import pytest
import torch
from conftest import CHECKPOINT, SOURCE, load, same
from test_model import TutorialCVAE

import cvae_mnist
from cvae_mnist import UserError, inference_cvae, load_checkpoint, restyle_cvae, train_cvae

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def strays(folder):
    return list(folder.rglob("*.tmp"))


def test_a_checkpoint_holds_what_the_readme_says(trained):
    checkpoint = load(trained)
    assert set(checkpoint) == {"epoch", "model_state_dict", "training_state_dict", "optimizer_state_dict",
                               "hyperparameters", "dataset", "history"}
    assert checkpoint["epoch"] == 4 and checkpoint["dataset"] == "MNIST"
    assert checkpoint["hyperparameters"] == dict(
        batch_size=32, learning_rate=3e-3, h_dim=16, z_dim=3, num_classes=10, seed=0)
    assert not same(checkpoint["model_state_dict"], checkpoint["training_state_dict"])


def test_the_tutorials_checkpoint_is_drawn_from_but_not_resumed(data):
    model = TutorialCVAE(600, 50)
    optimizer = torch.optim.Adam(model.parameters())
    torch.save({"epoch": 99, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()},
               CHECKPOINT)
    images = inference_cvae(input=6, flag=True, seed=0, device="cpu")
    z = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(images.view(10, 784), model.decode(z, torch.eye(10)[[6] * 10]), atol=1e-5)
    assert restyle_cvae([0], data_dir=data).shape == (1, 11, 1, 28, 28)
    with pytest.raises(UserError, match="Cannot resume"):
        train_cvae(100, data_dir=data, resume=True, device="cpu")


def test_our_checkpoint_loads_into_the_tutorials_model(trained):
    model = TutorialCVAE(16, 3)
    model.load_state_dict(load(trained)["model_state_dict"])
    torch.optim.Adam(model.parameters()).load_state_dict(load(trained)["optimizer_state_dict"])


def test_a_checkpoint_that_was_saved_on_a_gpu_is_drawn_from_on_a_cpu(trained, here):
    old, new = io.BytesIO((trained / CHECKPOINT).read_bytes()), io.BytesIO()
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            content = source.read(name)  # the tag of a tensor's device is a string with its length before it
            target.writestr(name, content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    (here / CHECKPOINT).write_bytes(new.getvalue())
    assert b"cuda:0" in new.getvalue()
    assert torch.equal(inference_cvae(seed=1, device="cpu"), inference_cvae(seed=1, out_dir=trained, device="cpu"))


class Mine:
    """Unpickling it would write a file into the current folder."""

    def __reduce__(self):
        return open, ("ran", "w")


DAMAGE = {
    "code": lambda path: torch.save({**load(path.parent), "extra": Mine()}, path),
    "a pickle of code": lambda path: path.write_bytes(pickle.dumps(Mine(), protocol=2)),
    "end missing": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
    "another dict": lambda path: torch.save({"epoch": 3}, path),
    "a list": lambda path: torch.save([1, 2, 3], path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_checkpoint_is_a_clear_error_and_stays_there(quick, trained, here, damage):
    (here / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes())
    DAMAGE[damage](here / CHECKPOINT)
    before = (here / CHECKPOINT).read_bytes()
    for call in (lambda: train_cvae(**quick, resume=True), lambda: train_cvae(**quick), inference_cvae, restyle_cvae):
        with pytest.raises(UserError, match=re.escape(CHECKPOINT)) as error:
            call()
        assert "\n" not in str(error.value)
        assert not re.search("weights_only|safe_globals|delete|remove", str(error.value), re.IGNORECASE)
    assert (here / CHECKPOINT).read_bytes() == before and not (here / "ran").exists()


@pytest.mark.parametrize("call", [lambda: train_cvae(resume=True), inference_cvae, restyle_cvae])
def test_without_a_checkpoint_the_error_says_how_to_train(call, here):
    with pytest.raises(UserError, match=f"{re.escape(CHECKPOINT)}.*python cvae_mnist.py train"):
        call()
    assert not any(here.iterdir())


def test_a_checkpoint_that_cannot_be_read_gives_the_systems_reason(quick, here):
    (here / CHECKPOINT).mkdir()  # root may read every file, but no folder as a file
    for call in (inference_cvae, lambda: train_cvae(**quick)):
        with pytest.raises(OSError, match=re.escape(CHECKPOINT)):
            call()


# A rerun


def test_a_rerun_keeps_a_copy_of_the_longest_run(quick, here):
    for epochs, kept in [(2, None), (1, 2), (3, 2), (1, 3)]:
        train_cvae(**{**quick, "epochs": epochs})
        old = here / "cvae_checkpoint.old.pth"
        assert load(here)["epoch"] == epochs
        assert (torch.load(old)["epoch"] if old.exists() else None) == kept


def test_resuming_keeps_no_copy(quick, here):
    train_cvae(**{**quick, "epochs": 1})
    train_cvae(**{**quick, "epochs": 2}, resume=True)
    assert not (here / "cvae_checkpoint.old.pth").exists()


# Kills and disks


@pytest.fixture(scope="module")
def processes():
    """Starts processes from one that has imported everything already."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cvae_mnist"])
    return context


def train_and_die_while_saving(options):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train_cvae(**options, resume=True)


@posix
def test_a_kill_while_saving_loses_nothing_and_the_next_run_tidies_up(processes, quick, trained, here):
    train_cvae(**{**quick, "epochs": 2})
    before = load(here)
    process = processes.Process(target=train_and_die_while_saving, args=(quick,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and same(load(here), before) and strays(here)
    train_cvae(**quick, resume=True)
    assert same(load(here), load(trained)) and not strays(here)


@posix
def test_two_runs_in_one_folder_both_end_well(processes, quick, trained, here):
    pair = [processes.Process(target=train_cvae, kwargs={**quick, "epochs": 30}) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    assert load_checkpoint(here)[0]["epoch"] == 30 and not strays(here)


def train_on_a_full_disk(options):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may be larger, for root as well
    cvae_mnist.main(["train", "--resume", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())])


@posix
def test_a_full_disk_keeps_what_is_there(processes, quick, here):
    train_cvae(**{**quick, "epochs": 2})
    before = load(here)
    process = processes.Process(target=train_on_a_full_disk, args=(quick,))
    process.start()
    process.join()
    assert process.exitcode == 1 and same(load(here), before) and not strays(here)


@pytest.mark.parametrize("refusals", [1, 4])
def test_a_replacement_that_is_refused_for_a_moment_is_tried_again(quick, trained, monkeypatch, refusals):
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) <= refusals:
            raise PermissionError(13, "Access is denied")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    train_cvae(**quick)
    assert same(load("."), load(trained))


def test_a_picture_that_cannot_be_saved_costs_no_epoch(quick, here, trained, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (here / "cvae_results" / "epoch_4.png").mkdir(parents=True)
    with pytest.raises(OSError, match="epoch_4.png"):
        train_cvae(**quick)
    assert same(load("."), load(trained))


# A reader's own model

EDITS = {
    "a layer renamed": [("self.fc1", "self.hidden")],
    "layers added": [
        ("        for layer in self.modules()", "        self.norm = nn.BatchNorm1d(h_dim)\n"
         "        self.more = nn.Linear(h_dim, h_dim, bias=False)\n        for layer in self.modules()"),
        ("h = F.relu(self.fc1(torch.cat([x.flatten(1), c], dim=1)))",
         "h = self.norm(self.more(F.dropout(self.fc1(torch.cat([x.flatten(1), c], 1)), training=self.training)))")],
}


def edited(here, edits, **options):
    """The script with some changes, as a module's dict."""
    text = SOURCE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (here / "mine.py").write_text(text, encoding="utf-8")
    return runpy.run_path(str(here / "mine.py"), **options)


@pytest.mark.parametrize("change", EDITS)
def test_a_readers_model_trains_resumes_and_draws(quick, here, data, change):
    mine = edited(here, EDITS[change])
    model = mine["train_cvae"](**quick, out_dir="whole")
    mine["train_cvae"](**{**quick, "epochs": 2}, out_dir="parts")
    mine["train_cvae"](**quick, out_dir="parts", resume=True)
    assert same(load("parts"), load("whole")) and not model.training
    one, other = [mine["inference_cvae"](seed=1, out_dir="whole", device="cpu") for _ in range(2)]
    assert torch.equal(one, other)  # nothing is dropped out
    assert mine["restyle_cvae"](data_dir=data, out_dir="whole").shape == (10, 11, 1, 28, 28)
    if change == "layers added":
        assert model.norm.running_mean.abs().max() > 0 and torch.equal(mine["CVAE"]().norm.weight, torch.ones(600))
        assert mine["CVAE"]().more.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_another_model_than_the_checkpoints_is_pytorchs_own_error(trained, here):
    mine = edited(here, EDITS["a layer renamed"])
    with pytest.raises(RuntimeError, match="hidden.weight"):
        mine["inference_cvae"](out_dir=trained)


@pytest.mark.parametrize("bug", ["self.fc9(x)", "open('nothing')", "1 / 0"])
def test_a_readers_bug_keeps_its_traceback(trained, here, data, monkeypatch, bug):
    edits = [("        h = F.relu(self.fc1", f"        {bug}\n        h = F.relu(self.fc1")]
    monkeypatch.setattr(sys, "argv", [str(here / "mine.py"), "restyle", "--data-dir", str(data), "--out-dir", str(trained)])
    error = SystemExit if "open" in bug else (AttributeError, ZeroDivisionError)
    with pytest.raises(error):
        edited(here, edits, run_name="__main__")
