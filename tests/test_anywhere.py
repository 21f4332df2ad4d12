"""The file where people run it: pasted into a notebook, piped, without a screen, without a network."""

import ast
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jupytext
import matplotlib
import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT, SCRIPT, write_mnist
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from torchvision import datasets

import cvae_mnist

SMALL = ["--h-dim", "16", "--z-dim", "2", "--device", "cpu"]
PICTURES = ["CVAE_loss.png", "CVAE_6.png", "CVAE_0-9.png", "CVAE_styles.png"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")


@pytest.fixture(autouse=True)
def own_machine_only(monkeypatch):
    """No network, here and in subprocesses, but for servers on 127.0.0.1; no windows."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    plt.switch_backend("agg")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and we are in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """Where the file makes 70,000 built-in digits, it makes 700."""
    many = cvae_mnist.built_in_digits
    monkeypatch.setattr(cvae_mnist, "built_in_digits", lambda count, seed: many(count // 100, seed))


@pytest.fixture
def tiny(tmp_path, digits):
    """A data set in MNIST's files: 500 images to train on, 200 to test on."""
    (images, labels), (test_images, test_labels) = digits
    return write_mnist(tmp_path / "tiny", (images[:500], labels[:500]), (test_images[:200], test_labels[:200]))


def trained_on():
    return torch.load("cvae_checkpoint.pth", weights_only=True)["dataset"]


# In a notebook


@pytest.fixture
def notebook(tmp_path, folder, monkeypatch):
    """notebook(code) runs a cell in a fresh Jupyter kernel of this very Python; returns the cell's outputs."""
    spec = tmp_path / "jupyter" / "kernels" / "this-python" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "this Python", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND")  # the kernel chooses its own
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(),
        kernel_name="this-python",
        allow_errors=True,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    )

    def execute(code):
        client.nb.cells.append(nbformat.v4.new_code_cell(code))
        return client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1).outputs

    with client.setup_kernel():
        yield execute


def quick(text, data_dir):
    """The file with other defaults and nothing else changed."""
    for function, name, value in [
        ("train_cvae", "epochs", 2),
        ("train_cvae", "h_dim", 32),
        ("train_cvae", "data_dir", str(data_dir)),
        ("restyle_cvae", "data_dir", str(data_dir)),
    ]:
        default = rf"(?<=def {function}\()([^()]*\b{name}=)[^,()]+"
        text, hits = re.subn(default, lambda match, value=value: f"{match[1]}{value!r}", text)
        assert hits == 1, f"{function} has no default for {name}"
    return text


def printed(outputs, name="stdout"):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def errors(outputs):
    return [output for output in outputs if output.output_type == "error"]


def test_pasted_into_one_notebook_cell(notebook, folder, tiny):
    outputs = notebook(quick(SCRIPT.read_text(), tiny))
    assert not errors(outputs) and not printed(outputs, "stderr")
    assert "epoch 2/2" in printed(outputs) and "\r" not in printed(outputs)
    assert pictures(outputs) == 1 + len(PICTURES)  # the samples of the last epoch come on top
    assert all((folder / name).is_file() for name in PICTURES)

    again = """
import matplotlib.pyplot as plt
figures = plt.get_fignums()
for _ in range(3):
    model = train_cvae(epochs=1)
    images = inference_cvae(input=3, flag=True)
    everyone = restyle_cvae()
assert plt.get_fignums() == figures == [], plt.get_fignums()
"""
    outputs = notebook(again)
    assert not errors(outputs) and not printed(outputs, "stderr")
    assert pictures(outputs) == 3 * 4
    assert (folder / "CVAE_3.png").is_file()

    # What goes wrong is an exception like any other, and the next cell runs.
    [error] = errors(notebook("inference_cvae(flag=True, input=12)"))
    assert error.ename == "UserError" and "input=12" in error.evalue
    interrupted = """
import signal, threading, time
Path("cvae_checkpoint.pth").unlink()
def stop():
    while not Path("cvae_checkpoint.pth").exists():
        time.sleep(0.05)
    signal.raise_signal(signal.SIGINT)  # what the stop button does
threading.Thread(target=stop).start()
model = train_cvae(epochs=100_000)
"""
    [error] = errors(notebook(interrupted))
    assert error.ename == "KeyboardInterrupt"
    resumed = "done = load_checkpoint('.')[0]['epoch']\nmodel = train_cvae(epochs=done + 1, resume=True)\nprint(done)"
    outputs = notebook(resumed)
    assert not errors(outputs) and not printed(outputs, "stderr")
    assert printed(outputs).count("\nepoch ") == 1 and int(printed(outputs).split()[-1]) >= 1


