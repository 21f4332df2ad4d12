"""What can go wrong and must not do harm: kills, full disks, Ctrl-C, strangers' files, bad arguments, bad data."""

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
    """From the epoch on, breakage(model, average) follows train_epoch."""
    train_epoch = cvae_mnist.train_epoch

    def broken(model, average, *arguments):
        train_epoch(model, average, *arguments)
        if arguments[-1] >= epoch:
            breakage(model, average)

    monkeypatch.setattr(cvae_mnist, "train_epoch", broken)


def interrupt(*_):
    raise KeyboardInterrupt


# Resuming


@pytest.mark.parametrize("kind", [{}, {"num_classes": 0}], ids=str)
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


def test_resuming_with_other_hyperparameters_names_them(tiny, done, no_data):
    asked = dict(batch_size=64, learning_rate=0.25, h_dim=17, z_dim=5, num_classes=0, seed=7)
    before = (done / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(done / CHECKPOINT))) as error:
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, **asked})
    assert f"{load(done)['hyperparameters']}, not {asked}" in str(error.value)
    for name, value in asked.items():  # each of them alone
        with pytest.raises(cvae_mnist.UserError, match=f"'{name}': {value}"):
            cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, name: value})
    assert (done / CHECKPOINT).read_bytes() == before


def test_resuming_on_another_data_set_is_refused(tiny, done):
    torch.save({**load(done), "dataset": "built-in digits"}, done / CHECKPOINT)
    with pytest.raises(ValueError, match="built-in digits.*MNIST"):
        cvae_mnist.train_cvae(out_dir=done, resume=True, **{**tiny, "epochs": 5})
    assert load(done)["epoch"] == 4


@pytest.mark.parametrize("call", ["train_cvae", "inference_cvae", "restyle_cvae"])
def test_without_a_checkpoint_the_error_says_how_to_train(call, tmp_path, no_data):
    options = {"resume": True} if call == "train_cvae" else {}
    with pytest.raises(cvae_mnist.UserError, match=re.escape(str(tmp_path / CHECKPOINT))) as error:
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
        path = re.escape(str(out_dir / CHECKPOINT))
        with pytest.raises(cvae_mnist.UserError, match=f"{path} could not be written") as error:
            cvae_mnist.train_cvae(out_dir=out_dir, resume=True, **{**tiny, "epochs": 6})
        assert os.strerror(errno.ENOSPC) in str(error.value)
        assert same(load(out_dir), load(straight)) and strays(out_dir) == []
        (disk / "filler").unlink()
        cvae_mnist.train_cvae(out_dir=out_dir, resume=True, **{**tiny, "epochs": 6})
        assert load(out_dir)["epoch"] == 6
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("cause", "call", "name"),
    [
        ("fsync", "train_cvae", CHECKPOINT),
        ("replace", "train_cvae", CHECKPOINT),
        ("fsync", "inference_cvae", "CVAE_0-9.png"),
    ],
)
def test_a_failed_write_names_the_file_and_leaves_no_stray(tiny, straight, done, monkeypatch, cause, call, name):
    def fail(*_):
        raise OSError(errno.EIO, "the disk is on fire")

    options = {**tiny, "epochs": 6, "resume": True} if call == "train_cvae" else {}
    monkeypatch.setattr(os, cause, fail)
    with pytest.raises(cvae_mnist.UserError, match=f"{re.escape(str(done / name))} could not be written.*on fire"):
        getattr(cvae_mnist, call)(out_dir=done, **options)
    assert same(load(done), load(straight)) and strays(done) == []


# Ctrl-C


@POSIX
def test_ctrl_c_on_the_command_line_ends_without_a_traceback_and_can_be_resumed(few, tmp_path):
    command = [sys.executable, str(SCRIPT), "train", "--epochs", str(LONG), "--h-dim", "16", "--z-dim", "3"]
    command += ["--data-dir", str(few), "--out-dir", str(tmp_path), "--device", "cpu"]
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731, background jobs do not
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, cwd=tmp_path
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("epoch 1/"):
            lines.append(process.stdout.readline())
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "--resume" in lines[1] and "saved" in lines[1]  # said from the beginning
    assert load(tmp_path)["epoch"] >= 1


