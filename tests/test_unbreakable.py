"""What can go wrong and must not do harm: kills, full disks, Ctrl-C, strangers' files, bad arguments, bad data."""

import copy
import errno
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, write_mnist

import cvae_mnist

CHECKPOINT = "cvae_checkpoint.pth"
LONG = 5000  # epochs that no test waits for
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Enough for what is this small, and the same in all processes: another number of threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few(tmp_path_factory, digits):
    return write_few(tmp_path_factory.mktemp("few"), digits)


@pytest.fixture(scope="module")
def tiny(few):
    """Arguments that make four epochs a matter of moments."""
    return dict(epochs=4, batch_size=32, learning_rate=2e-3, h_dim=16, z_dim=3, data_dir=few, device="cpu")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny):
    """What four epochs in one go leave behind. Read only: a test that resumes or damages it takes a copy."""
    folder = tmp_path_factory.mktemp("straight")
    cvae_mnist.train_cvae(out_dir=folder, **tiny)
    return folder


@pytest.fixture
def done(straight, tmp_path):
    return Path(shutil.copytree(straight, tmp_path / "done"))


@pytest.fixture(scope="module")
def processes():
    """Starts processes from one that has imported everything already: a kill costs no new import of PyTorch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cvae_mnist"])
    return context


@pytest.fixture
def no_data(monkeypatch):
    """Reading or making data fails the test."""
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *_, **__: pytest.fail("data was read"))
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda *_, **__: pytest.fail("digits were made"))


def write_few(folder, digits):
    (x, labels), (test_x, test_labels) = digits
    return write_mnist(folder, (x[:300], labels[:300]), (test_x[:60], test_labels[:60]))


def load(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)


def same(one, other):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def kill_while_training(processes, epoch, options):
    """Trains in another process and kills that at a random moment after the epoch."""
    options = {**options, "epochs": LONG}
    process = processes.Process(target=cvae_mnist.train_cvae, kwargs=options, daemon=True)
    process.start()
    try:
        while not (options["out_dir"] / CHECKPOINT).exists() or load(options["out_dir"])["epoch"] < epoch:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def strays(folder):
    return [path for path in folder.rglob("*") if "unfinished" in path.name or "tmp" in path.name]


def break_training(monkeypatch, epoch, breakage):
    """From the epoch on, train_epoch's model and result go through breakage."""
    train_epoch = cvae_mnist.train_epoch

    def broken(model, *arguments):
        result = train_epoch(model, *arguments)
        return breakage(model, result) if arguments[-1] >= epoch else result

    monkeypatch.setattr(cvae_mnist, "train_epoch", broken)


def interrupt(*_):
    raise KeyboardInterrupt


# Resuming


@pytest.mark.parametrize("kind", [{}, {"textbook": True}, {"num_classes": 0}], ids=str)
def test_stopping_and_resuming_changes_no_bit(tiny, tmp_path, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = cvae_mnist.train_cvae(out_dir=whole, **tiny, **kind)
    first = cvae_mnist.train_cvae(out_dir=parts, **{**tiny, **kind, "epochs": 2})
    torch.manual_seed(99)  # what else the process did must not matter
    second = cvae_mnist.train_cvae(out_dir=parts, resume=True, **tiny, **kind)
    assert same(load(parts), load(whole))
    assert same(second.state_dict(), expected.state_dict())
    assert same(second.state_dict(), load(parts)["model_state_dict"])
    assert not same(second.state_dict(), first.state_dict())


def test_the_seed_decides_the_weights(tiny, straight, tmp_path):
    again = cvae_mnist.train_cvae(out_dir=tmp_path / "again", **tiny).state_dict()
    other = cvae_mnist.train_cvae(out_dir=tmp_path / "other", **tiny, seed=1).state_dict()
    before = load(straight)["model_state_dict"]
    assert same(again, before)
    assert not any(torch.equal(other[name], before[name]) for name in before)


@POSIX
def test_a_killed_run_resumes_as_if_never_killed(processes, tiny, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_while_training(processes, 1, {**tiny, "out_dir": killed})
    epoch = load(killed)["epoch"]
    assert 1 <= epoch < LONG
    cvae_mnist.train_cvae(out_dir=killed, resume=True, **{**tiny, "epochs": epoch + 2})
    cvae_mnist.train_cvae(out_dir=whole, **{**tiny, "epochs": epoch + 2})
    assert same(load(killed), load(whole))


def test_resuming_a_finished_run_trains_nothing_and_draws_the_figure_again(tiny, done, monkeypatch):
    before = (done / CHECKPOINT).read_bytes()
    (done / "CVAE_loss.png").unlink()
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: pytest.fail("trained"))
    model = cvae_mnist.train_cvae(out_dir=done, resume=True, **tiny)
    assert same(model.state_dict(), load(done)["model_state_dict"])
    assert (done / CHECKPOINT).read_bytes() == before
    assert (done / "CVAE_loss.png").stat().st_size > 1000


def test_resuming_to_fewer_epochs_is_refused(tiny, done):
    with pytest.raises(ValueError, match="epochs=3 .* 4 "):
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, "epochs": 3})
    assert load(done)["epoch"] == 4


