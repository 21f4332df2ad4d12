"""README.md: its blocks run; its options, versions and pictures are those of the code."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import ROOT, SOURCE, write_images
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import cvae_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def draw_seven(paper, ink, width):
    picture = Image.new("L", (300, 200), paper)
    line = [(60, 30), (150, 30), (110, 170)]
    ImageDraw.Draw(picture).line(line, fill=ink, width=width, joint="curve")
    return picture


def test_every_python_block_runs_in_order(digits, monkeypatch, capsys):
    """As a reader would paste them; only epochs and images are fewer."""
    matplotlib.use("agg")  # one block uses pyplot
    write_images("mnist", *digits)
    cvae_mnist.train_cvae(1, device="cpu")
    draw_seven(paper=255, ink=0, width=18).save("my_digit.png")
    for number, (image, label) in enumerate(zip(digits[0][0][:60], digits[0][1], strict=False)):
        Path("pictures", str(label.item())).mkdir(parents=True, exist_ok=True)
        to_pil_image(image.view(28, 28)).save(f"pictures/{label}/{number}.png")
    for number, block in enumerate(BLOCKS):
        with monkeypatch.context() as patch:  # some replace parts of the script
            for name in "CVAE", "load_images", "train_step", "negative_elbo":
                patch.setattr(cvae_mnist, name, getattr(cvae_mnist, name))
            exec(compile(block.replace("epochs=10", "epochs=1"), f"block {number}", "exec"), {})
    for name in re.findall(
        r"""(?:save|savefig|save_image)\(.*?["'](\w+\.(?:png|gif))["']""", README
    ):
        assert Path(name).exists()
    assert Path("mine/CVAE_loss.png").exists() and Path("conv/CVAE_loss.png").exists()
    assert re.search(r"\d% are right", capsys.readouterr().out)


def test_a_readers_own_digit_is_the_same_whatever_the_paper_and_the_pen():
    [block] = [block for block in BLOCKS if '"my_digit.png"' in block]
    prepare = compile(re.split(r"(?m)^.*load_checkpoint\(", block)[0], "block", "exec")

    def prepared(picture):
        picture.save("my_digit.png")
        names = {}
        exec(prepare, names)
        return names["image"]

    clean = prepared(draw_seven(paper=255, ink=0, width=18))
    assert clean.shape == (1, 1, 28, 28) and clean.min() == 0 and clean.max() > 0.9
    rows, columns = (clean[0, 0] > 0.5).nonzero().T
    assert rows.max() - rows.min() == pytest.approx(19, abs=1) and columns.max() < 26
    torch.manual_seed(0)
    light = (torch.arange(300) / 3 + torch.arange(200).view(-1, 1) / 2).round()  # from a corner
    uneven = (pil_to_tensor(draw_seven(paper=250, ink=60, width=9))[0] - light / 2).clamp(min=0)
    noise = 6 * torch.randn(200, 300)
    for picture in (
        draw_seven(paper=0, ink=255, width=18),
        draw_seven(paper=255, ink=0, width=4),
        draw_seven(paper=235, ink=150, width=10).resize((1200, 800)),
        to_pil_image((uneven + noise).clamp(0, 255).byte()),
    ):
        assert torch.cosine_similarity(prepared(picture).flatten(), clean.flatten(), dim=0) > 0.85
    with pytest.raises(ValueError, match="blank"):
        prepared(Image.new("L", (200, 200), 255))


def test_pictures_options_and_versions_are_those_of_the_project(capsys):
    named = set(re.findall(r"\.github/[\w.-]+\.(?:png|gif)", README))
    pictures = [path for path in (ROOT / ".github").iterdir() if path.suffix in (".png", ".gif")]
    assert {f".github/{path.name}" for path in pictures} == named
    assert sum(path.stat().st_size for path in pictures) < 500_000
    pytest.raises(SystemExit, cvae_mnist.main, ["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    for block in re.findall(r"^```\w*\n( +--.*?)^```", README, flags=re.DOTALL | re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", block)) - {"--help"} == options
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"# dependencies = {requirements}".replace("'", '"') in SOURCE
    assert '# requires-python = ">=3.10"' in SOURCE and "Python 3.10" in README
