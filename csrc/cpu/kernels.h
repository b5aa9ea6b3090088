// SPDX-License-Identifier: MIT
// The kernels of a CPU: their parameters, and the table that holds one build of them for each
// instruction set. Knows raw memory and sizes; callers have checked every shape.
//
// Element types are those of the struct's DType fields; everything else is as its pointer says.
// Strides count elements. The arithmetic of the ops is documented in tokenspeed/kernels.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

enum class DType : int { kFloat32, kBFloat16, kInt8Row };  // kInt8Row: of a cache only

struct NormParams {
    DType dtype;
    int64_t num_tokens, num_heads, size;
    const void* x;  // [num_tokens, num_heads, size]
    int64_t x_stride, x_head_stride;
    const void* residual;  // [num_tokens, 1, size] with num_heads = 1, or null
    int64_t residual_stride;
    const void* weight;  // [size]
    float eps;
    void* out;  // [num_tokens, num_heads, size]
    void* sum;  // [num_tokens, size], or null without residual
};

// Where the heads of a token stand in a cache whose pages and heads may lie in any order, or, with
// pages of one row, in an array.
struct CacheRows {
    int64_t page_size, page_stride, stride, head_stride;

    int64_t at(int64_t row, int64_t head) const {
        return row / page_size * page_stride + row % page_size * stride + head * head_stride;
    }
};

// Rotates `num_heads` heads a token and puts them in `out`, or in the rows of a cache.
struct RopeParams {
    DType dtype, out_dtype;
    int64_t num_tokens, num_heads, head_dim, rot;
    const void* x;  // [num_tokens, num_heads, head_dim]
    int64_t x_stride, x_head_stride;
    const float* cos_sin;      // [P, rot]
    const int32_t* positions;  // [num_tokens]
    void* out;                 // [rows, num_heads] of head_dim elements
    CacheRows out_rows;
    const int64_t* out_index;  // [num_tokens] rows of out, or null for the token's own
    bool interleaved;
};

// Copies the heads of a token into the rows of a cache.
struct AppendParams {
    DType dtype, out_dtype;
    int64_t num_tokens, num_heads, size;
    const void* x;  // [num_tokens, num_heads, size], rows x_stride apart
    int64_t x_stride;
    void* out;                 // [rows, num_heads] of size elements; int8: and of a scale
    CacheRows out_rows;        // of int8: bytes
    const int64_t* out_index;  // [num_tokens]
};

// Queries may come in two parts, whose keys stand one after the other in a cache row (latent and
// rope for MLA) or apart (k_tail); q_tail_dim is 0 otherwise. Keys stand in pages, or in line where
// k_start is given.
struct AttentionParams {
    DType dtype, kv_dtype;
    int64_t num_tokens, num_rows, num_heads, num_kv_heads;
    int64_t q_dim, q_tail_dim, value_dim;
    const void* q;  // [num_tokens, num_heads, q_dim]
    int64_t q_stride, q_head_stride;
    const void* q_tail;  // [num_tokens, num_heads, q_tail_dim]
    int64_t q_tail_stride, q_tail_head_stride;
    const void* keys;  // page + token t of it (or t in line) * key_stride + head * key_head_stride
    const void* values;  // the same; strides of int8 rows count bytes
    int64_t key_page_stride, key_stride, key_head_stride;
    int64_t value_page_stride, value_stride, value_head_stride;
    const void* k_tail;  // [keys, q_tail_dim] of all heads, or null
    int64_t k_tail_stride;
    int64_t page_size, max_pages;
    const int32_t* page_table;  // [num_slots, max_pages]
    const int32_t* slots;       // [num_rows]
    const int32_t* q_start;     // [num_rows + 1]
    const int32_t* kv_len;      // [num_rows], or null
    const int32_t* k_start;     // [num_rows + 1], or null
    float scale;
    bool causal;
    int64_t window;  // keys that a query sees at most; 0: all before it
    void* out;       // [num_tokens, num_heads, value_dim]
    float* lse;      // [num_tokens, num_heads], or null

