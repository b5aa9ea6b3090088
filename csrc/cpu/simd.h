// SPDX-License-Identifier: MIT
// Vectors of float32 with the width of the instruction set this file is compiled for, and the few
// functions on them that kernels share. Knows lanes, no op.
//
// Built on the vector extensions of GCC and Clang: operators are the compiler's, and one source
// serves every instruction set. Everything stands in a namespace named after the instruction set,
// and nothing here calls an inline function of the standard library: the linker could otherwise
// take an AVX-512 copy of it into code that runs everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels.h"
#include "thread_pool.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tokenspeed::cpu::TS_ISA {

#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16)
inline constexpr int kLanes = 16;
#elif defined(TS_ISA_avx2)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4)));
using VecU = uint32_t __attribute__((vector_size(kLanes * 4)));
using VecH = uint16_t __attribute__((vector_size(kLanes * 2)));

struct bf16 {
    uint16_t bits;
};

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
constexpr T min_of(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr T max_of(T a, T b) {
    return a < b ? b : a;
}
constexpr int64_t div_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Vec splat(float value) { return Vec{} + value; }
inline VecU splat(uint32_t value) { return VecU{} + value; }
inline Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
inline Vec max_of(Vec a, Vec b) { return b > a ? b : a; }  // a where b is NaN

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <typename V, typename T>
inline V load_raw(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
}

// 16 bits to 32 and back (the low half). GCC's own conversion takes several steps for the first.
inline VecU widen(VecH half) {
#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16)
    return bit_cast<VecU>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
#elif defined(TS_ISA_avx2)
    return bit_cast<VecU>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
    return __builtin_convertvector(half, VecU);
#endif
}
inline VecH narrow(VecU word) {
#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16)
    return bit_cast<VecH>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(word)));
#else
    return __builtin_convertvector(word, VecH);
#endif
}

inline Vec load(const float* from) { return load_raw<Vec>(from); }
inline Vec load(const bf16* from) { return bit_cast<Vec>(widen(load_raw<VecH>(from)) << 16); }
inline float load_one(const float* from) { return *from; }
inline float load_one(const bf16* from) {
    return bit_cast<float>(static_cast<uint32_t>(from->bits) << 16);
}

// Round to nearest even; a NaN stays one.
inline VecH to_bf16(Vec value) {
#ifdef TS_ISA_avx512bf16
    return bit_cast<VecH>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#else
    const VecU bits = bit_cast<VecU>(value);
    const VecU rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const VecU quiet = (bits >> 16) | 0x40;
    return narrow(value != value ? quiet : rounded);
#endif
}
inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }
inline void store(bf16* to, Vec value) {
    const VecH half = to_bf16(value);
    __builtin_memcpy(to, &half, sizeof(half));
}

inline void store_one(float* to, float value) { *to = value; }
inline void store_one(bf16* to, float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    to->bits = static_cast<uint16_t>((value != value ? bits | 0x400000 : rounded) >> 16);
}

// The first n < kLanes elements; the others are 0 and are not touched.
template <typename T>
inline Vec load_part(const T* from, int64_t n) {
    T part[kLanes] = {};
    __builtin_memcpy(part, from, static_cast<size_t>(n) * sizeof(T));
    return load(part);
}
template <typename T>
inline void store_part(T* to, Vec value, int64_t n) {
    T part[kLanes];
    store(part, value);
    __builtin_memcpy(to, part, static_cast<size_t>(n) * sizeof(T));
}

// Elements i and up of a row of n: a whole vector, or what is left of it.
template <typename T>
inline Vec load_at(const T* from, int64_t i, int64_t n) {
    return i + kLanes <= n ? load(from + i) : load_part(from + i, n - i);
}
template <typename T>
inline void store_at(T* to, int64_t i, int64_t n, Vec value) {
    if (i + kLanes <= n) {
        store(to + i, value);
    } else {
        store_part(to + i, value, n - i);
    }
}

// 2^x, within 2e-7 of the value; below 2^-126 that or 0; NaN stays. REQUIRES: x < 128 or NaN.
inline Vec exp2(Vec x) {
    const auto power = [](Vec f) {  // f in [-0.5, 0.5]
        Vec p = splat(1.5403530e-4f);
        p = p * f + 1.3333558e-3f;
        p = p * f + 9.6181291e-3f;
        p = p * f + 5.5504109e-2f;
        p = p * f + 2.4022651e-1f;
        p = p * f + 6.9314718e-1f;
        return p * f + 1.0f;
    };
#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16)
    // The scaling makes 0 of -infinity, whatever stands beside it.
    const __m512 whole = _mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    const Vec p = power(x - bit_cast<Vec>(whole));
    return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(p), whole));
