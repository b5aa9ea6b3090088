// SPDX-License-Identifier: MIT
// The CPU kernels for Python. Tensors come and go by DLPack's C exchange API (version 1.2 and up of
// the DLPack specification), which costs nanoseconds and needs no torch headers. Every shape, type
// and index that a kernel relies on is checked here; page ids of the page table are the scheduler's
// word. Kernels run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "dlpack_tensor.h"
#include "kernels.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

using python::Tensor;
using python::Type;

[[noreturn]] void refuse(const char* name, const std::string& why) {
    throw nb::value_error((std::string(name) + ": " + why).c_str());
}

void expect(bool holds, const char* name, const std::string& why) {
    if (!holds) refuse(name, why);
}

constexpr int64_t kAny = -1;

// The tensor has these sizes (kAny: whatever it has) and is dense from axis `dense_from` on.
void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                  int dense_from = 0) {
    bool matches = t.ndim() == static_cast<int>(sizes.size());
    std::string wanted;
    int axis = 0;
    for (const int64_t size : sizes) {
        matches = matches && (size == kAny || t.size(axis) == size);
        wanted += (axis++ != 0 ? ", " : "") + (size == kAny ? "any" : std::to_string(size));
    }
    expect(matches, name, "expected shape [" + wanted + "], got " + t.shape_text());
    expect(t.dense_from(dense_from), name, "must be contiguous");
}

void expect_type(const Tensor& t, const char* name, const Type& type) {
    expect(t.is(type), name, std::string("expected ") + type.name);
}

DType float_type(const Tensor& t, const char* name) {
    if (t.is(python::kFloat32)) return DType::kFloat32;
    expect(t.is(python::kBFloat16), name, "expected float32 or bfloat16");
    return DType::kBFloat16;
}

void expect_same(const Tensor& t, const char* name, DType dtype) {
    expect(float_type(t, name) == dtype, name, "its dtype differs from the first argument's");
}

template <typename T>
const T* indices(const Tensor& t, const char* name, const Type& type, int64_t count,
                 int64_t below) {
    expect_type(t, name, type);
    expect_shape(t, name, {count});
    const T* const values = t.data<T>();
    bool inside = true;
    for (int64_t i = 0; i < count; ++i) inside &= values[i] >= 0 && values[i] < below;
    expect(inside, name, "an index is not in [0, " + std::to_string(below) + ")");
    return values;
}

template <typename T>
const T* vector_of(const Tensor& t, const char* name, const Type& type, int64_t count) {
    expect_type(t, name, type);
    expect_shape(t, name, {count});
    return t.data<T>();
}

template <typename Params>
void run(void (*kernel)(const Params&), const Params& params) {
    nb::gil_scoped_release released;
    kernel(params);
}

// ---- Elementwise -------------------------------------------------------------------------------

nb::object rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    NormParams p{};
    p.dtype = float_type(x, "x");
    const int last = x.ndim() - 1;
    expect(last == 1 || last == 2, "x", "expected [T, D] or [T, H, D], got " + x.shape_text());
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
    expect(x.size(1) % 2 == 0, "x", "expected [T, 2I], got " + x.shape_text());
    p.num_tokens = x.size(0);
    p.size = x.size(1) / 2;
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    Tensor out = x.empty({p.num_tokens, p.size});
    p.out = out.data<void>();
    run(kernels().silu_mul, p);
    return out.object();
}

// ---- Rotary embedding and the cache ------------------------------------------------------------

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
           "its rows must be even and at most " + std::to_string(p.head_dim) + " long");
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
    nb::gil_scoped_release released;
    kernels().rope(rotate_q);
    kernels().rope(rotate_k);
    kernels().append(append_v);
    nb::gil_scoped_acquire held;
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
    nb::gil_scoped_release released;
    kernels().rope(rotate_q);
    kernels().rope(rotate_k);
    kernels().append(append_latent);
    nb::gil_scoped_acquire held;
    return out.object();
}

// ---- Attention ---------------------------------------------------------------------------------

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
    expect(slots.ndim() == 1, "slots", "expected [R], got " + slots.shape_text());
    p.num_rows = slots.size(0);
    p.slots = indices<int32_t>(slots, "slots", python::kInt32, p.num_rows, page_table.size(0));
    p.q_start = vector_of<int32_t>(q_start, "q_start", python::kInt32, p.num_rows + 1);
    p.kv_len = vector_of<int32_t>(kv_len, "kv_len", python::kInt32, p.num_rows);
    expect(p.q_start[0] == 0 && p.q_start[p.num_rows] == p.num_tokens, "q_start",
           "must begin with 0 and end with the number of tokens");
    for (int64_t r = 0; r < p.num_rows; ++r) {
        const int64_t length = p.q_start[r + 1] - p.q_start[r];
        expect(length >= 0, "q_start", "must not fall");
        expect(p.kv_len[r] >= length && p.kv_len[r] <= p.max_pages * p.page_size, "kv_len",
               "must be at least the row's queries and fit its pages");
    }
    p.scale = static_cast<float>(scale);
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

