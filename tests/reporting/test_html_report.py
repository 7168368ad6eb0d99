"""The page is one file that needs nothing else, shows what the folder holds, and reads well in a browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from geta_hf.errors import GETAError
from geta_hf.reporting.comparison import load_model
from geta_hf.reporting.folder_summary import read_summary
from geta_hf.reporting.html_report import short_bytes, write_report
from geta_hf.serialization.sizes import tensor_bytes
from tests.small_folders import exported, written

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "rect", "br"}


class Page(HTMLParser):
    """Collects elements, attributes and text, and notes what is closed in the wrong order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.attributes, self.words = list[str](), list[tuple[str, str | None]](), list[str]()
        self._open, self.wrong = list[str](), list[str]()
        self.feed(path.read_text())
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self._open or self._open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(tmp_path)[1]


def test_it_needs_nothing_else_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    page = Page(write_report(folder, tmp_path / "report.html"))
    assert not page.wrong and not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "@import" not in page.text and "url(" not in page.text and "{{" not in page.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_it_shows_what_was_kept_and_counted(folder: Path, tmp_path: Path) -> None:
    metrics = {"dense": {"em": 80.5}, "compressed": {"em": 79.25}}
    page, facts = Page(write_report(folder, tmp_path / "report.html", metrics=metrics)), read_summary(folder)
    for words in ("80.50", "79.25", "question-answering", "BertForQuestionAnswering", "target_sparsity", "[2, 16]"):
        assert words in page.words, words
    small = facts.costs["compressed"]
    assert any(f"{small.parameters:,}" in words for words in page.words)
    assert f"{small.bops_linear / facts.costs['dense'].bops_linear:.2%}" in page.words
    for name, size in facts.parts.items():
        assert name in page.words and f"{size:,}" in page.words
    titles = [f"{n}: {kept} of {before}" for n, (kept, before) in facts.structure.kept.items()]
    titles += [f"{n}: {bits} bits" for n, bits in (facts.structure.bits | facts.structure.activation_bits).items()]
    assert set(titles) <= set(page.words)
    assert "import geta_hf  # registers the format\nfrom transformers import" in page.text


def test_a_dense_folder_is_measured_beside_it(folder: Path, tmp_path: Path) -> None:
    dense = folder.parent / "dense"
    load_model(dense).bfloat16().save_pretrained(dense)
    page = Page(write_report(folder, tmp_path / "report.html", dense=dense))
    assert any(re.fullmatch(r"\d+\.\d\d \(\d+\.\dx faster\)", words) for words in page.words)
    assert f"{tensor_bytes(dense):,}" in page.words and tensor_bytes(dense) == read_summary(folder).dense_bytes // 2


def test_metrics_of_the_folder_are_read(folder: Path, tmp_path: Path) -> None:
    (folder / "geta_metrics.json").write_text('{"compressed": {"perplexity": 12.5}}')
    assert {"perplexity", "12.50"} <= set(Page(write_report(folder, tmp_path / "report.html")).words)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "\"'&{{rows}}</title>", "a\x00\ud800", "x" * 500])
def test_no_name_breaks_it(tmp_path: Path, name: str) -> None:
    config = {"model_type": name, "architectures": [name], "transformers_version": name}
    kept, bits = {f"{name}.{i}:heads": (1, 2) for i in range(3)}, {f"{name}.{i}": 4 for i in range(3)}
    page = Page(write_report(written(tmp_path / "m", kept, bits, bits, config), tmp_path / "report.html"))
    assert not page.wrong and "script" not in page.tags
    assert any(words.startswith(re.sub("[\x00\ud800]", "�", f"{name}.0:heads")) for words in page.words)


@pytest.mark.parametrize(
    ("kept", "bits"),
    [({}, {}), ({"h.0:channels": (3, 64)}, {}), ({}, {"h.0.a": 4, "head": 8}), ({"a:channels": (1, 1)}, {"b": 16})],
    ids=["nothing", "one layer", "no heads", "no layers"],
)
def test_what_lacks_is_left_out(tmp_path: Path, kept: dict, bits: dict) -> None:
    page = Page(write_report(written(tmp_path / "m", kept, bits), tmp_path / "report.html"))
    assert not page.wrong and ("bits of weights" in page.words) == bool(bits)
    assert "The config was not saved with the model." in page.words
    assert ("No layer was cut or quantized." in page.words) == (not kept and not bits)


def test_where_it_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "no" / "report.html", tmp_path):
        with pytest.raises(GETAError, match="cannot write a report"):
            write_report(folder, out)
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(GETAError, match="an exported folder"):
        write_report(folder.parent / "dense", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"


def test_sizes_are_short() -> None:
    assert [short_bytes(size) for size in (0, 999, 1000, 81_928, 5_100_000, 29_000_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "81.9 kB",
        "5.1 MB",
        "29.0 GB",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_a_browser_draws_it_without_scrolling_sideways(tmp_path: Path) -> None:
    """The page is shown in frames as wide as a phone and as a desk, and a script outside of them measures it."""
    kept = {f"encoder.layer.{i}.{'long_name_' * 9}:heads": (i % 12 + 1, 12) for i in range(32)}
    bits = {f"encoder.layer.{i}.{m}": 2 + i % 15 for i in range(32) for m in ("query", "key", "value")}
    page = write_report(written(tmp_path / ("m" * 120), kept, bits, bits), tmp_path / "report.html")
    shown = html.escape(page.read_text())
    frames = "".join(f"<iframe style='width:{width}px' srcdoc=\"{shown}\"></iframe>" for width in (380, 1280))
    script = """onload = () => { document.title = [...document.querySelectorAll("iframe")].map((frame) => {
        const page = frame.contentDocument.documentElement, boxes = page.querySelectorAll("rect");
        return [page.scrollWidth, page.clientWidth, boxes.length, boxes[0].getBoundingClientRect().height];
    }).join(" ") };"""
    (tmp_path / "probe.html").write_text(f"{frames}<script>{script}</script>")
    title = re.search(r"<title>([\d., ]+)</title>", browser("--dump-dom", f"file://{tmp_path / 'probe.html'}"))
    for measured in title[1].split():
        scrolled, width, boxes, height = map(float, measured.split(","))
        assert scrolled == width and boxes == 2 * len(kept) + 2 * len(bits) and height > 10
    browser(f"--screenshot={tmp_path / 'shot.png'}", "--window-size=380,900", f"file://{page}")
    assert len(Image.open(tmp_path / "shot.png").convert("RGB").getcolors(1 << 20)) > 20


def browser(*arguments: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