    int64_t query_len(int64_t row) const { return q_start[row + 1] - q_start[row]; }
    int64_t kv_len_of(int64_t row) const {
        return k_start != nullptr ? k_start[row + 1] - k_start[row] : kv_len[row];
    }
};

// Attention over two sets of keys -> over both.
struct MergeParams {
    DType dtype;
    int64_t num_rows, size;  // rows: tokens and heads
    const void* a;           // [num_rows, size], as b
    const float* lse_a;      // [num_rows], as lse_b
    const void* b;
    const float* lse_b;
    void* out;   // [num_rows, size]
    float* lse;  // [num_rows]
};

// Rows of a paged cache in line.
struct GatherParams {
    DType dtype, out_dtype;
    int64_t num_rows, num_out, size;
    const void* cache;
    int64_t page_size, max_pages;
    const int32_t* page_table;
    const int32_t* slots;   // [num_rows]
    const int32_t* first;   // [num_rows] positions
    const int32_t* starts;  // [num_rows + 1] rows of out
    void* out;              // [num_out, size]
};

struct SiluMulParams {
    DType dtype;
    int64_t num_tokens, size;  // of the result
    const void* x;             // [num_tokens, 2 * size], rows x_stride apart
    int64_t x_stride;
    void* out;  // [num_tokens, size]
};

// Rows of a table by id, zeros where the id is not in [first, first + num_rows).
struct EmbeddingParams {
    int64_t num_tokens, row_bytes, num_rows, first;
    const int64_t* ids;  // [num_tokens]
    const void* weight;  // [num_rows] rows of row_bytes
    void* out;           // [num_tokens] rows of row_bytes
};

// x + y, rounded once.
struct AddParams {
    DType dtype;
    int64_t num_tokens, size;
    const void* x;  // [num_tokens, size], rows x_stride apart
    int64_t x_stride;
    const void* y;  // [num_tokens, size], rows y_stride apart
    int64_t y_stride;
    void* out;  // [num_tokens, size]
};

struct RouteParams {
    int64_t num_tokens, num_experts;
    const float* logits;  // [num_tokens, num_experts]
    const float* bias;    // [num_experts] or null
    int top_k, n_group, topk_group;
    bool sigmoid, group_top2, norm;
    float scale;
    float* weights;  // [num_tokens, top_k]
    int32_t* ids;    // [num_tokens, top_k]
};

// A linear layer, or one for each head: head h takes its own columns of x and its own weight.
struct LinearParams {
    DType dtype, out_dtype;
    int64_t num_tokens, num_heads, in, out_size;
    const void* x;  // [num_tokens, num_heads, in]
    int64_t x_stride, x_head_stride;
    const void* weight;  // [num_heads, out_size, in]
    const void* bias;    // [num_heads, out_size] or null
    void* out;           // [num_tokens, num_heads, out_size]
};

// How the elements of a packed weight are held: as they are, or as codes with a scale a group.
enum class Format : int { kPlain, kInt8, kInt4 };

inline constexpr int64_t kPanelOut = 64;  // outputs of a panel (see packed.h)

// Weights [count, out, in] in panels: one a head, or one an expert.
struct PackedWeight {
    Format format;
    DType dtype;  // of plain elements
    int64_t count, out, in;
    int64_t group;  // elements of `in` that share a scale; `in` where there is none
    char* data;     // [count, ceil(out / kPanelOut), panel_bytes()]

    int64_t panel_bytes() const {
        if (format == Format::kInt8) return in * kPanelOut + in / group * kPanelOut * 2;
        if (format == Format::kInt4) return in * kPanelOut / 2 + in / group * kPanelOut * 2;
        const int64_t per_word = dtype == DType::kBFloat16 ? 2 : 1;
        return (in + per_word - 1) / per_word * kPanelOut * 4;
    }
    int64_t num_panels() const { return (out + kPanelOut - 1) / kPanelOut; }
    int64_t bytes_each() const { return num_panels() * panel_bytes(); }
};

// Elements [count, out, in], or codes (int8: bytes; int4: two a byte, the even k low) and scales.
struct PackParams {
    PackedWeight weight;
    const void* elements;
    const void* scales;  // bfloat16 [count, out, in / group], or null
};

