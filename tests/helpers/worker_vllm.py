"""Run by a Python that has vLLM: greedy tokens of the base and of adapters, as JSON on the last line.

python worker_vllm.py MODEL PROMPTS_JSON NEW_TOKENS ADAPTER...
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main():
    model, prompts, count, *adapters = sys.argv[1:]
    engine = LLM(
        model, dtype="float32", enforce_eager=True, enable_lora=True, max_loras=len(adapters),
        max_lora_rank=8, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    requests = [None, *(LoRARequest(path, i + 1, path) for i, path in enumerate(adapters))]
    answers = [
        [list(a.outputs[0].token_ids) for a in engine.generate(asked, greedy, lora_request=request)]
        for request in requests
    ]
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