def test_resuming_with_other_hyperparameters_names_all_of_them(tiny, done, no_data):
    asked = dict(batch_size=64, learning_rate=0.25, h_dim=17, z_dim=5, num_classes=0, seed=7, textbook=True)
    before = (done / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(done / CHECKPOINT))) as error:
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, **asked})
    was = load(done)["hyperparameters"]
    assert set(was) == set(asked)
    for name, value in asked.items():
        assert f"{name}={was[name]!r}, not {value!r}" in str(error.value)
    with pytest.raises(ValueError, match="seed=0, not 7") as error:
        cvae_mnist.train_cvae(out_dir=done, resume=True, **tiny, seed=7)
    assert "z_dim" not in str(error.value)
    assert (done / CHECKPOINT).read_bytes() == before


def test_resuming_on_another_data_set_is_refused(tiny, done):
    torch.save({**load(done), "dataset": "built-in digits"}, done / CHECKPOINT)
    with pytest.raises(ValueError, match="built-in digits.*MNIST"):
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, "epochs": 5})
    assert load(done)["epoch"] == 4


@pytest.mark.parametrize("call", ["train_cvae", "inference_cvae", "restyle_cvae"])
def test_without_a_checkpoint_the_error_says_how_to_train(call, tmp_path, no_data):
    options = {"resume": True} if call == "train_cvae" else {}
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / CHECKPOINT))) as error:
        getattr(cvae_mnist, call)(out_dir=tmp_path, **options)
    assert "train_cvae()" in str(error.value) and "python cvae_mnist.py train" in str(error.value)
    assert not any(tmp_path.iterdir())


# Kills and disks


@POSIX
def test_kills_at_any_moment_leave_a_whole_checkpoint(processes, tiny, tmp_path):
    epoch = 0
    for kill in range(8):
        kill_while_training(processes, epoch + 1, {**tiny, "out_dir": tmp_path, "resume": kill > 0})
        assert load(tmp_path)["epoch"] > epoch
        epoch = load(tmp_path)["epoch"]
        assert len(strays(tmp_path)) <= 1
    cvae_mnist.train_cvae(out_dir=tmp_path, resume=True, **{**tiny, "epochs": epoch + 1})
    assert strays(tmp_path) == []