// Rows -> codes and scales, as PackParams takes them. REQUIRES: group divides in, group % 8 == 0.
struct QuantizeParams {
    DType dtype;
    Format format;
    int64_t num_rows, in, group;
    const void* x;  // [num_rows, in]
    void* codes;    // [num_rows, in] int8, or [num_rows, in / 2] pairs of int4
    void* scales;   // [num_rows, in / group] bfloat16
};

// A linear layer with a packed weight, or one for each head.
struct PackedLinearParams {
    DType dtype, out_dtype;
    int64_t num_tokens;
    const void* x;  // [num_tokens, count, in]
    int64_t x_stride, x_head_stride;
    PackedWeight weight;
    const void* bias;  // [count, out] of dtype, or null
    void* out;         // [num_tokens, count, out]
};

// Routed experts: addend + the sum over a token's choices of weight * w2 silu_mul(w13 x).
struct MoeParams {
    DType dtype;
    int64_t num_tokens, top_k;
    const void* x;  // [num_tokens, w13.in], rows x_stride apart
    int64_t x_stride;
    PackedWeight w13;      // experts of [2 * w2.in, size]: gate, then up
    PackedWeight w2;       // experts of [size, inner]
    const float* weights;  // [num_tokens, top_k]
    const int32_t* ids;    // [num_tokens, top_k], each below w13.count; below 0: computed elsewhere
    const void* addend;    // [num_tokens, w13.in], rows addend_stride apart, or null
    int64_t addend_stride;
    void* out;  // [num_tokens, w13.in]
};

struct SampleParams {
    int64_t num_rows, vocab;
    const float* logits;  // [num_rows, vocab], rows logits_stride apart
    int64_t logits_stride;
    const float* temperature;  // [num_rows], as the four below
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int64_t* position;
    int64_t* ids;  // [num_rows]
};

struct PenaltyParams {
    int64_t num_rows, vocab;
    float* logits;  // [num_rows, vocab], rows logits_stride apart
    int64_t logits_stride;
    const int64_t* slots;         // [num_rows]
    const bool* prompt_seen;      // [num_slots, vocab]
    const int32_t* output_count;  // [num_slots, vocab]
    const float* repetition;      // [num_rows], as the two below
    const float* presence;
    const float* frequency;
};

// One build of every kernel.
struct Kernels {
    const char* isa;
    void (*norm)(const NormParams&);
    void (*rope)(const RopeParams&);
    void (*append)(const AppendParams&);
    void (*attention)(const AttentionParams&);
    void (*merge_state)(const MergeParams&);
    void (*gather_latent)(const GatherParams&);
    void (*silu_mul)(const SiluMulParams&);
    void (*embedding)(const EmbeddingParams&);
    void (*add)(const AddParams&);
    void (*route)(const RouteParams&);
    void (*moe)(const MoeParams&);
    void (*linear)(const LinearParams&);
    void (*pack)(const PackParams&);
    void (*quantize)(const QuantizeParams&);
    void (*linear_packed)(const PackedLinearParams&);
    void (*sample)(const SampleParams&);
    void (*penalize)(const PenaltyParams&);
};

// The build in use: the widest that this machine runs, unless set_isa chose another.
const Kernels& kernels();

// Builds that this machine runs, the widest first; ends with null.
const Kernels* const* available_kernels();

// False, and nothing changes, if `isa` is unknown or does not run here. For tests.
bool set_isa(const char* isa);

#ifdef TS_ISA
// The build that the including source is part of.
namespace TS_ISA {
void norm(const NormParams&);
void rope(const RopeParams&);
void append(const AppendParams&);
void attention(const AttentionParams&);
void merge_state(const MergeParams&);
void gather_latent(const GatherParams&);
void silu_mul(const SiluMulParams&);
void embedding(const EmbeddingParams&);
void add(const AddParams&);
void route(const RouteParams&);
void moe(const MoeParams&);
void linear(const LinearParams&);
void pack(const PackParams&);
void quantize(const QuantizeParams&);
void linear_packed(const PackedLinearParams&);
void sample(const SampleParams&);
void penalize(const PenaltyParams&);
}  // namespace TS_ISA
#endif

}  // namespace tokenspeed::cpu