def test_an_interrupted_run_resumes_to_the_same_end(tiny, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_training(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            cvae_mnist.train_cvae(out_dir=tmp_path, **tiny)
    assert load(tmp_path)["epoch"] == 1
    cvae_mnist.train_cvae(out_dir=tmp_path, resume=True, **tiny)
    assert same(load(tmp_path), load(straight))


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
    "end missing": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html><body>404 Not Found</body></html>\n"),
    "list": lambda path: torch.save([1, 2, 3], path),
    "other dict": lambda path: torch.save({"epoch": 3}, path),
    "other model": lambda path: with_weights(path, lambda _: torch.nn.Linear(784, 10).state_dict()),
    "other images": lambda path: with_weights(path, lambda _: cvae_mnist.CVAE(900, 16, 3).state_dict()),
    "other classes": lambda path: with_weights(path, lambda _: cvae_mnist.CVAE(784, 16, 3, 26).state_dict()),
    "weight missing": lambda path: with_weights(path, lambda weights: without(weights, "fc5.bias")),
    "NaN": lambda path: with_weights(path, lambda weights: {**weights, "fc3.bias": torch.full([3], math.nan)}),
    "folder": folder_instead,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_none_is_one_clear_error(tiny, done, tmp_path, monkeypatch, no_data, damage):
    monkeypatch.chdir(tmp_path)
    DAMAGE[damage](done / CHECKPOINT)
    before = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: cvae_mnist.train_cvae(out_dir=done, resume=True, **tiny),
        lambda: cvae_mnist.inference_cvae(out_dir=done),
        lambda: cvae_mnist.restyle_cvae(out_dir=done, data_dir=tiny["data_dir"]),
        lambda: cvae_mnist.load_checkpoint(done),
    ):
        with pytest.raises(cvae_mnist.UserError, match=re.escape(str(done / CHECKPOINT))) as error:
            call()
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
    torch.save({"model_state_dict": load(done)["model_state_dict"]}, done / CHECKPOINT)
    assert cvae_mnist.restyle_cvae([0], data_dir=tiny["data_dir"], out_dir=done).shape == (1, 11, 1, 28, 28)


# Bad arguments

BAD_ARGUMENTS = {
    "train_cvae": {
        "epochs": [0, 1.5, 2.0, math.nan, math.inf, True, None, "6", [6], 10**6 + 1],
        "batch_size": [0, None],
        "h_dim": [0],
        "z_dim": [-1],
        "learning_rate": [0, math.nan, math.inf, -1, True, None, "6", [6]],
        "num_classes": [1, 9, 11, 10.0, False, None],
        "seed": [2**32, -1, 1.5, None],
        "resume": [1, None, "yes"],
        "device": ["gpu", "", "meta", "cuda:99", 1.5],
        "data_dir": [None, 3],
        "out_dir": [None, 3],
    },
    "inference_cvae": {
        "input": [10, -1, 6.0, None, "6"],
        "flag": [1, None, "yes"],
        "temperature": [math.nan, math.inf, -1, True, None, "6"],
        "seed": [2**32, -1, 1.5],
        "device": ["meta"],
        "out_dir": [None],
    },
    "restyle_cvae": {
        "indices": [[], [-1], [1.5], [True], ["3"], [None], [0] * 101, 5, "5"],
        "device": ["meta"],
        "data_dir": [None],
        "out_dir": [None],
    },
}
if not torch.cuda.is_available():
    BAD_ARGUMENTS["train_cvae"]["device"].append("cuda")


def refuse(call, name, value, **others):
    options = {"flag": True} if name == "input" else {}
    with pytest.raises(cvae_mnist.UserError, match=rf"^{name}\b") as error:
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
    assert "sorry" in refuse("train_cvae", "out_dir", done)


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


@pytest.mark.parametrize("whole", [np.int64, np.uint8])
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
        ("--learning-rate nan", "learning_rate"),
        ("--num-classes 5", "num_classes"),
        ("--seed -1", "seed"),
        ("--digit 12", "input"),
        ("--temperature nan", "temperature"),
        ("--device nonsense", "device"),
        ("train --resume", CHECKPOINT),
        ("draw", CHECKPOINT),
        ("restyle", CHECKPOINT),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_harm(tmp_path, monkeypatch, no_data, capfd, arguments, named):
    monkeypatch.chdir(tmp_path)
    message = command(monkeypatch, *arguments.split())
    assert isinstance(message, str) and "\n" not in message  # Python prints it on stderr, and exits with 1
    assert message.startswith("cvae_mnist.py: ") and named in message.split(": ", 1)[1]
    assert capfd.readouterr() == ("", "")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --epochs many", "--epochs"),
        ("train --epochs", "--epochs"),
        ("--num-classes 0 --digit 3", "--digit"),
        ("fly", "fly"),
        ("train fly", "fly"),
        ("--fast", "--fast"),
        ("train --epoch 3", "--epoch"),
        ("train --digit 3", "--digit"),
        ("train restyle --temperature 1", "--temperature"),
        ("draw --data-dir x", "--data-dir"),
        ("restyle --seed 1", "--seed"),
    ],
)
def test_a_command_that_makes_no_sense_shows_the_usage(tmp_path, monkeypatch, no_data, capfd, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments.split()) == 2
    output, errors = capfd.readouterr()
    usage, error = errors.splitlines()
    assert output == "" and usage.startswith("usage: cvae_mnist.py [train] [draw] [restyle]")
    assert error.startswith("cvae_mnist.py: error: ") and named in error
    assert not any(tmp_path.iterdir())