def train_and_die_in(name, options):
    setattr(os, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    cvae_mnist.train_cvae(**options)


@POSIX
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_in_the_middle_of_writing_loses_nothing(processes, tiny, straight, done, name):
    options = {**tiny, "epochs": 6, "out_dir": done, "resume": True}
    process = processes.Process(target=train_and_die_in, args=(name, options))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert same(load(done), load(straight))
    assert len(strays(done)) == 1
    cvae_mnist.train_cvae(**options)
    assert load(done)["epoch"] == 6 and strays(done) == []


def test_a_full_disk_keeps_the_checkpoint(tiny, straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small disk")
    try:
        out_dir = shutil.copytree(straight, disk / "out")
        free = shutil.disk_usage(disk).free - 100_000  # room for a quarter of a checkpoint
        (disk / "filler").write_bytes(bytes(free))
        with pytest.raises(RuntimeError, match=f"{re.escape(str(out_dir / CHECKPOINT))} could not be written") as error:
            cvae_mnist.train_cvae(out_dir=out_dir, resume=True, **{**tiny, "epochs": 6})
        assert os.strerror(errno.ENOSPC) in str(error.value)
        assert same(load(out_dir), load(straight)) and strays(out_dir) == []
        (disk / "filler").unlink()
        cvae_mnist.train_cvae(out_dir=out_dir, resume=True, **{**tiny, "epochs": 6})
        assert load(out_dir)["epoch"] == 6
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("cause", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("call", "name"),
    [("train_cvae", CHECKPOINT), ("inference_cvae", "CVAE_0-9.png"), ("restyle_cvae", "CVAE_styles.png")],
)
def test_a_failed_write_names_the_file_and_leaves_no_stray(tiny, straight, done, monkeypatch, cause, call, name):
    def fail(*_):
        raise OSError(errno.EIO, "the disk is on fire")

    options = {
        "train_cvae": {**tiny, "epochs": 6, "resume": True},
        "inference_cvae": {},
        "restyle_cvae": {"data_dir": tiny["data_dir"]},
    }[call]
    monkeypatch.setattr(os, cause, fail)
    with pytest.raises(RuntimeError, match=f"{re.escape(str(done / name))} could not be written.*on fire"):
        getattr(cvae_mnist, call)(out_dir=done, **options)
    assert same(load(done), load(straight)) and strays(done) == []


# Ctrl-C


@POSIX
def test_ctrl_c_on_the_command_line_says_how_to_go_on(few, tmp_path):
    command = [sys.executable, str(SCRIPT), "train", "--epochs", str(LONG), "--h-dim", "16", "--z-dim", "3"]
    command += ["--data-dir", str(few), "--out-dir", str(tmp_path), "--device", "cpu"]
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731, background jobs do not
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, cwd=tmp_path
    )
    try:
        while not process.stdout.readline().startswith("epoch 1/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert f"epoch {load(tmp_path)['epoch']};" in last and "--resume" in last and str(tmp_path / CHECKPOINT) in last
    assert strays(tmp_path) == []


def test_ctrl_c_from_python_says_how_to_go_on(tiny, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_training(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"epoch 1;.*resume=True"):
            cvae_mnist.train_cvae(out_dir=tmp_path, **tiny)
    assert load(tmp_path)["epoch"] == 1
    cvae_mnist.train_cvae(out_dir=tmp_path, resume=True, **tiny)
    assert same(load(tmp_path), load(straight))


def test_ctrl_c_in_the_first_epoch_promises_no_checkpoint(tiny, tmp_path, monkeypatch):
    break_training(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt, match="[Nn]o epoch") as stop:
        cvae_mnist.train_cvae(out_dir=tmp_path, **tiny)
    assert "resume" not in str(stop.value) and not (tmp_path / CHECKPOINT).exists()


# Checkpoints that are none


class Mine:
    """Unpickling it would write a file into the current folder."""

    def __reduce__(self):
        return open, ("ran", "w")


def pickled(path, value):
    path.write_bytes(pickle.dumps(value, protocol=2))


def folder_instead(path):
    path.unlink()
    path.mkdir()


def without(dictionary, *names):
    return {name: value for name, value in dictionary.items() if name not in names}


def with_weights(path, change):
    checkpoint = load(path.parent)
    torch.save({**checkpoint, "model_state_dict": change(checkpoint["model_state_dict"])}, path)


DAMAGE = {
    "stranger's code": lambda path: torch.save({**load(path.parent), "extra": Mine()}, path),
    "stranger's pickle": lambda path: pickled(path, Mine()),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "end missing": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "list": lambda path: torch.save([1, 2, 3], path),
    "number": lambda path: torch.save(3, path),
    "other dict": lambda path: torch.save({"epoch": 3}, path),
    "bare weights": lambda path: torch.save(load(path.parent)["model_state_dict"], path),
    "weights that are a list": lambda path: with_weights(path, lambda weights: list(weights.values())),
    "other model": lambda path: with_weights(path, lambda _: torch.nn.Linear(784, 10).state_dict()),
    "other images": lambda path: with_weights(path, lambda _: cvae_mnist.CVAE(900, 16, 3).state_dict()),
    "other classes": lambda path: with_weights(path, lambda _: cvae_mnist.CVAE(784, 16, 3, 26).state_dict()),
    "weight missing": lambda path: with_weights(path, lambda weights: without(weights, "fc5.bias")),
    "sizes that disagree": lambda path: with_weights(path, lambda weights: {**weights, "fc4.bias": torch.zeros(5)}),
    "NaN": lambda path: with_weights(path, lambda weights: {**weights, "fc3.bias": torch.full([3], math.nan)}),
    "infinity": lambda path: with_weights(path, lambda weights: {**weights, "fc3.bias": torch.full([3], math.inf)}),
    "folder": folder_instead,
}


@pytest.mark.parametrize("call", ["train_cvae", "inference_cvae", "restyle_cvae"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_none_is_one_clear_error(tiny, done, tmp_path, monkeypatch, no_data, damage, call):
    monkeypatch.chdir(tmp_path)
    DAMAGE[damage](done / CHECKPOINT)
    before = sorted(tmp_path.rglob("*"))
    options = {"train_cvae": {**tiny, "resume": True}, "restyle_cvae": {"data_dir": tiny["data_dir"]}}.get(call, {})
    with pytest.raises(ValueError, match=re.escape(str(done / CHECKPOINT))) as error:
        getattr(cvae_mnist, call)(out_dir=done, **options)
    assert "\n" not in str(error.value)
    assert "weights_only" not in "".join(traceback.format_exception(error.value))
    assert sorted(tmp_path.rglob("*")) == before  # above all, not the file that a stranger's code would write


def test_the_strangers_code_would_run_if_it_could(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Mine(), "evil")
    torch.load("evil", weights_only=False).close()
    assert Path("ran").exists()


def test_a_checkpoint_of_the_tutorials_listing_can_be_drawn_from_but_not_resumed(tiny, done, no_data):
    checkpoint = load(done)
    keys = ("epoch", "model_state_dict", "optimizer_state_dict")
    torch.save({key: checkpoint[key] for key in keys}, done / CHECKPOINT)
    assert cvae_mnist.inference_cvae(out_dir=done).shape == (10, 1, 28, 28)
    with pytest.raises(ValueError, match=f"{re.escape(str(done / CHECKPOINT))}.*resume"):
        cvae_mnist.train_cvae(out_dir=done, resume=True, **tiny)


def test_a_checkpoint_of_the_tutorials_listing_can_be_restyled(tiny, done):
    torch.save(without(load(done), "dataset", "history", "hyperparameters", "training_state_dict"), done / CHECKPOINT)
    assert cvae_mnist.restyle_cvae([0], data_dir=tiny["data_dir"], out_dir=done).shape == (1, 11, 1, 28, 28)


def change(*route):
    """Replaces what the keys of route but the last lead to by that last."""
    *keys, last, value = route

    def damage(checkpoint):
        for key in keys:
            checkpoint = checkpoint[key]
        checkpoint[last] = value

    return damage


def remove(*route):
    *keys, last = route

    def damage(checkpoint):
        for key in keys:
            checkpoint = checkpoint[key]
        del checkpoint[last]

    return damage


TRAINING_DAMAGE = {
    "no training weights": remove("training_state_dict"),
    "training weights a list": change("training_state_dict", [1.0]),
    "a training weight missing": remove("training_state_dict", "fc1.bias"),
    "a training weight of another size": change("training_state_dict", "fc1.bias", torch.zeros(3)),
    "a training weight NaN": change("training_state_dict", "fc1.bias", torch.full([16], math.nan)),
    "no optimizer": remove("optimizer_state_dict"),
    "optimizer a word": change("optimizer_state_dict", "adam"),
    "no optimizer state": change("optimizer_state_dict", "state", {}),
    "optimizer state of one weight missing": remove("optimizer_state_dict", "state", 3),
    "no param_groups": remove("optimizer_state_dict", "param_groups"),
    "a momentum of another size": change("optimizer_state_dict", "state", 1, "exp_avg", torch.zeros(3)),
    "a momentum NaN": change("optimizer_state_dict", "state", 1, "exp_avg", torch.full([16], math.nan)),
    "no second moment": remove("optimizer_state_dict", "state", 1, "exp_avg_sq"),
    "a second moment of another size": change("optimizer_state_dict", "state", 1, "exp_avg_sq", torch.zeros(3)),
    "a second moment NaN": change("optimizer_state_dict", "state", 1, "exp_avg_sq", torch.full([16], math.nan)),
    "no step": remove("optimizer_state_dict", "state", 1, "step"),
    "no history": remove("history"),
    "history a list": change("history", [1.0, 2.0, 3.0, 4.0]),
    "history empty": change("history", {}),
    "a loss missing": remove("history", "kl"),
    "train_loss missing": remove("history", "train_loss"),
    "a loss too short": change("history", "kl", [1.0]),
    "a loss of words": change("history", "kl", ["high", "lower", "low", "lowest"]),
    "another epoch": change("epoch", 7),
    "no epoch": remove("epoch"),
    "no data set": remove("dataset"),
    "no hyperparameters": remove("hyperparameters"),
    "hyperparameters a list": change("hyperparameters", [1]),
}


@pytest.mark.parametrize("damage", TRAINING_DAMAGE)
def test_a_damaged_training_state_is_refused_before_training(tiny, done, monkeypatch, damage):
    checkpoint = copy.deepcopy(load(done))
    TRAINING_DAMAGE[damage](checkpoint)
    torch.save(checkpoint, done / CHECKPOINT)
    monkeypatch.setattr(cvae_mnist, "train_epoch", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=re.escape(str(done / CHECKPOINT))):
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, "epochs": 5})


# Bad arguments

NUMBERS = [math.nan, math.inf, -math.inf, -1, True, None, "6", [6]]
BAD_ARGUMENTS = {
    "train_cvae": {
        "epochs": [0, 1.5, 2.0, *NUMBERS],
        "batch_size": [0, 1.5, *NUMBERS],
        "h_dim": [0, 1.5, *NUMBERS],
        "z_dim": [0, 1.5, *NUMBERS],
        "learning_rate": [0, 0.0, *NUMBERS],
        "num_classes": [1, 9, 11, 10.0, False, *NUMBERS],
        "seed": [2**32, 1.5, *NUMBERS],
        "resume": [1, 0, None, "yes"],
        "textbook": [1, 0, None, "yes"],
        "device": ["gpu", "", "meta", "cuda:99", 1.5, "cpu, please"],
        "data_dir": [None, 3, True],
        "out_dir": [None, 3, True],
    },
    "inference_cvae": {
        "input": [10, 12, 5.5, 6.0, *NUMBERS],
        "flag": [1, 0, None, "yes"],
        "temperature": NUMBERS,
        "seed": [2**32, 1.5, *[value for value in NUMBERS if value is not None]],
        "device": ["gpu", "meta", "cuda:99"],
        "out_dir": [None, 3, True],
    },
    "restyle_cvae": {
        "indices": [[], [-1], [1.5], [True], ["3"], [math.nan], [None], [0] * 101, 5, "5", True],
        "device": ["gpu", "meta", "cuda:99"],
        "data_dir": [None, 3, True],
        "out_dir": [None, 3, True],
    },
}
if not torch.cuda.is_available():
    for arguments in BAD_ARGUMENTS.values():
        arguments["device"].append("cuda")


def refuse(call, name, value, **others):
    options = {"flag": True} if name == "input" else {}
    with pytest.raises(ValueError, match=rf"^{name}\b") as error:
        getattr(cvae_mnist, call)(**{**options, **others, name: value})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [(call, name, value) for call, bad in BAD_ARGUMENTS.items() for name, values in bad.items() for value in values],
    ids=repr,
)
def test_a_bad_argument_is_refused_at_once(tmp_path, monkeypatch, no_data, call, name, value):
    monkeypatch.chdir(tmp_path)
    assert repr(value) in refuse(call, name, value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["train_cvae", "inference_cvae", "restyle_cvae"])
@pytest.mark.parametrize("name", ["out_dir", "data_dir"])
def test_a_file_is_no_folder(tmp_path, monkeypatch, no_data, call, name):
    if (call, name) == ("inference_cvae", "data_dir"):
        return
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, str(file), "file"):
        assert "file" in refuse(call, name, path)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "mine"


@pytest.mark.parametrize("name", ["out_dir", "data_dir"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, no_data, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for path in ("file/below", "file/far/below"):
        assert path in refuse("train_cvae", name, path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where not even root can write")
def test_a_folder_that_cannot_be_written_is_refused(no_data):
    for path in ("/proc", "/proc/below"):
        assert path in refuse("train_cvae", "out_dir", path)


def test_a_folder_that_turned_read_only_is_refused_before_any_work(done, monkeypatch, no_data):
    def fail(*_, **__):
        raise OSError(errno.EROFS, "read-only, sorry")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    for call in ("train_cvae", "inference_cvae", "restyle_cvae"):
        assert "sorry" in refuse(call, "out_dir", done)


def test_a_file_where_the_grids_go_is_found_before_training(tiny, tmp_path, no_data):
    (tmp_path / "cvae_results").write_text("mine")
    assert "cvae_results" in refuse("train_cvae", "out_dir", tmp_path, **tiny)


def test_an_index_beyond_the_test_images_is_refused(few, done):
    assert "60" in refuse("restyle_cvae", "indices", [3, 60], data_dir=few, out_dir=done)
    assert not (done / "CVAE_styles.png").exists()


def test_a_plain_vae_draws_no_digit_on_request(tmp_path):
    torch.save({"model_state_dict": cvae_mnist.CVAE(784, 16, 3, 0).state_dict()}, tmp_path / CHECKPOINT)
    assert cvae_mnist.inference_cvae(out_dir=tmp_path).shape == (10, 1, 28, 28)
    refuse("inference_cvae", "flag", True, out_dir=tmp_path)


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_whole_numbers_from_numpy_are_whole_numbers(tiny, tmp_path, whole):
    numbers = dict(epochs=1, batch_size=32, h_dim=16, z_dim=3, num_classes=10, seed=200)
    cvae_mnist.train_cvae(out_dir=tmp_path / "a", **{**tiny, **numbers})
    numbers = {name: whole(value) for name, value in numbers.items()}
    cvae_mnist.train_cvae(out_dir=tmp_path / "b", **{**tiny, **numbers})
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))
    cvae_mnist.train_cvae(out_dir=tmp_path / "b", **{**tiny, **numbers, "epochs": whole(2)}, resume=True)
    drawn = [cvae_mnist.inference_cvae(kind(6), True, seed=kind(5), out_dir=tmp_path / "b") for kind in (int, whole)]
    assert torch.equal(*drawn) and (tmp_path / "b" / "CVAE_6.png").exists()
    options = {"data_dir": tiny["data_dir"], "out_dir": tmp_path / "b"}
    assert torch.equal(*[cvae_mnist.restyle_cvae([kind(7), kind(8)], **options) for kind in (int, whole)])


@pytest.mark.parametrize("real", [np.float64, np.float32])
def test_fractions_from_numpy_are_numbers(tiny, tmp_path, real):
    options = {**tiny, "epochs": 1, "learning_rate": real(2**-9), "out_dir": tmp_path}
    cvae_mnist.train_cvae(**options)
    cvae_mnist.train_cvae(**{**options, "epochs": 2, "learning_rate": 2**-9}, resume=True)
    options = {"seed": 5, "out_dir": tmp_path}
    assert torch.equal(*[cvae_mnist.inference_cvae(temperature=kind(0.5), **options) for kind in (float, real)])


# The command line


def command(monkeypatch, *arguments, script=SCRIPT):
    """Runs the script as `python cvae_mnist.py ...` would, but in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --epochs 0", "epochs"),
        ("train --epochs 1.5", "--epochs"),
        ("train --epochs many", "--epochs"),
        ("train --epochs", "--epochs"),
        ("train --batch-size -1", "batch"),
        ("--learning-rate nan", "learning_rate"),
        ("--learning-rate inf", "learning_rate"),
        ("--num-classes 5", "num_classes"),
        ("--seed -1", "seed"),
        ("--digit 12", "digit"),
        ("--digit six", "--digit"),
        ("--temperature nan", "temperature"),
        ("--temperature -1", "temperature"),
        ("--device nonsense", "device"),
        ("--device meta", "device"),
        ("--num-classes 0 --digit 3", "--digit"),
        ("train --resume", CHECKPOINT),
        ("draw", CHECKPOINT),
        ("restyle", CHECKPOINT),
        ("fly", "fly"),
        ("train fly", "fly"),
        ("--fast", "--fast"),
        ("train --epoch 3", "--epoch"),
        ("train --digit 3", "--digit"),
        ("train restyle --temperature 1", "--temperature"),
        ("draw --epochs 3", "--epochs"),
        ("draw --resume", "--resume"),
        ("draw --data-dir x", "--data-dir"),
        ("restyle --seed 1", "--seed"),
        ("restyle draw --z-dim 3", "--z-dim"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_harm(tmp_path, monkeypatch, no_data, capfd, arguments, named):
    monkeypatch.chdir(tmp_path)
    message = command(monkeypatch, *arguments.split())
    assert isinstance(message, str) and "\n" not in message  # Python prints it on stderr, and exits with 1
    assert message.startswith("cvae_mnist.py: ") and named in message.split(": ", 1)[1]
    assert capfd.readouterr() == ("", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out-dir", "--data-dir"])
def test_a_file_is_no_folder_on_the_command_line(tmp_path, monkeypatch, no_data, option):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    message = command(monkeypatch, option, "file")
    assert option.strip("-").replace("-", "_") in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", ["--digit 12 --epochs 1 --h-dim 16", "draw --temperatur 1"])
def test_a_user_sees_one_line(run, few, tmp_path, arguments):
    result = run(*arguments.split(), "--data-dir", few)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("cvae_mnist.py: ")
    assert not any(tmp_path.iterdir())


def test_options_mean_on_the_command_line_what_they_mean_in_python(tiny, tmp_path):
    options = {**tiny, "epochs": 1, "batch_size": 40, "learning_rate": 0.25, "num_classes": 0, "seed": 5}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    cvae_mnist.main(["train", "--textbook", *arguments, f"--out-dir={tmp_path / 'a'}"])
    cvae_mnist.train_cvae(**options, textbook=True, out_dir=tmp_path / "b")
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))


BUGS = {  # what someone who changes the model may well write, and the error that is theirs to see
    "return self.fc2(x), self.fc3(x)": RuntimeError,
    "mu, log_var = 1, 2, 3": ValueError,
    "return open('nothing here')": FileNotFoundError,
    "return undefined": NameError,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(done, few, tmp_path, monkeypatch, bug):
    start, *_, end = SCRIPT.read_text(encoding="utf-8").rpartition('if __name__ == "__main__":')
    broken = tmp_path / "cvae_mnist.py"
    change = f"def encode(self, x, c):\n    {bug}\n\n\nCVAE.encode = encode\n"
    broken.write_text(f'{start}{change}if __name__ == "__main__":{end}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BUGS[bug]) as error:  # and not SystemExit
        command(monkeypatch, "restyle", "--data-dir", few, "--out-dir", done, script=broken)
    assert "in encode" in "".join(traceback.format_exception(error.value))


# Damaged data


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def overwrite(path, where, content):
    old = path.read_bytes()
    path.write_bytes(old[:where] + content + old[where + len(content) :])


DATA_DAMAGE = {
    "training images truncated": lambda raw: shorten(raw / "train-images-idx3-ubyte"),
    "training labels truncated": lambda raw: shorten(raw / "train-labels-idx1-ubyte"),
    "test images truncated": lambda raw: shorten(raw / "t10k-images-idx3-ubyte"),
    "images empty": lambda raw: (raw / "train-images-idx3-ubyte").write_bytes(b""),
    "labels empty": lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(b""),
    "garbage": lambda raw: (raw / "train-images-idx3-ubyte").write_bytes(random.Random(0).randbytes(9000)),
    "zeros": lambda raw: (raw / "train-images-idx3-ubyte").write_bytes(bytes(16 + 300 * 784)),
    "HTML": lambda raw: (raw / "train-labels-idx1-ubyte").write_text("<html><body>404 Not Found</body></html>\n"),
    "images and labels swapped": lambda raw: swap(raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"),
    "images of training and test swapped": lambda raw: swap(
        raw / "train-images-idx3-ubyte", raw / "t10k-images-idx3-ubyte"
    ),
    "label 10": lambda raw: overwrite(raw / "train-labels-idx1-ubyte", 20, b"\x0a"),
    "test label 255": lambda raw: overwrite(raw / "t10k-labels-idx1-ubyte", 20, b"\xff"),
    "images of 14 x 56": lambda raw: overwrite(raw / "train-images-idx3-ubyte", 8, struct.pack(">II", 14, 56)),
    "no image at all": lambda raw: write_mnist(raw.parent.parent, *[(torch.zeros(0, 28, 28), torch.zeros(0))] * 2),
}


@pytest.mark.parametrize("damage", DATA_DAMAGE)
def test_damaged_data_is_an_error_and_no_reason_for_other_data(tiny, digits, done, tmp_path, monkeypatch, damage):
    data_dir = write_few(tmp_path / "data", digits)
    raw = data_dir / "MNIST" / "raw"
    DATA_DAMAGE[damage](raw)
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda *_: pytest.fail("fell back"))
    calls = (
        lambda: cvae_mnist.train_cvae(**{**tiny, "data_dir": data_dir}, out_dir=tmp_path / "out"),
        lambda: cvae_mnist.restyle_cvae(data_dir=data_dir, out_dir=done),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=f"{re.escape(str(raw))} is damaged.*Delete") as error:
            call()
        assert "\n" not in str(error.value)
        assert "damaged ()" not in str(error.value)  # a reason is given
    assert not (tmp_path / "out" / CHECKPOINT).exists()


def test_damaged_data_is_one_line_on_the_command_line(digits, done, tmp_path, monkeypatch):
    data_dir = write_few(tmp_path / "data", digits)
    shorten(data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte")
    message = command(monkeypatch, "restyle", "--data-dir", data_dir, "--out-dir", done, "--device", "cpu")
    assert str(data_dir / "MNIST" / "raw") in message and "\n" not in message


# Divergence


@pytest.mark.parametrize("textbook", [True, False])
def test_a_learning_rate_far_too_high_is_named(tiny, tmp_path, textbook):
    with pytest.raises(RuntimeError, match=r"epoch \d.*learning_rate=10000"):
        cvae_mnist.train_cvae(**{**tiny, "epochs": 50, "learning_rate": 1e4}, textbook=textbook, out_dir=tmp_path)


def nan_loss(model, result):
    return [math.nan, 0.0]


def infinite_loss(model, result):
    return [1.0, math.inf]


def nan_weight(model, result):
    with torch.no_grad():
        model.fc3.bias[0] = math.nan
    return result


@pytest.mark.parametrize("breakage", [nan_loss, infinite_loss, nan_weight])
def test_divergence_keeps_the_last_healthy_epoch(tiny, straight, tmp_path, monkeypatch, breakage):
    with monkeypatch.context() as patch:
        break_training(patch, 3, breakage)
        with pytest.raises(RuntimeError, match=r"epoch 3.*learning_rate=0.002.*epoch 2") as error:
            cvae_mnist.train_cvae(**tiny, out_dir=tmp_path)
    assert str(tmp_path / CHECKPOINT) in str(error.value)
    assert load(tmp_path)["epoch"] == 2
    cvae_mnist.train_cvae(**tiny, resume=True, out_dir=tmp_path)
    assert same(load(tmp_path), load(straight))


def test_divergence_in_the_first_epoch_promises_no_checkpoint(tiny, tmp_path, monkeypatch):
    break_training(monkeypatch, 1, nan_loss)
    with pytest.raises(RuntimeError, match="[Nn]othing was saved"):
        cvae_mnist.train_cvae(**tiny, out_dir=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()
