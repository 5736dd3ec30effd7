"""The picture of README: the top of a run's report, as headless Chromium shows it.

python docs/picture.py runs/demo docs/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 1100


def picture(page: Path, target: Path) -> None:
    """Write the top of a page as PNG. Raises SystemExit where there is no browser, and with what it
    says where it fails."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed here")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        done = subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}",
                "--blink-settings=preferredColorScheme=1", "--virtual-time-budget=6000",
                f"--screenshot={shot}", page.resolve().as_uri(),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not shot.exists():
            raise SystemExit(
                f"{browser} ended with {done.returncode} and no picture:\n{done.stderr}"
            )
        shutil.copyfile(shot, target)


if __name__ == "__main__":
    run, png = map(Path, sys.argv[1:])
    picture(run / "report.html", png)