#else
    const Vec low = splat(-150.0f);
    x = x < low ? low : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x + magic;
    const VecI exponent = bit_cast<VecI>(shifted) - bit_cast<int32_t>(magic);
    const Vec scaled = power(x - (shifted - magic)) * bit_cast<Vec>((exponent + 127) << 23);
    return x < -126.0f ? Vec{} : scaled;
#endif
}

inline Vec exp(Vec x) { return exp2(x * kLog2E); }

// x / (1 + e^-x); -0 where e^-x would overflow.
inline Vec silu(Vec x) {
    const Vec bound = splat(127.0f);
    Vec power = x * -kLog2E;
    power = power > bound ? bound : power;
    return x / (exp2(power) + 1.0f);
}

// Natural logarithm of a positive, normal, finite number, within 2e-7 of max(1, |log x|).
inline Vec log(Vec x) {
    VecI bits = bit_cast<VecI>(x);
    VecI exponent = ((bits - 0x3F3504F3) >> 23);  // so that the mantissa is in [sqrt(1/2), sqrt(2))
    const Vec m = bit_cast<Vec>(bits - (exponent << 23)) - 1.0f;
    const Vec e = __builtin_convertvector(exponent, Vec);
    Vec p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const Vec square = m * m;
    const Vec tail = p * m * square + e * -2.12194440e-4f - square * 0.5f;
    return m + tail + e * 0.693359375f;
}

namespace detail {

constexpr int exchange_lane(int lane, int step, bool second) {
    if (second) return (lane & step) == 0 ? lane + step : kLanes + lane;
    return (lane & step) == 0 ? lane : kLanes + lane - step;
}

// Blocks of kStep lanes: a's even ones with b's even ones, or the odd ones.
template <int kStep, bool kSecond, int... kLane>
inline VecU exchange(VecU a, VecU b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, exchange_lane(kLane, kStep, kSecond)...);
}

// Within each 128 bits, the low (or high) elements of a and b in turn.
template <bool kHigh, typename V, int... kLane>
inline V unpack(V a, V b, std::integer_sequence<int, kLane...>) {
    constexpr int kAll = sizeof...(kLane), kQuad = kAll * 16 / sizeof(V);
    return __builtin_shufflevector(a, b,
                                   (kLane / kQuad * kQuad + (kHigh ? kQuad / 2 : 0) +
                                    kLane % kQuad / 2 + kLane % 2 * kAll)...);
}
template <bool kHigh>
inline VecU unpack(VecU a, VecU b) {
    return unpack<kHigh>(a, b, std::make_integer_sequence<int, kLanes>{});
}
using VecPair = uint64_t __attribute__((vector_size(kLanes * 4)));  // pairs of lanes
template <bool kHigh>
inline VecU unpack_pairs(VecU a, VecU b) {
    return bit_cast<VecU>(unpack<kHigh>(bit_cast<VecPair>(a), bit_cast<VecPair>(b),
                                        std::make_integer_sequence<int, kLanes / 2>{}));
}

// The 4 x 4 blocks on the 128-bit pieces of four rows.
inline void transpose_quads(VecU& r0, VecU& r1, VecU& r2, VecU& r3) {
    const VecU low01 = unpack<false>(r0, r1), high01 = unpack<true>(r0, r1);
    const VecU low23 = unpack<false>(r2, r3), high23 = unpack<true>(r2, r3);
    r0 = unpack_pairs<false>(low01, low23);
    r1 = unpack_pairs<true>(low01, low23);
    r2 = unpack_pairs<false>(high01, high23);
    r3 = unpack_pairs<true>(high01, high23);
}

