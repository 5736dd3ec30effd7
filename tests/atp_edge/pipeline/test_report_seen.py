"""The report page in a browser: wide and narrow, light and dark, nothing overflows.

ATP_SCREENSHOTS=FOLDER keeps the pictures, for a person to look at.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from atp_edge.pipeline.report import write_report
from tests.atp_edge.pipeline.test_model_card import figures
from tests.atp_edge.pipeline.test_report import whole_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed here"
)
VIEWS = [(width, dark) for width in (1280, 400) for dark in (False, True)]
# Headless windows are 500 pixels wide at least: the page lies in a frame.
FRAME = """<body style="margin:0"><iframe src="report.html" width="{width}" height="{height}"
 style="border:0"></iframe><pre id="seen"></pre>
<script>onmessage = event => document.getElementById("seen").textContent = event.data</script>"""
LOOK = """<script>
const folds = document.querySelectorAll("details");
addEventListener("load", () => {
  folds.forEach(fold => fold.open = true);
  setTimeout(() => {
    const wide = [...document.querySelectorAll("body *")].filter(
      x => !x.closest(".wide table, .plotly-graph-div *")
        && x.getBoundingClientRect().right > innerWidth + 1);
    parent.postMessage(JSON.stringify({
      width: innerWidth, needs: document.documentElement.scrollWidth,
      wide: wide.map(x => x.tagName + ": " + x.textContent.slice(0, 40)),
      plots: [...document.querySelectorAll(".plotly-graph-div .main-svg:first-child")]
        .map(x => x.getBoundingClientRect().width),
      page: getComputedStyle(document.body).backgroundColor}), "*");
    if (!location.hash) folds.forEach((fold, i) => fold.open = i === 0);
  }, 1500);
});
</script>"""


def browser(page: Path, width: int, height: int, dark: bool, *options: str) -> str:
    """What Chromium prints of a page."""
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=6000", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run's page, with samples and rounding, that says how wide it is."""
    found: dict[str, Any] = figures()
    found["samples"] = {
        "rule": "The first test blocks.",
        "rows": [
            {
                "prompt": "Permission is hereby granted, free of charge, to any person " * 3,
                "untouched": "a" * 300,
                "tuned": "obtaining a copy of this software",
                "slim": "<b>obtaining</b> a copy",
            }
        ],
    }
    found["verify"]["quality"] = {"onnx_perplexity": 20.9, "fp32_perplexity": 20.8, "ratio": 1.005}
    found["rounding"] = {
        "fp32_perplexity": 20.8,
        "rows": [
            {"precision": p, "quantizer": "gptq", "onnx_bytes": size, "onnx_perplexity": value,
             "ratio": value / 20.8}
            for p, size, value in (("int4", 62e6, 21.4), ("int8", 95e6, 20.85))
        ],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("seen")
    run = write_report(whole_run(folder, found))
    run.write_text(run.read_text().replace("</body>", LOOK + "</body>"))
    return run


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_nothing_is_wider_than_the_page(page: Path, width: int, dark: bool) -> None:
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width, height=4000))
    dom = browser(frame, max(500, width), 4000, dark, "--dump-dom")
    said = re.search(r'id="seen">(\{.*?\})</pre>', dom, re.S)
    assert said is not None, dom[-2000:]
    seen = json.loads(html.unescape(said[1]))
    assert seen["width"] == width
    assert seen["needs"] <= width, seen["wide"]
    assert seen["wide"] == []
    assert len(seen["plots"]) == 6
    assert all(0.5 * width < plot <= width for plot in seen["plots"]), seen["plots"]
    red = int(re.findall(r"\d+", seen["page"])[0])
    assert red < 60 if dark else red > 200


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_it_can_be_looked_at(page: Path, width: int, dark: bool) -> None:
    frame = page.with_name(f"frame-{width}-seen.html")
    frame.write_text(FRAME.format(width=width, height=5200).replace("report.html", "report.html#x"))
    kept = Path(os.environ.get("ATP_SCREENSHOTS", page.parent))
    kept.mkdir(exist_ok=True)
    picture = kept / f"report-{width}-{'dark' if dark else 'light'}.png"
    browser(frame, max(500, width), 5200, dark, f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
