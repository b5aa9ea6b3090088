// SPDX-License-Identifier: MIT
// Expert choice and routed experts for Python: arguments checked, params filled.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cpu_packed.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

nb::tuple route(const Tensor& logits, const std::optional<Tensor>& bias, int top_k,
                const std::string& scoring, int n_group, int topk_group,
                const std::string& group_score, bool norm, double scale) {
    RouteParams p{};
    expect_type(logits, "logits", python::kFloat32);
    expect_shape(logits, "logits", {kAny, kAny});
    p.num_tokens = logits.size(0);
    p.num_experts = logits.size(1);
    expect(p.num_experts <= 4096, "logits", "at most 4096 experts");
    p.logits = logits.data<float>();
    if (bias) p.bias = vector_of<float>(*bias, "bias", python::kFloat32, p.num_experts);
    expect(top_k >= 1 && top_k <= p.num_experts, "top_k", "must be in [1, number of experts]");
    p.sigmoid = scoring == "sigmoid";
    expect(p.sigmoid || scoring == "softmax", "scoring", "expected softmax or sigmoid");
    p.group_top2 = group_score == "top2";
    expect(p.group_top2 || group_score == "max", "group_score", "expected max or top2");
    expect(n_group >= 1 && p.num_experts % n_group == 0, "n_group", "must divide the experts");
    expect(topk_group >= 1 && topk_group <= n_group, "topk_group", "must be in [1, n_group]");
    expect(p.num_experts / n_group * topk_group >= top_k, "topk_group",
           "leaves fewer experts than top_k");
    p.top_k = top_k;
    p.n_group = n_group;
    p.topk_group = topk_group;
    p.norm = norm;
    p.scale = static_cast<float>(scale);
    Tensor weights = logits.empty({p.num_tokens, top_k});
    Tensor ids = logits.empty({p.num_tokens, top_k}, python::kInt32);
    p.weights = weights.data<float>();
    p.ids = ids.data<int32_t>();
    run(kernels().route, p);
    return nb::make_tuple(weights.object(), ids.object());
}

// The routing, and that every id is below `experts`.
void take_choices(MoeParams& p, const Tensor& weights, const Tensor& ids, int64_t experts) {
    expect_type(weights, "weights", python::kFloat32);
    expect_shape(weights, "weights", {p.num_tokens, kAny});
    p.top_k = weights.size(1);
    p.weights = weights.data<float>();
    expect_type(ids, "ids", python::kInt32);
    expect_shape(ids, "ids", {p.num_tokens, p.top_k});
    p.ids = ids.data<int32_t>();
    check_values(p, [experts](const MoeParams& now) {
        bool inside = true;
        for (int64_t i = 0; i < now.num_tokens * now.top_k; ++i) inside &= now.ids[i] < experts;
        expect(inside, "ids", "an id is not below the number of experts");
    });
}

nb::object moe(const Tensor& x, const Packed& w13, const Packed& w2, const Tensor& weights,
               const Tensor& ids, const std::optional<Tensor>& addend) {
    MoeParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    expect(w13.ndim == 3 && w13.weight.in == x.size(1), "w13", "expected [E, 2I, D]");
    expect(w13.weight.out % 2 == 0, "w13", "expected [E, 2I, D], got an odd size");
    p.w13 = w13.weight;
    expect(w2.ndim == 3 && w2.weight.count == p.w13.count && w2.weight.out == p.w13.in &&
               w2.weight.in * 2 == p.w13.out,
           "w2", "expected [E, D, I]");
    p.w2 = w2.weight;
    take_choices(p, weights, ids, p.w13.count);
    if (addend) {
        expect_same(*addend, "addend", p.dtype);
        expect_shape(*addend, "addend", {p.num_tokens, p.w13.in}, 1);
        p.addend = addend->data<void>();
        p.addend_stride = addend->stride(0);
    }
    Tensor out = x.empty_like();
    p.out = out.data<void>();
    run(kernels().moe, p);
    return out.object();
}

}  // namespace

void bind_moe(nb::module_& m) {
    def_op(m, "route", &route, "logits"_a, "bias"_a.none(), "top_k"_a, "scoring"_a, "n_group"_a,
           "topk_group"_a, "group_score"_a, "norm"_a, "scale"_a);
    def_op(m, "moe", &moe, "x"_a, "w13"_a, "w2"_a, "weights"_a, "ids"_a, "addend"_a = nb::none());
}

}  // namespace tokenspeed::cpu
