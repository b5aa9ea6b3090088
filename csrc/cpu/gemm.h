// SPDX-License-Identifier: MIT
// Matrix products on small tiles, for every kernel that multiplies. Knows memory layouts, no op.
//
// Two ways to form C[m][n] = sum over k of A[m][k] * B[n][k]:
//   dots:   both are read as they stand, along k. For a few queries, and for weights that are also
//           read otherwise (a tied embedding), whatever the number of rows.
//   panels: kPanel values of n stand side by side, and A's elements are broadcast. For values of a
//           cache (attention_lanes.h), and for weights that are packed as they load (packed.h).
// Each way sums over k in one order of its own, in float32, whatever the number of rows: a row of C
// never depends on the rows beside it. Every product with a weight goes the same way, so a token's
// numbers depend on no batch.
//
// Words are 32 bits: one float, or a pair of bfloat16 with consecutive k where the machine
// multiplies such pairs (Pairs). Elsewhere bfloat16 is widened to float.
#pragma once

#include "simd.h"

namespace tokenspeed::cpu::TS_ISA {

#ifdef TS_ISA_avx512bf16
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif
#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16) || defined(TS_ISA_neon)
inline constexpr int kPanelVecs = 4;
#else
inline constexpr int kPanelVecs = 2;
#endif
inline constexpr int kPanel = kPanelVecs * kLanes;  // values of n in a panel
inline constexpr int kTileRows = 6;

// What a product multiplies: floats, or pairs of bfloat16.
struct Floats {
    using Element = float;
    static constexpr int kPerWord = 1;
    static Vec mac(Vec sum, VecU a, VecU b) { return sum + bit_cast<Vec>(a) * bit_cast<Vec>(b); }
};

#ifdef TS_ISA_avx512bf16
struct Pairs {
    using Element = bf16;
    static constexpr int kPerWord = 2;
    static Vec mac(Vec sum, VecU a, VecU b) {
        return bit_cast<Vec>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
    }
};
template <typename A, typename B>
struct ProductOf {
    using Type = Floats;
};
template <>
struct ProductOf<bf16, bf16> {
    using Type = Pairs;
};
#else
template <typename A, typename B>
struct ProductOf {
    using Type = Floats;
};
#endif

// The product for operands held as A and B, here.
template <typename A, typename B>
using Product = typename ProductOf<A, B>::Type;

// Copies n elements, converting, and zeroes up to `padded`. REQUIRES: room for padded elements.
template <typename To, typename From>
inline void copy_row(To* to, const From* from, int64_t n, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
    for (i = n; i < padded; ++i) to[i] = To{};
}

// A vector of words starting at `from`; `words_part` has `left` elements and zeros.
template <class P, typename From>
inline VecU words(const From* from) {
    if constexpr (P::kPerWord == 2) {
        return load_raw<VecU>(from);
    } else {
        return bit_cast<VecU>(load(from));
    }
}
template <class P, typename From>
inline VecU words_part(const From* from, int64_t left) {
    From part[kLanes * P::kPerWord] = {};
    __builtin_memcpy(part, from, static_cast<size_t>(left) * sizeof(From));
    return words<P>(part);
}

// ---- Panels ----------------------------------------------------------------------------------

// Packs rows as successive k: `a` (even k) and `b` (odd k; null for zeros; unused for Floats) of
// `size` elements are spread over panels of kPanel columns, `panel_words` apart. Columns past
// `size` up to a whole vector become 0.
template <class P, typename From>
inline void pack_depth(const From* a, const From* b, int64_t size, uint32_t* panels,
                       int64_t panel_words) {
    const auto put = [&](int64_t n, VecU words) {
        __builtin_memcpy(panels + n / kPanel * panel_words + n % kPanel, &words, sizeof(words));
    };
    int64_t n = 0;
    if constexpr (P::kPerWord == 2) {
        for (; n + 2 * kLanes <= size; n += 2 * kLanes) {
            const VecHH even = load_raw<VecHH>(a + n);
            const VecHH odd = b != nullptr ? load_raw<VecHH>(b + n) : VecHH{};
            put(n, interleave<false>(even, odd));
            put(n + kLanes, interleave<true>(even, odd));
        }
    }
    for (; n < size; n += kLanes) {
        VecU words = bit_cast<VecU>(load_at(a, n, size));
        if constexpr (P::kPerWord == 2) {
            words >>= 16;
            if (b != nullptr) words |= bit_cast<VecU>(load_at(b, n, size));
        }
        put(n, words);
    }
}

// ---- Dots ------------------------------------------------------------------------------------

// out(m, n, sum) for m < kM, n < kN: dot products of rows a + m * a_stride and b + n * b_stride.
template <class P, int kM, int kN, bool kFetch, typename A, typename B, typename Out>
inline void dot_tile(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t size,
                     const Out& out) {
    constexpr int64_t kStep = kLanes * P::kPerWord;
    Vec sums[kM][kN] = {};
    const auto step = [&](const auto& at) {
        VecU right[kN];
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) right[n] = at(b + n * b_stride);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
            const VecU left = at(a + m * a_stride);
#pragma GCC unroll 8
            for (int n = 0; n < kN; ++n) sums[m][n] = P::mac(sums[m][n], left, right[n]);
        }
    };
    int64_t k = 0;
    for (; k + kStep <= size; k += kStep) {
        step([&](const auto* row) { return words<P>(row + k); });
        // The rows of the tile after this one, while this one is multiplied.
#pragma GCC unroll 8
        for (int n = 0; n < kN && kFetch; ++n) {
            __builtin_prefetch(b + (n + kN) * b_stride + k);
        }
    }
    if (k < size) {
        step([&](const auto* row) { return words_part<P>(row + k, size - k); });
    }
    if constexpr (kM * kN % kLanes == 0) {
#pragma GCC unroll 8
        for (int first = 0; first < kM * kN; first += kLanes) {
            Vec some[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) some[i] = sums[(first + i) / kN][(first + i) % kN];
            float totals[kLanes];
            store(totals, reduce_add_all(some));
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                out((first + i) / kN, (first + i) % kN, totals[i]);
            }
        }
    } else {
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < kN; ++n) out(m, n, reduce_add(sums[m][n]));
        }
    }
}

