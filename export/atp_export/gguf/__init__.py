"""GGUF files of slim models, for llama.cpp and what is built on it."""
