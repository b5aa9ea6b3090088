# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""Hugging Face folder -> GGUF, through the converter in llama.cpp's sources.

    to_gguf.py LLAMA_CPP_SOURCES MODEL_FOLDER OUT_FILE bf16|q8_0

The converter knows published tokenizers by a hash; this one is made up, and is said to split text
as GPT-2's does. Prompts are ids: nothing is ever split.
"""

import sys
from pathlib import Path
from typing import Any


def no_sentencepiece(self: Any) -> None:
    raise FileNotFoundError("the tokenizer is a byte-level BPE")


def main(sources: str, model: str, out: str, kind: str) -> None:
    sys.path[:0] = [str(Path(sources) / "gguf-py"), sources]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    TextModel._create_vocab_sentencepiece = no_sentencepiece
    TextModel._set_vocab_sentencepiece = no_sentencepiece
    sys.argv = ["convert_hf_to_gguf.py", "--outtype", kind, "--outfile", out, model]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