def test_as_a_notebook_text_and_code_alternate():
    cells = jupytext.reads(SCRIPT.read_text(), fmt="py:percent").cells
    assert [cell.cell_type for cell in cells] == ["markdown", "code"] * (len(cells) // 2)
    assert len(cells) > 10 and all(cell.source.strip() for cell in cells)


def test_only_the_last_notebook_cell_does_anything(notebook, folder, tiny):
    book = jupytext.reads(quick(SCRIPT.read_text(), tiny), fmt="py:percent")
    *definitions, last = [cell.source for cell in book.cells if cell.cell_type == "code"]
    for source in definitions:
        assert notebook(source) == []
    assert list(folder.iterdir()) == []
    outputs = notebook(last)
    assert not errors(outputs) and not printed(outputs, "stderr")
    assert "epoch 2/2" in printed(outputs) and pictures(outputs) == 1 + len(PICTURES)


# As a module


def test_importing_changes_nothing(folder):
    code = f"""
import random, socket, sys, warnings
import matplotlib, PIL.Image, torch, torchvision
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["someone.py", "--else"]
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), dict(matplotlib.rcParams.copy()),
        socket.getdefaulttimeout(), list(sys.argv), list(warnings.filters), sys.excepthook, dict(os.environ))
import os
os.environ.pop("GOMP_SPINCOUNT", None)
before = state()
import cvae_mnist
assert os.environ.pop("GOMP_SPINCOUNT").isdigit()
for number, (old, new) in enumerate(zip(before, state())):
    assert old == new, number
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(folder.iterdir()) == []


def test_how_threads_wait_is_set_before_pytorch_is_loaded_unless_the_user_has_set_it():
    source = SCRIPT.read_text()
    assert source.index("GOMP_SPINCOUNT") < source.index("\nimport torch") < source.index("\nfrom torch")
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import cvae_mnist; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {**os.environ, "GOMP_SPINCOUNT": "77"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == b"77\n"


CALLS = {
    "train_cvae": lambda data: cvae_mnist.train_cvae(epochs=1, h_dim=16, z_dim=2, data_dir=data, device="cpu"),
    "train_cvae, which fails": lambda data: cvae_mnist.train_cvae(epochs=3, data_dir=data, device="cpu", resume=True),
    "inference_cvae": lambda data: cvae_mnist.inference_cvae(device="cpu"),
    "inference_cvae with a seed": lambda data: cvae_mnist.inference_cvae(3, flag=True, seed=5, device="cpu"),
    "restyle_cvae": lambda data: cvae_mnist.restyle_cvae(data_dir=data, device="cpu"),
}


def state():
    return {
        "torch's random numbers": hashlib.md5(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "Python's random numbers": hash(random.getstate()),
        "precision": (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "timeout": socket.getdefaulttimeout(),
        "arguments": list(sys.argv),
        "warnings": list(warnings.filters),
        "matplotlib": dict(matplotlib.rcParams.copy()),
        "figures": plt.get_fignums(),
    }


@pytest.mark.parametrize("call", CALLS)
def test_calling_leaves_the_world_as_it_was(call, folder, trained, data_dir):
    shutil.copy(trained / "cvae_checkpoint.pth", folder)
    precision, timeout = torch.get_float32_matmul_precision(), socket.getdefaulttimeout()
    torch.set_float32_matmul_precision("high")
    socket.setdefaulttimeout(77)
    try:
        before = state()
        with pytest.raises(cvae_mnist.UserError) if "fails" in call else contextlib.nullcontext():
            CALLS[call](data_dir)
        after = state()
        if "train" in call:  # it seeds PyTorch's, as it says
            after["torch's random numbers"] = before["torch's random numbers"]
        assert after == before
    finally:
        torch.set_float32_matmul_precision(precision)
        socket.setdefaulttimeout(timeout)


# Without a network


def test_without_a_network_it_says_so_and_goes_on(folder, few, digits, capfd, monkeypatch):
    figures, save = [], Figure.savefig

    def look(figure, *arguments, **options):
        figures.append([text.get_text() for text in figure.findobj(Text)])
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    cvae_mnist.main(["--epochs", "2", *SMALL])
    output, complaints = capfd.readouterr()
    before, after = output.split("epoch 1/2")
    assert complaints == "" and "\r" not in output and "Traceback" not in output
    assert "could not be downloaded: " in before and "127.0.0.1:9" in before  # what failed
    assert str(Path("mnist", "MNIST", "raw")) in before and all(name in before for name in cvae_mnist.MNIST_FILES)
    assert "could not be downloaded" not in after  # said once
    assert len(after.splitlines()) == 6  # two epochs; trained, two drawings, restyled
    assert all("built-in digits" in line for line in after.splitlines()[2:])
    assert trained_on() == "built-in digits"
    [loss] = [texts for texts in figures if "nats per image" in texts]
    assert any("built-in digits" in text for text in loss)

    # Another day MNIST is there.
    write_mnist("mnist", *[(images[:200], labels[:200]) for images, labels in digits])
    cvae_mnist.main(["--epochs", "1", *SMALL])
    output = capfd.readouterr().out
    assert trained_on() == "MNIST" and "built-in" not in output and "will be replaced" in output
    assert all("on MNIST" in line for line in output.splitlines()[4:])


def test_digits_of_one_kind_are_not_shown_as_the_other(folder, few, trained, capfd):
    shutil.copy(trained / "cvae_checkpoint.pth", folder)
    try:
        cvae_mnist.restyle_cvae(data_dir="gone", device="cpu")  # a model of MNIST, and no MNIST
    except cvae_mnist.UserError as error:
        assert "MNIST" in str(error)
    else:
        assert "built-in digits" in capfd.readouterr().out.splitlines()[-1]


def test_a_server_that_never_answers_is_given_up(folder, few, capfd, monkeypatch):
    limits, real, before = [], socket.setdefaulttimeout, socket.getdefaulttimeout()

    def impatient(seconds):
        limits.append(seconds)
        real(0.2)

    real(3)
    try:
        monkeypatch.setattr(socket, "setdefaulttimeout", impatient)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
            dataset, *_ = cvae_mnist.load_digits("mnist")
    finally:
        real(before)
    assert dataset == "built-in digits"
    assert "could not be downloaded: timed out" in capfd.readouterr().out
    assert len(limits) == 2 and 1 <= limits[0] <= 10 and limits[1] == 3  # set, and set back


def test_built_in_digits_are_shaped_like_mnist():
    images, labels = cvae_mnist.built_in_digits(3000, seed=0)
    assert (images.shape, images.dtype) == ((3000, 784), torch.uint8)
    assert (labels.shape, labels.dtype) == ((3000,), torch.int64)
    assert labels.bincount().shape == (10,) and all(200 < count < 400 for count in labels.bincount())
    assert 0.08 < images.div(255).mean() < 0.2 and images.max() == 255  # MNIST: 0.13
    assert images.max(dim=1).values.min() > 100  # none is empty
    images = images.view(-1, 28, 28)
    edge = torch.cat([images[:, [0, -1]].flatten(), images[:, :, [0, -1]].flatten()])
    assert edge.div(255).mean() < 0.02  # none is cut off


def test_built_in_digits_depend_on_their_seed_alone():
    images, labels = cvae_mnist.built_in_digits(2500, seed=7)
    torch.rand(1)
    again, same = cvae_mnist.built_in_digits(2500, seed=7)
    assert images.equal(again) and labels.equal(same)
    others, _ = cvae_mnist.built_in_digits(2500, seed=8)
    pictures = {image.numpy().tobytes() for image in images}
    assert len(pictures) == 2500
    assert not pictures & {image.numpy().tobytes() for image in others}


def test_built_in_digits_can_be_read():
    images, labels = cvae_mnist.built_in_digits(3000, seed=0)
    others, answers = cvae_mnist.built_in_digits(500, seed=1)
    nearest = torch.cdist(others / 255, images / 255).argmin(dim=1)
    right = labels[nearest] == answers
    assert right.float().mean() > 0.7
    assert all(right[answers == digit].float().mean() > 0.5 for digit in range(10))


# Downloading, through torchvision's own code


@pytest.fixture
def mirror(tiny, monkeypatch):
    """A server of a tiny MNIST. mirror.answer turns a file into (status, announced length, what is sent)."""
    files = {f"/{path.name}.gz": gzip.compress(path.read_bytes()) for path in (tiny / "MNIST" / "raw").iterdir()}
    sums = [(f"{name}.gz", hashlib.md5(files[f"/{name}.gz"]).hexdigest()) for name in cvae_mnist.MNIST_FILES]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, length, content = self.server.answer(files[self.path])
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.answer = files, good
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


def good(file):
    return 200, len(file), file


PAGE = b"<html>Please sign in to this network</html>"
BAD = {
    "half a file": lambda file: (200, len(file), file[: len(file) // 2]),
    "another file": lambda file: (200, len(file), file[::-1]),
    "a web page": lambda file: (200, len(PAGE), PAGE),
    "not found": lambda file: (404, 0, b""),
    "labels only missing": lambda file: (200, len(file), file) if len(file) > 3000 else (503, 0, b""),
}


def test_mnist_is_downloaded(folder, mirror, capfd):
    cvae_mnist.train_cvae(epochs=1, h_dim=16, z_dim=2, device="cpu")
    output, complaints = capfd.readouterr()
    first, second, *_ = output.splitlines()
    assert first.startswith("Downloading MNIST") and second.startswith("MNIST: 500 images to train on, 200 to test on")
    assert trained_on() == "MNIST"
    assert "\r" not in output and complaints == ""
    assert {path.name for path in Path("mnist", "MNIST", "raw").iterdir()} >= set(cvae_mnist.MNIST_FILES)

    mirror.answer = None  # from now on any request is an error
    assert cvae_mnist.load_digits("mnist")[0] == "MNIST"


@pytest.mark.parametrize("what", BAD)
def test_a_bad_download_is_not_used_and_mended_by_the_next_run(what, folder, few, mirror, capfd):
    mirror.answer = BAD[what]
    dataset, (images, _), _ = cvae_mnist.load_digits("mnist")
    output, complaints = capfd.readouterr()
    assert dataset == "built-in digits" and len(images) == 600
    reason = {"not found": "404", "labels only missing": "503"}.get(what, "corrupted")
    assert re.search(f"could not be downloaded: .*{reason}", output)
    assert all(name in output for name in cvae_mnist.MNIST_FILES)
    assert "\r" not in output and "Traceback" not in output and complaints == ""

    mirror.answer = good
    dataset, (images, labels), _ = cvae_mnist.load_digits("mnist")
    assert dataset == "MNIST" and images.shape == (500, 784) and labels.shape == (500,)


def test_files_put_there_by_hand_need_no_network(folder, mirror, monkeypatch, capfd):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = Path("mnist", "MNIST", "raw")
    raw.mkdir(parents=True)
    for name, content in mirror.files.items():
        Path(raw, name[1:]).write_bytes(content)
    assert cvae_mnist.load_digits("mnist")[0] == "MNIST"
    for path in raw.glob("*.gz"):
        path.unlink()
    assert cvae_mnist.load_digits("mnist")[0] == "MNIST"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_data_dir_under_home(kind, folder, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny.parent))
    assert cvae_mnist.load_digits(kind("~/tiny"))[0] == "MNIST"
    assert list(folder.iterdir()) == []


# With a screen and without, on a terminal and piped


@on_linux
def test_piped_and_without_a_screen(folder, tiny, monkeypatch):
    for name in ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, str(SCRIPT), "--epochs", "2", "--data-dir", str(tiny), *SMALL]
    done = subprocess.run(command, capture_output=True)  # bytes: text mode takes a \r for a new line
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\r" not in done.stdout
    lines = done.stdout.decode().splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["epoch", "1/2"], ["epoch", "2/2"]] and len(lines) == 8
    assert all(Path(name).is_file() for name in PICTURES)


@pytest.mark.parametrize("backend", ["agg", "svg", "pdf"])
def test_backends_without_windows(backend, folder, trained, capfd, recwarn):
    shutil.copy(trained / "cvae_checkpoint.pth", folder)
    plt.switch_backend(backend)
    cvae_mnist.main(["draw", "--device", "cpu"])
    assert capfd.readouterr().err == ""
    assert not [warning.message for warning in recwarn if warning.category is UserWarning]  # matplotlib's are
    assert plt.get_fignums() == []
    for name in ("CVAE_6.png", "CVAE_0-9.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")


FAKE_GUI = """
from pathlib import Path
from matplotlib import _pylab_helpers
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

def note(*words):
    with open("windows.txt", "a") as file:
        print(*words, len(list(Path().glob("*.png"))), file=file)

class FigureManager(FigureManagerBase):
    def __init__(self, canvas, num):
        super().__init__(canvas, num)
        note("window")

    @classmethod
    def pyplot_show(cls, *, block=None):
        note("show", len(_pylab_helpers.Gcf.figs))

class FigureCanvas(FigureCanvasAgg):
    required_interactive_framework = "headless"  # the one that matplotlib grants with a screen and without
    manager_class = FigureManager
"""


def test_windows_open_once_when_all_is_done(run, folder, tiny):
    Path(folder.parent, "fakegui.py").write_text(FAKE_GUI)
    Path("CVAE_9.png").write_bytes(b"of an earlier run: no window for it")
    os.utime("CVAE_9.png", (0, 0))
    env = {"MPLBACKEND": "module://fakegui", "PYTHONPATH": str(folder.parent)}
    done = run("--epochs", "2", "--data-dir", tiny, *SMALL, cwd=folder, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("windows.txt").read_text().splitlines() == ["window 5"] * 4 + ["show 4 5"]


def on_terminal(*arguments):
    """Runs the script on a terminal; returns all that it wrote, the lines that stay on the screen, its exit status."""
    pty = pytest.importorskip("pty", exc_type=ImportError)
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(ours, 10_000):
            seen += chunk
    os.close(ours)
    seen, screen = seen.decode().replace("\r\n", "\n"), []
    for line in seen.split("\n"):
        shown = ""
        for part in line.split("\r"):  # back to the first column: what comes next is written over what was there
            assert len(part) < 80 or part == line.split("\r")[-1]  # a line that wraps could not be written over
            shown = part + shown[len(part) :]
        screen += [shown] if shown else []
    return seen, screen, process.wait()


def test_on_a_terminal_a_live_line_becomes_one_line_per_epoch(folder, tiny):
    seen, screen, status = on_terminal("train", "--epochs", "2", "--data-dir", tiny, *SMALL)
    assert status == 0
    assert "\r" in seen and re.search(r"epoch 1 +\d+% +loss \d", seen)
    assert len(screen) == 5  # the data; that epochs are saved; two epochs; the end
    assert re.fullmatch(r"epoch 1/2 .* left", screen[2]) and re.fullmatch(r"epoch 2/2 .* left", screen[3])


def test_on_a_terminal_an_error_is_not_mixed_with_the_live_line(folder, tiny):
    _, screen, status = on_terminal("train", "--learning-rate", "1e5", "--data-dir", tiny, *SMALL)
    assert status == 1
    assert screen[-1].startswith("cvae_mnist.py: The loss is not finite in epoch 1")


# On an older Python


def test_the_oldest_python_understands_it():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 11))
    # What ast.parse of a newer Python lets through, such as the newer f-strings.
    options = ["check", "--isolated", "--no-cache", "--target-version", "py311", "--select", "E9"]
    done = subprocess.run([sys.executable, "-m", "ruff", *options, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
