// SPDX-License-Identifier: MIT
// Rows by id and sums for Python: arguments checked, params filled.
#include <nanobind/nanobind.h>

#include "cpu_arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

nb::object embedding(const Tensor& ids, const Tensor& weight, int64_t first) {
    EmbeddingParams p{};
    expect(ids.ndim() == 1, "ids", "expected [T]");
    float_type(weight, "weight");
    expect_shape(weight, "weight", {kAny, kAny});
    p.num_tokens = ids.size(0);
    p.num_rows = weight.size(0);
    p.row_bytes = weight.size(1) * weight.element_bytes();
    p.first = first;
    p.ids = vector_of<int64_t>(ids, "ids", python::kInt64, p.num_tokens);
    p.weight = weight.data<void>();
    Tensor out = weight.empty({p.num_tokens, weight.size(1)});
    p.out = out.data<void>();
    run(kernels().embedding, p);
    return out.object();
}

nb::object add(const Tensor& x, const Tensor& y) {
    AddParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.size = x.size(1);
    expect_same(y, "y", p.dtype);
    expect_shape(y, "y", {p.num_tokens, p.size}, 1);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.y = y.data<void>();
    p.y_stride = y.stride(0);
    Tensor out = x.empty_like();
    p.out = out.data<void>();
    run(kernels().add, p);
    return out.object();
}

}  // namespace

void bind_elementwise(nb::module_& m) {
    def_op(m, "embedding", &embedding, "ids"_a, "weight"_a, "first"_a);
    def_op(m, "add", &add, "x"_a, "y"_a);
}

}  // namespace tokenspeed::cpu
