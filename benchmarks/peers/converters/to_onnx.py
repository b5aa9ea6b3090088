# SPDX-License-Identifier: MIT
"""Hugging Face folder -> ONNX with 4-bit weights, through onnxruntime-genai's model builder.

to_onnx.py MODEL_FOLDER OUT_FOLDER int4
"""

import subprocess
import sys
import tempfile

OPTIONS = ("int4_block_size=32", "int4_accuracy_level=4", "int4_is_symmetric=true")


def main(model: str, out: str, weights: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out]
        command += ["-p", weights, "-e", "cpu", "-c", cache, "--extra_options", *OPTIONS]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