// ---- Experts and weights -----------------------------------------------------------------------

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

nb::object moe(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights,
               const Tensor& ids) {
    MoeParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.size = x.size(1);
    expect_same(w13, "w13", p.dtype);
    expect_shape(w13, "w13", {kAny, kAny, p.size});
    expect(w13.size(1) % 2 == 0, "w13", "expected [E, 2I, D], got " + w13.shape_text());
    p.num_experts = w13.size(0);
    p.inner = w13.size(1) / 2;
    expect_same(w2, "w2", p.dtype);
    expect_shape(w2, "w2", {p.num_experts, p.size, p.inner});
    expect_type(weights, "weights", python::kFloat32);
    expect_shape(weights, "weights", {p.num_tokens, kAny});
    p.top_k = weights.size(1);
    expect_type(ids, "ids", python::kInt32);
    expect_shape(ids, "ids", {p.num_tokens, p.top_k});
    p.ids = ids.data<int32_t>();
    bool inside = true;
    for (int64_t i = 0; i < p.num_tokens * p.top_k; ++i) {
        inside &= p.ids[i] >= 0 && p.ids[i] < p.num_experts;
    }
    expect(inside, "ids", "an id is not in [0, " + std::to_string(p.num_experts) + ")");
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.w13 = w13.data<void>();
    p.w2 = w2.data<void>();
    p.weights = weights.data<float>();
    Tensor out = x.empty_like();
    p.out = out.data<void>();
    run(kernels().moe, p);
    return out.object();
}

nb::object linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    LinearParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.in = x.size(1);
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {kAny, p.in});
    p.num_heads = 1;
    p.out_size = weight.size(0);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.weight = weight.data<void>();
    if (bias) {
        expect_same(*bias, "bias", p.dtype);
        expect_shape(*bias, "bias", {p.out_size});
        p.bias = bias->data<void>();
    }
    Tensor out = x.empty({p.num_tokens, p.out_size});
    p.out = out.data<void>();
    run(kernels().linear, p);
    return out.object();
}

nb::object head_linear(const Tensor& x, const Tensor& weight) {
    LinearParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny, kAny}, 2);
    p.num_tokens = x.size(0);
    p.num_heads = x.size(1);
    p.in = x.size(2);
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {p.num_heads, kAny, p.in});
    p.out_size = weight.size(1);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.x_head_stride = x.stride(1);
    p.weight = weight.data<void>();
    Tensor out = x.empty({p.num_tokens, p.num_heads, p.out_size});
    p.out = out.data<void>();
    run(kernels().linear, p);
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
    p.slots = indices<int64_t>(slots, "slots", python::kInt64, p.num_rows, prompt_seen.size(0));
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
    m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a);
    m.def("add_rms_norm", &add_rms_norm, "x"_a, "residual"_a, "weight"_a, "eps"_a);
    m.def("silu_mul", &silu_mul, "x"_a);
    m.def("rope_append_gqa", &rope_append_gqa, "q"_a, "k"_a, "v"_a, "cos_sin"_a, "positions"_a,
          "cache_index"_a, "key_cache"_a, "value_cache"_a, "interleaved"_a);
    m.def("rope_append_mla", &rope_append_mla, "q_pe"_a, "k_pe"_a, "latent"_a, "cos_sin"_a,
          "positions"_a, "cache_index"_a, "cache"_a, "interleaved"_a);
    m.def("attention_gqa", &attention_gqa, "q"_a, "key_cache"_a, "value_cache"_a, "page_table"_a,
          "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a);
    m.def("attention_mla", &attention_mla, "q_latent"_a, "q_pe"_a, "cache"_a, "page_table"_a,
          "slots"_a, "q_start"_a, "kv_len"_a, "scale"_a);
    m.def("route", &route, "logits"_a, "bias"_a.none(), "top_k"_a, "scoring"_a, "n_group"_a,
          "topk_group"_a, "group_score"_a, "norm"_a, "scale"_a);
    m.def("moe", &moe, "x"_a, "w13"_a, "w2"_a, "weights"_a, "ids"_a);
    m.def("linear", &linear, "x"_a, "weight"_a, "bias"_a.none() = nb::none());
    m.def("head_linear", &head_linear, "x"_a, "weight"_a);
    m.def("sample", &sample, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a,
          "position"_a);
    m.def("apply_penalties", &apply_penalties, "logits"_a, "slots"_a, "prompt_seen"_a,
          "output_count"_a, "repetition"_a, "presence"_a, "frequency"_a);
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("available_isas", &available_isas);
    m.def(
        "set_isa",
        [](const std::string& name) {
            expect(set_isa(name.c_str()), "name", "unknown here: " + name);
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