def test_a_user_sees_one_line(run, few, tmp_path):
    result = run("--digit", 12, "--epochs", 1, "--data-dir", few)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("cvae_mnist.py: ")
    assert not any(tmp_path.iterdir())


def test_steps_and_options_may_come_in_any_order(tiny, tmp_path):
    folders = ["--data-dir", str(tiny["data_dir"]), "--out-dir", str(tmp_path)]
    cvae_mnist.main(["train", "--epochs", "1", "--h-dim", "8", "draw", *folders[2:], "restyle", *folders[:2]])
    assert (tmp_path / "CVAE_6.png").exists() and (tmp_path / "CVAE_styles.png").exists()


def test_options_mean_on_the_command_line_what_they_mean_in_python(tiny, tmp_path):
    options = {**tiny, "epochs": 1, "batch_size": 40, "learning_rate": 0.25, "num_classes": 0, "seed": 5}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    cvae_mnist.main(["train", *arguments, f"--out-dir={tmp_path / 'a'}"])
    cvae_mnist.train_cvae(**options, out_dir=tmp_path / "b")
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))


BUGS = {  # what someone who changes the model may well write, and the error that is theirs to see
    "return self.fc2(x), self.fc3(x)": RuntimeError,
    "raise ValueError('mine')": ValueError,
    "return open('nothing here')": FileNotFoundError,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(done, few, tmp_path, monkeypatch, bug):
    start, main, end = SCRIPT.read_text(encoding="utf-8").rpartition('if __name__ == "__main__" and')
    broken = tmp_path / "cvae_mnist.py"
    change = f"def encode(self, x, c):\n    {bug}\n\n\nCVAE.encode = encode\n"
    broken.write_text(start + change + main + end, encoding="utf-8")
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
    "labels empty": lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(b""),
    "HTML": lambda raw: (raw / "train-labels-idx1-ubyte").write_text("<html><body>404 Not Found</body></html>\n"),
    "images and labels swapped": lambda raw: swap(raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"),
    "images of training and test swapped": lambda raw: swap(
        raw / "train-images-idx3-ubyte", raw / "t10k-images-idx3-ubyte"
    ),
    "test label 10": lambda raw: overwrite(raw / "t10k-labels-idx1-ubyte", 20, b"\x0a"),
    "images of 14 x 28": lambda raw: overwrite(raw / "train-images-idx3-ubyte", 8, struct.pack(">I", 14)),
    "no image at all": lambda raw: write_mnist(raw.parent.parent, *[(torch.zeros(0, 784), torch.zeros(0))] * 2),
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
        with pytest.raises(cvae_mnist.UserError, match=f"{re.escape(str(raw))} is damaged.*Delete") as error:
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


def test_a_learning_rate_far_too_high_is_named(tiny, tmp_path):
    with pytest.raises(cvae_mnist.UserError, match=r"epoch \d.*learning_rate=10000"):
        cvae_mnist.train_cvae(**{**tiny, "epochs": 50, "learning_rate": 1e4}, out_dir=tmp_path)


def nan_in_the_average(model, average):
    torch.nn.init.constant_(average.fc3.bias, math.nan)


def infinite_loss(model, average):
    torch.nn.init.constant_(average.fc3.bias, 1e4)


def nan_in_the_training_weights(model, average):
    torch.nn.init.constant_(model.fc3.bias, math.nan)


@pytest.mark.parametrize("breakage", [nan_in_the_average, infinite_loss, nan_in_the_training_weights])
def test_divergence_keeps_the_last_healthy_epoch(tiny, straight, tmp_path, monkeypatch, breakage):
    with monkeypatch.context() as patch:
        break_training(patch, 3, breakage)
        with pytest.raises(cvae_mnist.UserError, match=r"epoch 3.*a third of learning_rate=0.002"):
            cvae_mnist.train_cvae(**tiny, out_dir=tmp_path)
    assert load(tmp_path)["epoch"] == 2
    cvae_mnist.train_cvae(**tiny, resume=True, out_dir=tmp_path)
    assert same(load(tmp_path), load(straight))


def test_divergence_in_the_first_epoch_saves_no_checkpoint(tiny, tmp_path, monkeypatch):
    break_training(monkeypatch, 1, nan_in_the_average)
    with pytest.raises(cvae_mnist.UserError, match="epoch 1"):
        cvae_mnist.train_cvae(**tiny, out_dir=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()
