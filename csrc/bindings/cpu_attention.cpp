// SPDX-License-Identifier: MIT
// Attention and what stands around it for Python: arguments checked, params filled.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cpu_arguments.h"
#include "cpu_cache.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

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

// Of scores: the largest product must make the largest score.
float scale_of(double scale) {
    expect(scale >= 1e-30 && scale <= 1e30, "scale", "must be positive, within [1e-30, 1e30]");
    return static_cast<float>(scale);
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
    p.kv_dtype = cache_type(cache, cache_name);
    p.page_size = cache.size(1);
    p.keys = cache.data<void>();
    p.key_page_stride = cache.stride(0);
    p.key_stride = cache.stride(1);
    expect_type(page_table, "page_table", python::kInt32);
    expect_shape(page_table, "page_table", {kAny, kAny});
    p.page_table = page_table.data<int32_t>();
    p.max_pages = page_table.size(1);
    expect(slots.ndim() == 1, "slots", "expected [R]");
    p.num_rows = slots.size(0);
    p.slots = indices<int32_t>(slots, "slots", python::kInt32, Axis::kRows, p.num_rows,
                               page_table.size(0));
    p.q_start = vector_of<int32_t>(q_start, "q_start", python::kInt32, p.num_rows + 1);
    p.kv_len = vector_of<int32_t>(kv_len, "kv_len", python::kInt32, p.num_rows);
    p.scale = scale_of(scale);
    p.causal = true;
    check_values(p, check_rows);
    return p;
}

nb::object attention_gqa(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                         const Tensor& page_table, const Tensor& slots, const Tensor& q_start,
                         const Tensor& kv_len, double scale, int64_t window, int64_t) {
    expect_shape(q, "q", {kAny, kAny, kAny}, 2);
    const int64_t extra = key_cache.is(python::kUInt8) ? kScaleBytes : 0;
    expect_shape(key_cache, "key_cache", {kAny, kAny, kAny, q.size(2) + extra}, 3);
    expect_shape(value_cache, "value_cache",
                 {key_cache.size(0), key_cache.size(1), key_cache.size(2), kAny}, 3);
    expect(value_cache.size(3) >= extra, "value_cache", "its rows have no room for a scale");
    expect(window >= 0, "window", "must not be negative");
    AttentionParams p =
        attention_params(q, "q", key_cache, "key_cache", page_table, slots, q_start, kv_len, scale);
    p.num_kv_heads = key_cache.size(2);
    expect(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "q",
           "its heads must be a multiple of the cache's");
    expect(cache_type(value_cache, "value_cache") == p.kv_dtype, "value_cache",
           "its dtype differs from key_cache's");
    p.value_dim = value_cache.size(3) - extra;
    p.values = value_cache.data<void>();
    p.window = window;
    p.key_head_stride = key_cache.stride(2);
    p.value_page_stride = value_cache.stride(0);
    p.value_stride = value_cache.stride(1);
    p.value_head_stride = value_cache.stride(2);
    Tensor out = q.empty({p.num_tokens, p.num_heads, p.value_dim});
    p.out = out.data<void>();
    run(kernels().attention, p);
    return out.object();
}

nb::object attention_mla(const Tensor& q_latent, const Tensor& q_pe, const Tensor& cache,
                         const Tensor& page_table, const Tensor& slots, const Tensor& q_start,
                         const Tensor& kv_len, double scale, int64_t) {
    float_type(cache, "cache");
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
    p.value_page_stride = p.key_page_stride;
    p.value_stride = p.key_stride;
    Tensor out = q_latent.empty({p.num_tokens, p.num_heads, p.value_dim});
    p.out = out.data<void>();
    run(kernels().attention, p);
    return out.object();
}

// ---- Keys in line ------------------------------------------------------------------------------

// REQUIRES: what `p` points to lasts; checks row bounds of queries and keys.
void check_bounds(const int32_t* starts, int64_t rows, int64_t total, const char* name) {
    bool rising = starts[0] == 0 && starts[rows] == total;
    for (int64_t r = 0; r < rows; ++r) rising &= starts[r] <= starts[r + 1];
    expect(rising, name, "must rise from 0 to the number of tokens");
}

