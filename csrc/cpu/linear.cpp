// SPDX-License-Identifier: MIT
// x times a weight, or one weight a head: dots for a few rows (the weight is read once), panels
// for more.
#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

template <typename T>
struct Output {
    const LinearParams& p;
    int64_t head;

    void operator()(int64_t m, int64_t n, float sum) const {
        const int64_t column = head * p.out_size + n;
        if (p.bias != nullptr) sum += load_one(static_cast<const T*>(p.bias) + column);
        store_one(static_cast<T*>(p.out) + m * p.num_heads * p.out_size + column, sum);
    }

    // `count` outputs of row m from column n on.
    void row(int64_t m, int64_t n, int64_t count, const float* sums) const {
        const int64_t column = head * p.out_size + n;
        T* const out = static_cast<T*>(p.out) + m * p.num_heads * p.out_size + column;
        for (int64_t i = 0; i < count; i += kLanes) {
            Vec sum = load(sums + i);
            if (p.bias != nullptr) {
                sum += load_at(static_cast<const T*>(p.bias) + column, i, count);
            }
            store_at(out, i, count, sum);
        }
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

template <typename T>
void linear_dots(const LinearParams& p) {
    const int64_t chunk = max_of<int64_t>(4, 131072 / (p.in * sizeof(T)) / 4 * 4);
    parallel_for(p.num_heads * p.out_size, chunk, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t head = begin / p.out_size, first = head * p.out_size;
            const int64_t stop = min_of(end, first + p.out_size);
            dot_product<Product<T, T>>(p.num_tokens, input_of<T>(p, head), p.x_stride,
                                       weight_of<T>(p, head), p.in, begin - first, stop - first,
                                       Output<T>{p, head});
            begin = stop;
        }
    });
}

template <typename T>
void linear_panels(const LinearParams& p) {
    using P = Product<T, T>;
    const int64_t blocks = div_ceil(p.num_tokens, kPanelRows);
    const int64_t panels = div_ceil(p.out_size, kPanel);
    const int64_t a_words = div_ceil(p.in, P::kPerWord);
    parallel_for(p.num_heads * panels * blocks, 1, [&](int64_t begin, int64_t end) {
        using Element = typename P::Element;
        Element* const a = scratch_of<Element>(0, kPanelRows * a_words * P::kPerWord);
        uint32_t* const panel = scratch_of<uint32_t>(1, kPanelWords * kPanel);
        float* const c = scratch_of<float>(2, kPanelRows * kPanel);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kPanelRows, head = task / blocks / panels;
            const int64_t n = task / blocks % panels * kPanel;
            const int64_t rows = min_of(kPanelRows, p.num_tokens - first);
            const int64_t count = min_of<int64_t>(kPanel, p.out_size - n);
            for (int64_t m = 0; m < rows; ++m) {
                copy_row(a + m * a_words * P::kPerWord,
                         input_of<T>(p, head) + (first + m) * p.x_stride, p.in,
                         a_words * P::kPerWord);
            }
            panel_weight_product<P>(rows, reinterpret_cast<const uint32_t*>(a), a_words,
                                    weight_of<T>(p, head) + n * p.in, count, p.in, panel, c);
            for (int64_t m = 0; m < rows; ++m) {
                Output<T>{p, head}.row(first + m, n, count, c + m * kPanel);
            }
        }
    });
}

}  // namespace

void linear(const LinearParams& p) {
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        p.num_tokens <= kDotRows ? linear_dots<T>(p) : linear_panels<T>(p);
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
