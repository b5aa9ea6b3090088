// SPDX-License-Identifier: MIT
// What both ways of attending share: the pieces of work, where keys stand, and the results of
// spans. Online softmax (arXiv:2205.14135). Knows no product.
//
//   row r of the batch, key head h:   flat query rows  f = token * group + head in group
//   an item:                          some flat rows of one (r, h)
//   a span:                           kSpan keys, its own softmax; spans are merged in order
//   a block:                          kBlock keys, between two looks at the largest score
//
// Few flat rows are streamed past (attention_stream.h), more stand in lanes (attention_lanes.h).
// Both take every sum in one order: scores along the features, results and sums of weights along
// pairs of keys. Blocks and spans begin at fixed positions of the sequence, and a flat row never
// looks at another: a result depends on no batch, no chunking and no number of threads, to the bit.
#pragma once

#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {

// A byte of a row of int8 features (tokenspeed/kernels/kv_int8.py).
struct Int8Row {
    uint8_t bits;
};

// GCC's own conversion takes the codes one by one.
inline Vec load_codes(const int8_t* from) {
#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16)
    const VecI codes = bit_cast<VecI>(_mm512_cvtepi8_epi32(load_raw<__m128i>(from)));
#elif defined(TS_ISA_avx2)
    const VecI codes =
        bit_cast<VecI>(_mm256_cvtepi8_epi32(_mm_set1_epi64x(load_raw<int64_t>(from))));
#else
    using Codes = int8_t __attribute__((vector_size(kLanes)));
    const VecI codes = __builtin_convertvector(load_raw<Codes>(from), VecI);
#endif
    return __builtin_convertvector(codes, Vec);
}

inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr int64_t kBlock = 64;
inline constexpr int64_t kSpan = 256;
inline constexpr int64_t kStreamed = 8;  // most flat rows of a key head that are streamed

struct Item {
    int32_t row;           // of the batch
    int32_t head;          // of the keys
    int32_t first, count;  // flat query rows
    bool streamed;
};

struct Place {
    int64_t token, head;  // of the queries
};

struct AttentionShape {
    int64_t group, key_dim;
    int64_t max_rows;  // of an item
    bool streams;      // items of up to kStreamed rows are
    bool all_stream;
    int64_t partial_floats;
};

// Where flat row i of an item stands.
inline Place place_of(const AttentionParams& p, const AttentionShape& s, const Item& item,
                      int64_t i) {
    const int64_t flat = item.first + i;
    return {p.q_start[item.row] + flat / s.group, item.head * s.group + flat % s.group};
}

// Keys that a flat query row sees end before this one; they begin at `lowest_key`.
inline int64_t visible(const AttentionParams& p, const AttentionShape& s, int64_t row,
                       int64_t flat) {
    if (!p.causal) return p.kv_len_of(row);
    return p.kv_len_of(row) - p.query_len(row) + flat / s.group + 1;
}
inline int64_t lowest_key(const AttentionParams& p, int64_t visible) {
    return p.window > 0 ? max_of<int64_t>(0, visible - p.window) : 0;
}

// The spans [first, last) that any flat row of an item sees.
struct Spans {
    int64_t first, last;

    Spans(const AttentionParams& p, const AttentionShape& s, const Item& item) {
        const int64_t end = visible(p, s, item.row, item.first + item.count - 1);
        last = end > 0 ? div_ceil(end, kSpan) : 0;
        const int64_t seen = visible(p, s, item.row, item.first);
        first = min_of(last, lowest_key(p, max_of<int64_t>(seen, 0)) / kSpan);
    }
};

// Where the keys [start, start + count) of a row stand, those of head 0: byte addresses.
template <typename KV>
void locate(const AttentionParams& p, int64_t row, int64_t start, int64_t count, const KV** keys,
            const KV** values) {
    const KV* const all_keys = static_cast<const KV*>(p.keys);
    const KV* const all_values = static_cast<const KV*>(p.values);
    const auto put = [&](int64_t page, int64_t token, int64_t i, int64_t end) {
        const KV* key = all_keys + page * p.key_page_stride + token * p.key_stride;
        const KV* value = all_values + page * p.value_page_stride + token * p.value_stride;
        for (; i < end; ++i, key += p.key_stride, value += p.value_stride) {
            keys[i] = key;
            values[i] = value;
        }
    };
    if (p.k_start != nullptr) return put(0, p.k_start[row] + start, 0, count);
    const int32_t* const pages = p.page_table + p.slots[row] * p.max_pages;
    int64_t page = start / p.page_size, offset = start % p.page_size;
    for (int64_t i = 0; i < count; ++page, offset = 0) {
        const int64_t end = min_of(count, i + p.page_size - offset);
        put(pages[page], offset, i, end);
        i = end;
    }
}

// D elements as `To`, zeroes up to `padded`.
template <typename To, typename From>
inline void fetch_row(To* to, const From* from, int64_t size, int64_t padded) {
    copy_row(to, from, size, padded);
}
// int8 features and the scale that stands after them.
template <typename To>
inline void fetch_row(To* to, const Int8Row* from, int64_t size, int64_t padded) {
    float scale;
    __builtin_memcpy(&scale, from + size, sizeof(scale));
    const int8_t* const codes = reinterpret_cast<const int8_t*>(from);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load_codes(codes + i) * scale);
    for (; i < size; ++i) store_one(to + i, static_cast<float>(codes[i]) * scale);
    for (; i < padded; ++i) to[i] = To{};
}

// The products' operands for a cache of KV elements: int8 is multiplied as the queries' type.
template <typename Q, typename KV>
struct Operands {
    using P = Product<Q, KV>;
};
template <typename Q>
struct Operands<Q, Int8Row> {
    using P = Product<Q, Q>;
};

// What is taken from scores of which `top` is the largest: finite, so that a row that sees no key
// gets weights of 0.
inline Vec shift_of(Vec top) { return top == -kInfinity ? Vec{} : top; }

// 2^(a - b) where b is the larger of the two or both are -infinity (then 1 for the new sum 0).
inline Vec share(Vec score, Vec top) { return exp2(score - shift_of(top)); }

// Two weights of successive keys as a word of a product, in each lane.
template <class P>
inline VecU weight_words(Vec even, Vec odd) {
    if constexpr (P::kPerWord == 2) {
        return widen(to_bf16(even)) | widen(to_bf16(odd)) << 16;
    } else {
        (void)odd;
        return bit_cast<VecU>(even);
    }
}
template <class P>
inline VecU one_words() {
    return P::kPerWord == 2 ? splat(uint32_t{0x3F803F80}) : splat(uint32_t{0x3F800000});
}

// A result and the one of the keys after it, with the shares that each keeps.
inline Vec merged(Vec total, Vec keep, Vec next, Vec add) {
    const Vec more = next * add;
    return total * keep + more;
}

}  // namespace tokenspeed::cpu::TS_ISA
