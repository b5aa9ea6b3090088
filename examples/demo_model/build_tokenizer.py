# SPDX-License-Identifier: MIT
"""Trains the byte-level BPE tokenizer and writes its files: `python build_tokenizer.py OUT`.

Lossless for any UTF-8 text: no normalisation, and all 256 bytes are in the vocabulary.
Refuses to know about the model.
"""

import json
import sys
from pathlib import Path

from corpus import is_test, is_validation, read_source, source_files
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
CONTROL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # visible in decoded text

# A line break takes the next line's indentation with it, so that one token is one block level.
WORDS = (
    r"[\r\n]+[ \t]*"
    r"| ?[\p{L}\p{M}_]+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+"
    r"|\s+(?!\S)|\s+"
)


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in (*CONTROL, *MARKERS)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = [(n, p) for n, p in source_files() if not is_validation(n) and not is_test(n)]
    tokenizer.train_from_iterator((read_source(p) for _, p in names), trainer)
    return tokenizer


def tokenizer_config(chat_template: str) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": chat_template,
    }


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads(train().to_str())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] in CONTROL  # the trainer marks every one as special
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1))
    template = Path(__file__).with_name("chat_template.jinja").read_text().rstrip("\n")
    config = json.dumps(tokenizer_config(template), indent=2)
    (out / "tokenizer_config.json").write_text(config + "\n")
    (out / "chat_template.jinja").write_text(template)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
