// SPDX-License-Identifier: MIT
// The CPU kernels for Python. Tensors come and go by DLPack's C exchange API (version 1.2 and up of
// the DLPack specification), which costs nanoseconds and needs no torch headers. Every shape, type
// and index that a kernel relies on is checked here; page ids of the page table are the scheduler's
// word. Kernels run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu_arguments.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

// ---- Elementwise -------------------------------------------------------------------------------

nb::object rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    NormParams p{};
    p.dtype = float_type(x, "x");
    const int last = x.ndim() - 1;
    if (last != 1 && last != 2) refuse("x", "expected [T, D] or [T, H, D], got " + x.shape_text());
    expect(x.dense_from(last), "x", "its last axis must be contiguous");
    p.num_tokens = x.size(0);
    p.num_heads = last == 2 ? x.size(1) : 1;
    p.size = x.size(last);
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {p.size});
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.x_head_stride = last == 2 ? x.stride(1) : 0;
    p.weight = weight.data<void>();
    p.eps = static_cast<float>(eps);
    Tensor out = x.empty_like();
    p.out = out.data<void>();
    run(kernels().norm, p);
    return out.object();
}

nb::tuple add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
    NormParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.num_heads = 1;
    p.size = x.size(1);
    expect_same(residual, "residual", p.dtype);
    expect_shape(residual, "residual", {p.num_tokens, p.size}, 1);
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {p.size});
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.residual = residual.data<void>();
    p.residual_stride = residual.stride(0);
    p.weight = weight.data<void>();
    p.eps = static_cast<float>(eps);
    Tensor out = x.empty_like(), sum = x.empty_like();
    p.out = out.data<void>();
    p.sum = sum.data<void>();
    run(kernels().norm, p);
    return nb::make_tuple(out.object(), sum.object());
}

nb::object silu_mul(const Tensor& x) {
    SiluMulParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    expect(x.size(1) % 2 == 0, "x", "expected [T, 2I], got an odd size");
    p.num_tokens = x.size(0);
    p.size = x.size(1) / 2;
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    Tensor out = x.empty({p.num_tokens, p.size});
    p.out = out.data<void>();
    run(kernels().silu_mul, p);
    return out.object();
}

// ---- Sampling ----------------------------------------------------------------------------------

nb::object sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                  const Tensor& top_p, const Tensor& min_p, const Tensor& seed,
                  const Tensor& position) {
    SampleParams p{};
    expect_type(logits, "logits", python::kFloat32);
    expect_shape(logits, "logits", {kAny, kAny}, 1);
    p.num_rows = logits.size(0);
    p.vocab = logits.size(1);
    expect(p.vocab >= 1, "logits", "no tokens to choose from");
    p.logits = logits.data<float>();
    p.logits_stride = logits.stride(0);
    p.temperature = vector_of<float>(temperature, "temperature", python::kFloat32, p.num_rows);
    p.top_k = vector_of<int32_t>(top_k, "top_k", python::kInt32, p.num_rows);
    p.top_p = vector_of<float>(top_p, "top_p", python::kFloat32, p.num_rows);
    p.min_p = vector_of<float>(min_p, "min_p", python::kFloat32, p.num_rows);
    p.seed = vector_of<int64_t>(seed, "seed", python::kInt64, p.num_rows);
    p.position = vector_of<int64_t>(position, "position", python::kInt64, p.num_rows);
    Tensor ids = logits.empty({p.num_rows}, python::kInt64);
    p.ids = ids.data<int64_t>();
    run(kernels().sample, p);
    return ids.object();
}

void apply_penalties(Tensor& logits, const Tensor& slots, const Tensor& prompt_seen,
                     const Tensor& output_count, const Tensor& repetition, const Tensor& presence,
                     const Tensor& frequency) {
    PenaltyParams p{};
    expect_type(logits, "logits", python::kFloat32);
    expect_shape(logits, "logits", {kAny, kAny}, 1);
    p.num_rows = logits.size(0);
    p.vocab = logits.size(1);
    p.logits = logits.data<float>();
    p.logits_stride = logits.stride(0);
    expect_type(prompt_seen, "prompt_seen", python::kBool);
    expect_shape(prompt_seen, "prompt_seen", {kAny, p.vocab});
    expect_type(output_count, "output_count", python::kInt32);
    expect_shape(output_count, "output_count", {prompt_seen.size(0), p.vocab});
    p.prompt_seen = prompt_seen.data<bool>();
    p.output_count = output_count.data<int32_t>();
    p.slots = indices<int64_t>(slots, "slots", python::kInt64, Axis::kRows, p.num_rows,
                               prompt_seen.size(0));
    p.repetition = vector_of<float>(repetition, "repetition", python::kFloat32, p.num_rows);
    p.presence = vector_of<float>(presence, "presence", python::kFloat32, p.num_rows);
    p.frequency = vector_of<float>(frequency, "frequency", python::kFloat32, p.num_rows);
    run(kernels().penalize, p);
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* const* k = available_kernels(); *k != nullptr; ++k)
        names.push_back((*k)->isa);
    return names;
}

NB_MODULE(_cpu, m) {
    m.doc() = "CPU kernels. Calls, shapes and meanings are those of tokenspeed.kernels.";
    def_op(m, "rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a);
    def_op(m, "add_rms_norm", &add_rms_norm, "x"_a, "residual"_a, "weight"_a, "eps"_a);
    def_op(m, "silu_mul", &silu_mul, "x"_a);
    bind_elementwise(m);
    bind_attention(m);
    bind_recording(m);
    bind_linear(m);
    bind_moe(m);
    def_op(m, "sample", &sample, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
           "seed"_a, "position"_a);
    def_op(m, "apply_penalties", &apply_penalties, "logits"_a, "slots"_a, "prompt_seen"_a,
           "output_count"_a, "repetition"_a, "presence"_a, "frequency"_a);
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("compiler", [] { return std::string(__VERSION__); });
    m.def("available_isas", &available_isas);
    m.def(
        "set_isa",
        [](const std::string& name) {
            if (!set_isa(name.c_str())) throw std::invalid_argument("name: unknown here: " + name);
        },
        "name"_a);
    m.def("num_threads", &num_threads);
    m.def(
        "set_num_threads",
        [](int count) {
            expect(count >= 1 && count <= 4096, "count", "must be in [1, 4096]");
            set_num_threads(count);
        },
        "count"_a);
}

}  // namespace
}  // namespace tokenspeed::cpu
