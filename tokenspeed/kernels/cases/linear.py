# SPDX-License-Identifier: MIT
"""Cases of matrix products with a weight, one for all tokens or one for each head."""

from collections.abc import Iterator, Mapping

from tokenspeed.kernels.cases.case import Arguments, Case, Inputs, OpCases, Tolerance, Work, floats

CANCELLED = Tolerance(5e-4, "summands are 100 times the sum")


def _linear(g: Inputs, tokens: int, inputs: int, outputs: int, biased: bool) -> Arguments:
    weight = g.normal(outputs, inputs, scale=inputs**-0.5)
    bias = g.normal(outputs) if biased else None
    return g.inside(g.normal(tokens, inputs)), weight, bias


def _scaled(g: Inputs, scale: float) -> Arguments:
    """Products of `scale` squared; with 1e-20 they are denormals of float32."""
    return g.normal(5, 192, scale=scale), g.normal(40, 192, scale=scale), None


def _cancelling(g: Inputs) -> Arguments:
    """The halves of every sum are each other's negative, up to a small rest."""
    half, rest = g.normal(9, 128, scale=100.0), g.normal(9, 128)
    x = g.normal(9, 256)
    x[:, :128], x[:, 128:] = half, -half
    weight = g.normal(33, 256)
    weight[:, 128:] = weight[:, :128]
    x[:, :128] += rest
    return x, weight, None


def _sparse(g: Inputs) -> Arguments:
    x, weight, bias = _linear(g, 6, 320, 48, True)
    x[1], x[3, 5:] = 0.0, 0.0
    weight[7] = 0.0
    return x, weight, bias


def linear_cases() -> Iterator[Case]:
    for tokens in (0, 1, 2, 3, 5, 8, 16, 17, 64, 133):
        for inputs, outputs in ((64, 64), (1023, 5), (7, 131), (304, 80)):
            sizes = {"num_inputs": inputs, "num_outputs": outputs}
            for biased in (False, True):
                name = f"T={tokens} {inputs}->{outputs}{' + bias' if biased else ''}"
                yield Case(name, _linear, (tokens, inputs, outputs, biased), sizes)
    for tokens in (1, 8, 70):
        sizes = {"num_inputs": 1024, "num_outputs": 640}
        yield Case(f"T={tokens} 1024->640", _linear, (tokens, 1024, 640, False), sizes)
    small = {"num_inputs": 192, "num_outputs": 40}
    for scale in (1e15, 1e-15, 1e-20):
        yield Case(f"values of {scale:g}", _scaled, (scale,), small)
    sizes = {"num_inputs": 256, "num_outputs": 33}
    yield Case("sums that cancel", _cancelling, (), sizes, looser=CANCELLED)
    yield Case("zeros", _sparse, (), {"num_inputs": 320, "num_outputs": 48})


def _heads(g: Inputs, tokens: int, heads: int, inputs: int, outputs: int) -> Arguments:
    """Queries are the front part of longer heads; what lies behind them must not be read."""
    weight = g.normal(heads, outputs, inputs, scale=inputs**-0.5)
    return g.inside(g.normal(tokens, heads, inputs), before=0, behind=7), weight


def head_linear_cases() -> Iterator[Case]:
    for tokens, heads, inputs, outputs in (
        (0, 3, 8, 8),
        (1, 1, 8, 3),
        (1, 16, 128, 512),
        (1, 16, 512, 128),
        (3, 5, 33, 17),
        (16, 4, 64, 32),
        (17, 4, 64, 33),
        (70, 8, 32, 64),
        (200, 2, 40, 100),
    ):
        sizes = {"num_heads": heads, "num_inputs": inputs, "num_outputs": outputs}
        name = f"T={tokens} {heads}x{inputs}->{outputs}"
        yield Case(name, _heads, (tokens, heads, inputs, outputs), sizes)


def _sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _linear(g, tokens, shapes["num_inputs"], shapes["num_outputs"], False)


def _head_sized(g: Inputs, tokens: int, shapes: Mapping[str, int]) -> Arguments:
    return _heads(g, tokens, *(shapes[n] for n in ("num_heads", "num_inputs", "num_outputs")))


def _work(arguments: Arguments) -> Work:
    x, weight = arguments[:2]
    return Work(float(weight.nbytes), 2.0 * len(x) * weight.numel())


TOLERANCE = floats(3e-6, 8e-3, "a float32 sum of products", least=1e-30)
CASES = (
    OpCases(
        "linear",
        linear_cases,
        TOLERANCE,
        weights=(1,),
        sized=_sized,
        work=_work,
        examples=(
            {"num_inputs": 1024, "num_outputs": 4096},
            {"num_inputs": 3072, "num_outputs": 1024},
            {"num_inputs": 1024, "num_outputs": 32768},
        ),
    ),
    OpCases(
        "head_linear",
        head_linear_cases,
        TOLERANCE,
        weights=(1,),
        sized=_head_sized,
        work=_work,
        examples=(
            {"num_heads": 16, "num_inputs": 128, "num_outputs": 512},
            {"num_heads": 16, "num_inputs": 512, "num_outputs": 128},
        ),
    ),
)
