// SPDX-License-Identifier: MIT
// Rotary embedding, the paged cache and attention for Python: arguments checked, params filled.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "cpu_arguments.h"

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
    p.positions =
        indices<int32_t>(positions, "positions", python::kInt32, p.num_tokens, cos_sin.size(0));
    p.interleaved = interleaved;
    return p;
}

AppendParams append_params(const Tensor& x, const char* name, int64_t size) {
    AppendParams p{};
    p.dtype = float_type(x, name);
    p.num_tokens = x.size(0);
    p.size = size;
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
    expect_shape(key_cache, "key_cache", {kAny, kAny, k.size(1), k.size(2)});
    expect_shape(value_cache, "value_cache",
                 {key_cache.size(0), key_cache.size(1), v.size(1), v.size(2)});
    Tensor out = q.empty_like();
    rotate_q.out_dtype = rotate_q.dtype;
    rotate_q.out = out.data<void>();
    rotate_q.out_stride = rotate_q.num_heads * rotate_q.head_dim;
    rotate_k.out_dtype = float_type(key_cache, "key_cache");
    rotate_k.out = key_cache.data<void>();
    rotate_k.out_stride = rotate_k.num_heads * rotate_k.head_dim;
    rotate_k.out_index = indices<int64_t>(cache_index, "cache_index", python::kInt64, q.size(0),
                                          key_cache.size(0) * key_cache.size(1));
    AppendParams append_v = append_params(v, "v", v.size(1) * v.size(2));
    append_v.out_dtype = float_type(value_cache, "value_cache");
    append_v.out = value_cache.data<void>();
    append_v.out_stride = append_v.size;
    append_v.out_index = rotate_k.out_index;
    run(kernels().rope, rotate_q);
    run(kernels().rope, rotate_k);
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
    rotate_q.out_stride = rotate_q.num_heads * rope_dim;
    RopeParams rotate_k = rotate_q;
    AppendParams append_latent = append_params(latent, "latent", latent.size(1));
    append_latent.out_dtype = float_type(cache, "cache");
    append_latent.out = cache.data<void>();
    append_latent.out_stride = row;
    append_latent.out_index = indices<int64_t>(cache_index, "cache_index", python::kInt64, tokens,
                                               cache.size(0) * cache.size(1));
    rotate_k.dtype = float_type(k_pe, "k_pe");
    rotate_k.num_heads = 1;
    rotate_k.x = k_pe.data<void>();
    rotate_k.x_stride = k_pe.stride(0);
    rotate_k.x_head_stride = 0;
    rotate_k.out_dtype = append_latent.out_dtype;
    const int64_t element = rotate_k.out_dtype == DType::kFloat32 ? 4 : 2;
    rotate_k.out = static_cast<char*>(append_latent.out) + latent.size(1) * element;
    rotate_k.out_stride = row;
    rotate_k.out_index = append_latent.out_index;
    run(kernels().rope, rotate_q);
    run(kernels().rope, rotate_k);
    run(kernels().append, append_latent);
    return out.object();
}

// ---- Attention ---------------------------------------------------------------------------------

// That the rows cover the tokens and lie within their pages.
void check_rows(const AttentionParams& p) {
    expect(p.q_start[0] == 0 && p.q_start[p.num_rows] == p.num_tokens, "q_start",
           "must begin with 0 and end with the number of tokens");
    for (int64_t r = 0; r < p.num_rows; ++r) {
        const int64_t length = p.q_start[r + 1] - p.q_start[r];
        expect(length >= 0, "q_start", "must not fall");
        expect(p.kv_len[r] >= length && p.kv_len[r] <= p.max_pages * p.page_size, "kv_len",
               "must be at least the row's queries and fit its pages");
    }
}

