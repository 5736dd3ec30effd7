"""The masked model: LoRA layers that carry a decision, in torch and Triton."""