// The even (or odd) 128-bit pieces of a, then those of b.
template <bool kOdd, int... kLane>
inline VecU pieces(VecU a, VecU b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (kLane / 4 * 8 + (kOdd ? 4 : 0) + kLane % 4)...);
}
template <bool kOdd>
inline VecU pieces(VecU a, VecU b) {
    return pieces<kOdd>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// The blocks of 128-bit pieces, 2 x 2 or 4 x 4, of rows that are 4 apart.
template <int kRow>
inline void transpose_pieces(VecU (&rows)[kLanes]) {
    const auto deal = [&](int i, int j) {
        const VecU a = rows[i], b = rows[j];
        rows[i] = pieces<false>(a, b);
        rows[j] = pieces<true>(a, b);
    };
    deal(kRow, kRow + 4);
    if constexpr (kLanes > 8) {
        deal(kRow + 8, kRow + 12);
        deal(kRow, kRow + 8);
        deal(kRow + 4, kRow + 12);
    }
}

// Lane i and lane i ^ kStep exchanged.
template <int kStep, int... kLane>
inline Vec swap_lanes(Vec v, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
template <int kStep>
inline Vec swap_lanes(Vec v) {
    return swap_lanes<kStep>(v, std::make_integer_sequence<int, kLanes>{});
}

template <int kStep = kLanes / 2>
inline float add_lanes(Vec v) {
    v += swap_lanes<kStep>(v);
    if constexpr (kStep > 1) return add_lanes<kStep / 2>(v);
    return v[0];
}

template <int kStep = kLanes / 2>
inline float max_lanes(Vec v) {
    v = max_of(v, swap_lanes<kStep>(v));
    if constexpr (kStep > 1) return max_lanes<kStep / 2>(v);
    return v[0];
}

template <int kStep>
inline void fold(Vec (&v)[kLanes]) {
    using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
    for (int i = 0; i < kStep; ++i) {
        const VecU a = bit_cast<VecU>(v[i]), b = bit_cast<VecU>(v[i + kStep]);
        v[i] = bit_cast<Vec>(exchange<kStep, false>(a, b, Lanes{})) +
               bit_cast<Vec>(exchange<kStep, true>(a, b, Lanes{}));
    }
    if constexpr (kStep > 1) fold<kStep / 2>(v);
}

}  // namespace detail

// Sum and largest of the lanes, by halves: always in the same order.
inline float reduce_add(Vec v) { return detail::add_lanes(v); }
inline float reduce_max(Vec v) { return detail::max_lanes(v); }

// Lane i of the result is reduce_add(v[i]), to the bit; v is used up.
inline Vec reduce_add_all(Vec (&v)[kLanes]) {
    detail::fold<kLanes / 2>(v);
    return v[0];
}

// The largest magnitude of n elements; NaN if one of them is not finite.
template <typename T>
inline float largest_magnitude(const T* x, int64_t n) {
    Vec top{}, poison{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec v = load_at(x, i, n);
        top = max_of(top, v < 0.0f ? -v : v);
        poison += v * 0.0f;
    }
    return reduce_max(top) + reduce_add(poison);
}

// rows[i][j] <-> rows[j][i].
inline void transpose(VecU (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) {
        detail::transpose_quads(rows[i], rows[i + 1], rows[i + 2], rows[i + 3]);
    }
    if constexpr (kLanes > 4) {
        detail::transpose_pieces<0>(rows);
        detail::transpose_pieces<1>(rows);
        detail::transpose_pieces<2>(rows);
        detail::transpose_pieces<3>(rows);
    }
}

// a[0], b[0], a[1], b[1], ... of 16-bit lanes: the first half (low) and the second.
using VecHH = uint16_t __attribute__((vector_size(kLanes * 4)));
template <bool kHigh, int... kLane>
inline VecU interleave(VecHH a, VecHH b, std::integer_sequence<int, kLane...>) {
    return bit_cast<VecU>(__builtin_shufflevector(
        a, b, (kLane / 2 + (kHigh ? kLanes : 0) + kLane % 2 * 2 * kLanes)...));
}
template <bool kHigh>
inline VecU interleave(VecHH a, VecHH b) {
    return interleave<kHigh>(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
}

template <int... kLane>
inline VecHH side_by_side(VecH a, VecH b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, kLane...);
}
inline VecHH side_by_side(VecH a, VecH b) {
    return side_by_side(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
}

// Asks for the cache lines of `count` elements.
template <typename T>
inline void prefetch(const T* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

template <typename T>
inline T* scratch_of(int slot, int64_t count) {
    return static_cast<T*>(scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

// Calls body(T{}) with the C++ type of `dtype`.
template <typename Body>
inline void with_type(DType dtype, Body&& body) {
    if (dtype == DType::kBFloat16) {
        body(bf16{});
    } else {
        body(float{});
    }
}

}  // namespace tokenspeed::cpu::TS_ISA