nb::tuple attention_ragged(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_start,
                           const Tensor& k_start, double scale, bool causal,
                           const std::optional<Tensor>& q_tail,
                           const std::optional<Tensor>& k_tail) {
    AttentionParams p{};
    p.dtype = float_type(q, "q");
    expect_shape(q, "q", {kAny, kAny, kAny}, 2);
    p.num_tokens = q.size(0);
    p.num_heads = q.size(1);
    p.q_dim = q.size(2);
    p.q = q.data<void>();
    p.q_stride = q.stride(0);
    p.q_head_stride = q.stride(1);
    expect_shape(k, "k", {kAny, kAny, p.q_dim}, 2);
    const int64_t keys = k.size(0);
    p.num_kv_heads = k.size(1);
    expect(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "q",
           "its heads must be a multiple of k's");
    expect_same(k, "k", p.dtype);
    expect_same(v, "v", p.dtype);
    expect_shape(v, "v", {keys, p.num_kv_heads, kAny}, 2);
    p.kv_dtype = p.dtype;
    p.keys = k.data<void>();
    p.key_stride = k.stride(0);
    p.key_head_stride = k.stride(1);
    p.values = v.data<void>();
    p.value_dim = v.size(2);
    p.value_stride = v.stride(0);
    p.value_head_stride = v.stride(1);
    expect(q_tail.has_value() == k_tail.has_value(), "k_tail", "q_tail and k_tail come together");
    if (q_tail && k_tail) {
        expect_same(*q_tail, "q_tail", p.dtype);
        expect_shape(*q_tail, "q_tail", {p.num_tokens, p.num_heads, kAny}, 2);
        expect_same(*k_tail, "k_tail", p.dtype);
        expect_shape(*k_tail, "k_tail", {keys, q_tail->size(2)}, 1);
        p.q_tail_dim = q_tail->size(2);
        p.q_tail = q_tail->data<void>();
        p.q_tail_stride = q_tail->stride(0);
        p.q_tail_head_stride = q_tail->stride(1);
        p.k_tail = k_tail->data<void>();
        p.k_tail_stride = k_tail->stride(0);
    }
    expect(q_start.ndim() == 1 && q_start.size(0) >= 1, "q_start", "expected [R + 1]");
    p.num_rows = q_start.size(0) - 1;
    p.q_start = vector_of<int32_t>(q_start, "q_start", python::kInt32, p.num_rows + 1);
    p.k_start = vector_of<int32_t>(k_start, "k_start", python::kInt32, p.num_rows + 1);
    check_values(p, [keys](const AttentionParams& now) {
        check_bounds(now.q_start, now.num_rows, now.num_tokens, "q_start");
        check_bounds(now.k_start, now.num_rows, keys, "k_start");
    });
    p.scale = scale_of(scale);
    p.causal = causal;
    Tensor out = q.empty({p.num_tokens, p.num_heads, p.value_dim});
    Tensor lse = q.empty({p.num_tokens, p.num_heads}, python::kFloat32);
    p.out = out.data<void>();
    p.lse = lse.data<float>();
    run(kernels().attention, p);
    return nb::make_tuple(out.object(), lse.object());
}

nb::tuple merge_state(const Tensor& a, const Tensor& lse_a, const Tensor& b, const Tensor& lse_b) {
    MergeParams p{};
    p.dtype = float_type(a, "a");
    expect_shape(a, "a", {kAny, kAny, kAny});
    expect_same(b, "b", p.dtype);
    expect_shape(b, "b", {a.size(0), a.size(1), a.size(2)});
    for (const auto& [lse, name] : {std::pair{&lse_a, "lse_a"}, std::pair{&lse_b, "lse_b"}}) {
        expect_type(*lse, name, python::kFloat32);
        expect_shape(*lse, name, {a.size(0), a.size(1)});
    }
    p.num_rows = a.size(0) * a.size(1);
    p.size = a.size(2);
    p.a = a.data<void>();
    p.b = b.data<void>();
    p.lse_a = lse_a.data<float>();
    p.lse_b = lse_b.data<float>();
    Tensor out = a.empty_like(), lse = lse_a.empty_like();
    p.out = out.data<void>();
    p.lse = lse.data<float>();
    run(kernels().merge_state, p);
    return nb::make_tuple(out.object(), lse.object());
}

