# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""A GGUF file with fewer bits, by llama.cpp itself.

gguf_quantize.py IN_FILE OUT_FILE Q8_0|Q4_0|Q4_K_M
"""

import sys

import llama_cpp


def main(source: str, out: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    if status := llama_cpp.llama_model_quantize(source.encode(), out.encode(), params):
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
