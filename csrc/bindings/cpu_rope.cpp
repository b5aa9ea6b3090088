// SPDX-License-Identifier: MIT
// Rotary embedding and appends to the paged cache for Python: arguments checked, params filled.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "cpu_arguments.h"
#include "cpu_cache.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

RopeParams rope_params(const Tensor& x, const char* name, const Tensor& cos_sin,
                       const Tensor& positions, bool interleaved) {
    RopeParams p{};
    p.dtype = float_type(x, name);
    expect_shape(x, name, {kAny, kAny, kAny}, 2);
    p.num_tokens = x.size(0);
    p.num_heads = x.size(1);
    p.head_dim = x.size(2);
    expect_type(cos_sin, "cos_sin", python::kFloat32);
    expect_shape(cos_sin, "cos_sin", {kAny, kAny});
    p.rot = cos_sin.size(1);
    expect(p.rot % 2 == 0 && p.rot <= p.head_dim, "cos_sin",
           "its rows must be even and at most as long as a head");
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.x_head_stride = x.stride(1);
    p.cos_sin = cos_sin.data<float>();
    p.positions = indices<int32_t>(positions, "positions", python::kInt32, Axis::kTokens,
                                   p.num_tokens, cos_sin.size(0));
    p.interleaved = interleaved;
    return p;
}

AppendParams append_params(const Tensor& x, const char* name) {
    AppendParams p{};
    p.dtype = float_type(x, name);
    p.num_tokens = x.size(0);
    p.num_heads = x.ndim() == 3 ? x.size(1) : 1;
    p.size = x.size(x.ndim() - 1);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    return p;
}

nb::object rope_append_gqa(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                           const Tensor& positions, const Tensor& cache_index, Tensor& key_cache,
                           Tensor& value_cache, bool interleaved) {
    RopeParams rotate_q = rope_params(q, "q", cos_sin, positions, interleaved);
    expect_shape(k, "k", {q.size(0), kAny, q.size(2)}, 2);
    RopeParams rotate_k = rope_params(k, "k", cos_sin, positions, interleaved);
    expect_shape(v, "v", {q.size(0), k.size(1), kAny}, 1);
    const DType kept = cache_type(key_cache, "key_cache");
    const int64_t extra = kept == DType::kInt8Row ? kScaleBytes : 0;
    expect_shape(key_cache, "key_cache", {kAny, kAny, k.size(1), k.size(2) + extra}, 3);
    expect_shape(value_cache, "value_cache",
                 {key_cache.size(0), key_cache.size(1), v.size(1), v.size(2) + extra}, 3);
    expect(cache_type(value_cache, "value_cache") == kept, "value_cache",
           "its dtype differs from key_cache's");
    Tensor out = q.empty_like();
    rotate_q.out_dtype = rotate_q.dtype;
    rotate_q.out = out.data<void>();
    rotate_q.out_rows = dense_rows(rotate_q.num_heads, rotate_q.head_dim);
    rotate_k.out_dtype = kept;
    rotate_k.out = key_cache.data<void>();
    rotate_k.out_rows = rows_of(key_cache);
    rotate_k.out_index = indices<int64_t>(cache_index, "cache_index", python::kInt64, Axis::kTokens,
                                          q.size(0), key_cache.size(0) * key_cache.size(1));
    AppendParams append_v = append_params(v, "v");
    append_v.out_dtype = cache_type(value_cache, "value_cache");
    append_v.out = value_cache.data<void>();
    append_v.out_rows = rows_of(value_cache);
    append_v.out_index = rotate_k.out_index;
    run(kernels().rope, rotate_q);
    if (kept == DType::kInt8Row) {
        // Rotated keys are rounded to their own dtype first, as the reference does.
        Tensor turned = k.empty_like();
        AppendParams append_k = append_params(turned, "k");
        append_k.out_dtype = kept;
        append_k.out = rotate_k.out;
        append_k.out_rows = rotate_k.out_rows;
        append_k.out_index = rotate_k.out_index;
        rotate_k.out_dtype = rotate_k.dtype;
        rotate_k.out = turned.data<void>();
        rotate_k.out_rows = dense_rows(rotate_k.num_heads, rotate_k.head_dim);
        rotate_k.out_index = nullptr;
        run(kernels().rope, rotate_k);
        run(kernels().append, append_k);
    } else {
        run(kernels().rope, rotate_k);
    }
    run(kernels().append, append_v);
    return out.object();
}

nb::object rope_append_mla(const Tensor& q_pe, const Tensor& k_pe, const Tensor& latent,
                           const Tensor& cos_sin, const Tensor& positions,
                           const Tensor& cache_index, Tensor& cache, bool interleaved) {
    RopeParams rotate_q = rope_params(q_pe, "q_pe", cos_sin, positions, interleaved);
    const int64_t tokens = q_pe.size(0), rope_dim = q_pe.size(2);
    expect_shape(k_pe, "k_pe", {tokens, rope_dim}, 1);
    expect_shape(latent, "latent", {tokens, kAny}, 1);
    const int64_t row = latent.size(1) + rope_dim;
    expect_shape(cache, "cache", {kAny, kAny, row});
    Tensor out = q_pe.empty_like();
    rotate_q.out_dtype = rotate_q.dtype;
    rotate_q.out = out.data<void>();
    rotate_q.out_rows = dense_rows(rotate_q.num_heads, rope_dim);
    RopeParams rotate_k = rotate_q;
    AppendParams append_latent = append_params(latent, "latent");
    append_latent.out_dtype = float_type(cache, "cache");
    append_latent.out = cache.data<void>();
    append_latent.out_rows = rows_of(cache);
    append_latent.out_index =
        indices<int64_t>(cache_index, "cache_index", python::kInt64, Axis::kTokens, tokens,
                         cache.size(0) * cache.size(1));
    rotate_k.dtype = float_type(k_pe, "k_pe");
    rotate_k.num_heads = 1;
    rotate_k.x = k_pe.data<void>();
    rotate_k.x_stride = k_pe.stride(0);
    rotate_k.x_head_stride = 0;
    rotate_k.out_dtype = append_latent.out_dtype;
    const int64_t element = rotate_k.out_dtype == DType::kFloat32 ? 4 : 2;
    rotate_k.out = static_cast<char*>(append_latent.out) + latent.size(1) * element;
    rotate_k.out_rows = append_latent.out_rows;
    rotate_k.out_index = append_latent.out_index;
    run(kernels().rope, rotate_q);
    run(kernels().rope, rotate_k);
    run(kernels().append, append_latent);
    return out.object();
}

}  // namespace

void bind_rope(nb::module_& m) {
    def_op(m, "rope_append_gqa", &rope_append_gqa, "q"_a, "k"_a, "v"_a, "cos_sin"_a, "positions"_a,
           "cache_index"_a, "key_cache"_a, "value_cache"_a, "interleaved"_a);
    def_op(m, "rope_append_mla", &rope_append_mla, "q_pe"_a, "k_pe"_a, "latent"_a, "cos_sin"_a,
           "positions"_a, "cache_index"_a, "cache"_a, "interleaved"_a);
}

}  // namespace tokenspeed::cpu
