# SPDX-License-Identifier: MIT
"""Prints what the model writes: `python sample.py MODEL_DIR [--chat] [--temperature T] PROMPT`.

Uses transformers, so that it also says what TokenSpeed ought to answer. Refuses to know about
TokenSpeed and about training.
"""

import argparse
from typing import Any

import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("prompt")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's turn")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    model: Any = DeepseekV3ForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    text = args.prompt
    if args.chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": 0.95}
    ids = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=args.max_new_tokens,
        **sampling,
    )
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
