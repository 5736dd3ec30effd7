"""atp-edge: from a Hugging Face decoder and domain text to a slim model shipped as ONNX.

Importing the package lets `AutoModelForCausalLM` load checkpoints of per-layer widths.
"""

from atp_edge.modeling_per_layer import register

register()
