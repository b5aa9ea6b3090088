// SPDX-License-Identifier: MIT
#include "sum.h"

#include <algorithm>
#include <bit>

namespace tokenspeed::shm {
namespace {

constexpr int64_t kBlock = 1024;  // elements summed at a time, in the first-level cache

struct BFloat16 {
    uint16_t bits;
};

float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
template <typename T>
T widen(T x) {
    return x;
}

void narrow(float x, float& out) { out = x; }
void narrow(float x, BFloat16& out) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out.bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}
template <typename T>
void narrow(T x, T& out) {
    out = x;
}

template <typename T, typename Sum>
void sum_as(const std::byte* const* sources, int num_sources, int64_t count, std::byte* out) {
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t size = std::min(kBlock, count - begin);
        Sum total[kBlock];
        const auto* const first = reinterpret_cast<const T*>(sources[0]) + begin;
        for (int64_t i = 0; i < size; ++i) total[i] = widen(first[i]);
        for (int source = 1; source < num_sources; ++source) {
            const auto* const next = reinterpret_cast<const T*>(sources[source]) + begin;
            for (int64_t i = 0; i < size; ++i) total[i] += widen(next[i]);
        }
        auto* const to = reinterpret_cast<T*>(out) + begin;
        for (int64_t i = 0; i < size; ++i) narrow(total[i], to[i]);
    }
}

}  // namespace

size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat64:
        case DType::kInt64:
            return 8;
        case DType::kFloat32:
        case DType::kInt32:
            return 4;
        case DType::kBFloat16:
            return 2;
    }
    return 0;
}

void sum(DType dtype, const std::byte* const* sources, int num_sources, int64_t count,
         std::byte* out) {
    switch (dtype) {
        case DType::kFloat64:
            return sum_as<double, double>(sources, num_sources, count, out);
        case DType::kFloat32:
            return sum_as<float, float>(sources, num_sources, count, out);
        case DType::kBFloat16:
            return sum_as<BFloat16, float>(sources, num_sources, count, out);
        case DType::kInt64:  // unsigned: a sum that overflows wraps around
            return sum_as<uint64_t, uint64_t>(sources, num_sources, count, out);
        case DType::kInt32:
            return sum_as<uint32_t, uint32_t>(sources, num_sources, count, out);
    }
}

}  // namespace tokenspeed::shm