// ---- Products with a weight --------------------------------------------------------------------

inline constexpr int64_t kDotRows = 16;  // rows of A that stay in the first cache while B passes

// out(m, n, sum) for m < rows <= kDotRows and the rows n in [begin, end) of `weight`, each of which
// is read once.
template <class P, typename A, typename W, typename Out>
inline void dot_rows(int64_t rows, const A* a, int64_t a_stride, const W* weight, int64_t size,
                     int64_t begin, int64_t end, const Out& out) {
    const auto tile = [&]<int kN>(std::integral_constant<int, kN>, int64_t n) {
        const W* const w = weight + n * size;
        const auto rows_of = [&]<int kM>(std::integral_constant<int, kM>, int64_t m) {
            const auto put = [&](int i, int j, float sum) { out(m + i, n + j, sum); };
            if (m == 0) {
                dot_tile<P, kM, kN, true>(a, a_stride, w, size, size, put);
            } else {
                dot_tile<P, kM, kN, false>(a + m * a_stride, a_stride, w, size, size, put);
            }
        };
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) rows_of(std::integral_constant<int, 4>{}, m);
        if (rows - m == 3) rows_of(std::integral_constant<int, 3>{}, m);
        if (rows - m == 2) rows_of(std::integral_constant<int, 2>{}, m);
        if (rows - m == 1) rows_of(std::integral_constant<int, 1>{}, m);
    };
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) tile(std::integral_constant<int, 4>{}, n);
    for (; n < end; ++n) tile(std::integral_constant<int, 1>{}, n);
}

// The same for any number of rows. The weight rows are read once for every kDotRows of them: ask
// for as many at a time as fit the second cache.
template <class P, typename A, typename W, typename Out>
inline void dot_product(int64_t rows, const A* a, int64_t a_stride, const W* weight, int64_t size,
                        int64_t begin, int64_t end, const Out& out) {
    if (rows <= kDotRows) return dot_rows<P>(rows, a, a_stride, weight, size, begin, end, out);
    // Rows a power of two apart would share a few sets of the first cache: they are set apart.
    const int64_t stride = div_ceil(size, kLanes) * kLanes + 64;
    A* const block = scratch_of<A>(1, kDotRows * stride);
    for (int64_t first = 0; first < rows; first += kDotRows) {
        const int64_t count = min_of(kDotRows, rows - first);
        for (int64_t m = 0; m < count; ++m) {
            copy_row(block + m * stride, a + (first + m) * a_stride, size, size);
        }
        dot_rows<P>(count, block, stride, weight, size, begin, end,
                    [&](int64_t m, int64_t n, float sum) { out(first + m, n, sum); });
    }
}

}  // namespace tokenspeed::cpu::TS_ISA