void check_gather(const GatherParams& p, int64_t num_pages) {
    check_bounds(p.starts, p.num_rows, p.num_out, "starts");
    for (int64_t r = 0; r < p.num_rows; ++r) {
        const int64_t end = int64_t{p.first[r]} + p.starts[r + 1] - p.starts[r];
        expect(p.first[r] >= 0 && end <= p.max_pages * p.page_size, "first",
               "a position is not in the row's pages");
        const int32_t* const pages = p.page_table + p.slots[r] * p.max_pages;
        for (int64_t i = p.first[r] / p.page_size; i * p.page_size < end; ++i) {
            expect(pages[i] >= 0 && pages[i] < num_pages, "page_table", "no such page");
        }
    }
}

nb::object gather_latent(const Tensor& cache, const Tensor& page_table, const Tensor& slots,
                         const Tensor& first, const Tensor& starts, int64_t num_rows,
                         const nb::object& dtype) {
    GatherParams p{};
    p.dtype = float_type(cache, "cache");
    expect_shape(cache, "cache", {kAny, kAny, kAny});
    const std::string name = nb::str(dtype).c_str();
    const bool wide = name == "torch.float32";
    expect(wide || name == "torch.bfloat16", "dtype", "expected float32 or bfloat16");
    expect(num_rows >= 0, "num_rows", "must not be negative");
    p.out_dtype = wide ? DType::kFloat32 : DType::kBFloat16;
    p.num_out = num_rows;
    p.size = cache.size(2);
    p.cache = cache.data<void>();
    p.page_size = cache.size(1);
    expect_type(page_table, "page_table", python::kInt32);
    expect_shape(page_table, "page_table", {kAny, kAny});
    p.page_table = page_table.data<int32_t>();
    p.max_pages = page_table.size(1);
    expect(slots.ndim() == 1, "slots", "expected [R]");
    p.num_rows = slots.size(0);
    p.slots = indices<int32_t>(slots, "slots", python::kInt32, Axis::kRows, p.num_rows,
                               page_table.size(0));
    p.first = vector_of<int32_t>(first, "first", python::kInt32, p.num_rows);
    p.starts = vector_of<int32_t>(starts, "starts", python::kInt32, p.num_rows + 1);
    check_values(p, [pages = cache.size(0)](const GatherParams& now) { check_gather(now, pages); });
    Tensor out = cache.empty({num_rows, p.size}, wide ? python::kFloat32 : python::kBFloat16);
    p.out = out.data<void>();
    run(kernels().gather_latent, p);
    return out.object();
}

void prefer_huge_pages(const Tensor& memory) {
    int64_t count = 1;
    for (int axis = 0; axis < memory.ndim(); ++axis) count *= memory.size(axis);
    expect(memory.dense_from(0), "memory", "must be contiguous");
    advise_huge_pages(memory.data<void>(), static_cast<size_t>(count * memory.element_bytes()));
}

}  // namespace

void bind_attention(nb::module_& m) {
    bind_rope(m);
    def_op(m, "attention_gqa", &attention_gqa, "q"_a, "key_cache"_a, "value_cache"_a,
           "page_table"_a, "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a, "window"_a = 0,
           "max_q_len"_a = 0);
    def_op(m, "attention_mla", &attention_mla, "q_latent"_a, "q_pe"_a, "cache"_a, "page_table"_a,
           "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a, "max_q_len"_a = 0);
    def_op(m, "attention_ragged", &attention_ragged, "q"_a, "k"_a, "v"_a, "q_start"_a, "k_start"_a,
           "scale"_a, "causal"_a = true, "q_tail"_a.none() = nb::none(),
           "k_tail"_a.none() = nb::none());
    def_op(m, "merge_state", &merge_state, "a"_a, "lse_a"_a, "b"_a, "lse_b"_a);
    def_op(m, "gather_latent", &gather_latent, "cache"_a, "page_table"_a, "slots"_a, "first"_a,
           "starts"_a, "num_rows"_a, "dtype"_a);
    def_op(m, "prefer_huge_pages", &prefer_huge_pages, "memory"_a);
    m.def("keep_freed_memory", &keep_freed_memory);
}

}  // namespace tokenspeed::cpu
