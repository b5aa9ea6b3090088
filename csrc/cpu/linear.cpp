// SPDX-License-Identifier: MIT
// x times a weight: dots for a few rows (the weight is read once), panels for more.
#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

template <typename T>
struct Output {
    const LinearParams& p;

    void operator()(int64_t m, int64_t n, float sum) const {
        if (p.bias != nullptr) sum += load_one(static_cast<const T*>(p.bias) + n);
        store_one(static_cast<T*>(p.out) + m * p.out_size + n, sum);
    }
};

template <typename T>
void linear_dots(const LinearParams& p) {
    const int64_t chunk = max_of<int64_t>(4, 131072 / (p.in * sizeof(T)) / 4 * 4);
    parallel_for(p.out_size, chunk, [&](int64_t begin, int64_t end) {
        dot_product<Product<T, T>>(p.num_tokens, static_cast<const T*>(p.x), p.x_stride,
                                   static_cast<const T*>(p.weight), p.in, begin, end, Output<T>{p});
    });
}

template <typename T>
void linear_panels(const LinearParams& p) {
    using P = Product<T, T>;
    const int64_t blocks = div_ceil(p.num_tokens, kPanelRows);
    const int64_t a_words = div_ceil(p.in, P::kPerWord);
    parallel_for(div_ceil(p.out_size, kPanel) * blocks, 1, [&](int64_t begin, int64_t end) {
        using Element = typename P::Element;
        Element* const a = scratch_of<Element>(0, kPanelRows * a_words * P::kPerWord);
        uint32_t* const panel = scratch_of<uint32_t>(1, kPanelWords * kPanel);
        float* const c = scratch_of<float>(2, kPanelRows * kPanel);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * kPanelRows, n = task / blocks * kPanel;
            const int64_t rows = min_of(kPanelRows, p.num_tokens - first);
            const int64_t count = min_of<int64_t>(kPanel, p.out_size - n);
            for (int64_t m = 0; m < rows; ++m) {
                copy_row(a + m * a_words * P::kPerWord,
                         static_cast<const T*>(p.x) + (first + m) * p.x_stride, p.in,
                         a_words * P::kPerWord);
            }
            panel_weight_product<P>(rows, reinterpret_cast<const uint32_t*>(a), a_words,
                                    static_cast<const T*>(p.weight) + n * p.in, count, p.in, panel,
                                    c);
            for (int64_t m = 0; m < rows; ++m) {
                for (int64_t j = 0; j < count; ++j)
                    Output<T>{p}(first + m, n + j, c[m * kPanel + j]);
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