// Fills what both attentions share. q: [T, H, D], queries or their first part.
AttentionParams attention_params(const Tensor& q, const char* name, const Tensor& cache,
                                 const char* cache_name, const Tensor& page_table,
                                 const Tensor& slots, const Tensor& q_start, const Tensor& kv_len,
                                 double scale) {
    AttentionParams p{};
    p.dtype = float_type(q, name);
    expect_shape(q, name, {kAny, kAny, kAny}, 2);
    p.num_tokens = q.size(0);
    p.num_heads = q.size(1);
    p.q_dim = q.size(2);
    p.q = q.data<void>();
    p.q_stride = q.stride(0);
    p.q_head_stride = q.stride(1);
    p.kv_dtype = float_type(cache, cache_name);
    p.page_size = cache.size(1);
    p.keys = cache.data<void>();
    expect_type(page_table, "page_table", python::kInt32);
    expect_shape(page_table, "page_table", {kAny, kAny});
    p.page_table = page_table.data<int32_t>();
    p.max_pages = page_table.size(1);
    expect(slots.ndim() == 1, "slots", "expected [R]");
    p.num_rows = slots.size(0);
    p.slots = indices<int32_t>(slots, "slots", python::kInt32, p.num_rows, page_table.size(0));
    p.q_start = vector_of<int32_t>(q_start, "q_start", python::kInt32, p.num_rows + 1);
    p.kv_len = vector_of<int32_t>(kv_len, "kv_len", python::kInt32, p.num_rows);
    p.scale = static_cast<float>(scale);
    check_values([p] { check_rows(p); });
    return p;
}

nb::object attention_gqa(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                         const Tensor& page_table, const Tensor& slots, const Tensor& q_start,
                         const Tensor& kv_len, double scale) {
    expect_shape(q, "q", {kAny, kAny, kAny}, 2);
    expect_shape(key_cache, "key_cache", {kAny, kAny, kAny, q.size(2)});
    expect_shape(value_cache, "value_cache",
                 {key_cache.size(0), key_cache.size(1), key_cache.size(2), kAny});
    AttentionParams p =
        attention_params(q, "q", key_cache, "key_cache", page_table, slots, q_start, kv_len, scale);
    p.num_kv_heads = key_cache.size(2);
    expect(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "q",
           "its heads must be a multiple of the cache's");
    expect(float_type(value_cache, "value_cache") == p.kv_dtype, "value_cache",
           "its dtype differs from key_cache's");
    p.value_dim = value_cache.size(3);
    p.values = value_cache.data<void>();
    p.key_stride = p.num_kv_heads * p.q_dim;
    p.value_stride = p.num_kv_heads * p.value_dim;
    Tensor out = q.empty({p.num_tokens, p.num_heads, p.value_dim});
    p.out = out.data<void>();
    run(kernels().attention, p);
    return out.object();
}

nb::object attention_mla(const Tensor& q_latent, const Tensor& q_pe, const Tensor& cache,
                         const Tensor& page_table, const Tensor& slots, const Tensor& q_start,
                         const Tensor& kv_len, double scale) {
    expect_shape(q_latent, "q_latent", {kAny, kAny, kAny}, 2);
    expect_shape(q_pe, "q_pe", {q_latent.size(0), q_latent.size(1), kAny}, 2);
    expect_shape(cache, "cache", {kAny, kAny, q_latent.size(2) + q_pe.size(2)});
    AttentionParams p = attention_params(q_latent, "q_latent", cache, "cache", page_table, slots,
                                         q_start, kv_len, scale);
    expect_same(q_pe, "q_pe", p.dtype);
    p.num_kv_heads = 1;
    p.q_tail_dim = q_pe.size(2);
    p.q_tail = q_pe.data<void>();
    p.q_tail_stride = q_pe.stride(0);
    p.q_tail_head_stride = q_pe.stride(1);
    p.value_dim = p.q_dim;
    p.values = p.keys;
    p.key_stride = p.value_stride = cache.size(2);
    Tensor out = q_latent.empty({p.num_tokens, p.num_heads, p.value_dim});
    p.out = out.data<void>();
    run(kernels().attention, p);
    return out.object();
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("rope_append_gqa", &rope_append_gqa, "q"_a, "k"_a, "v"_a, "cos_sin"_a, "positions"_a,
          "cache_index"_a, "key_cache"_a, "value_cache"_a, "interleaved"_a);
    m.def("rope_append_mla", &rope_append_mla, "q_pe"_a, "k_pe"_a, "latent"_a, "cos_sin"_a,
          "positions"_a, "cache_index"_a, "cache"_a, "interleaved"_a);
    m.def("attention_gqa", &attention_gqa, "q"_a, "key_cache"_a, "value_cache"_a, "page_table"_a,
          "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a);
    m.def("attention_mla", &attention_mla, "q_latent"_a, "q_pe"_a, "cache"_a, "page_table"_a,
          "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a);
}

}  // namespace tokenspeed::cpu
