// SPDX-License-Identifier: MIT
// x times a weight as it stands, or one weight a head. Where the weight is the kernels' alone it is
// packed: linear_packed.cpp.
#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int64_t kBlockRows = 128;
constexpr int64_t kWeightBytes = 131072;

template <typename T, typename To>
struct Output {
    const LinearParams& p;
    int64_t head;

    void operator()(int64_t m, int64_t n, float sum) const {
        const int64_t column = head * p.out_size + n;
        if (p.bias != nullptr) sum += load_one(static_cast<const T*>(p.bias) + column);
        store_one(static_cast<To*>(p.out) + m * p.num_heads * p.out_size + column, sum);
    }
};

template <typename T>
const T* input_of(const LinearParams& p, int64_t head) {
    return static_cast<const T*>(p.x) + head * p.x_head_stride;
}

template <typename T>
const T* weight_of(const LinearParams& p, int64_t head) {
    return static_cast<const T*>(p.weight) + head * p.out_size * p.in;
}

// A task is a block of tokens times as many weight rows as fit the second cache.
template <typename T, typename To>
void products(const LinearParams& p) {
    const int64_t width = max_of<int64_t>(4, kWeightBytes / (p.in * sizeof(T)) / 4 * 4);
    const int64_t blocks = div_ceil(p.num_tokens, kBlockRows);
    const int64_t strips = div_ceil(p.out_size, width);
    parallel_for(p.num_heads * strips * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kBlockRows, head = task / blocks / strips;
            const int64_t n = task / blocks % strips * width;
            const Output<T, To> out{p, head};
            dot_product<Product<T, T>>(
                min_of(kBlockRows, p.num_tokens - first), input_of<T>(p, head) + first * p.x_stride,
                p.x_stride, weight_of<T>(p, head), p.in, n, min_of(n + width, p.out_size),
                [&](int64_t m, int64_t column, float sum) { out(first + m, column, sum); });
        }
    });
}

}  // namespace

void linear(const LinearParams& p) {
    with_type(p.dtype, [&](auto in) {
        with_type(p.out_dtype, [&](auto out) { products<decltype(in), decltype(out)>(p); });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
