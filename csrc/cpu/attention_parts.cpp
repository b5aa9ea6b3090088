// SPDX-License-Identifier: MIT
// What stands around attention over parts of the keys: latents put in line, results merged.
#include "attention.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

template <typename T>
void merge_row(const MergeParams& p, int64_t row) {
    const T* const a = static_cast<const T*>(p.a) + row * p.size;
    const T* const b = static_cast<const T*>(p.b) + row * p.size;
    T* const out = static_cast<T*>(p.out) + row * p.size;
    const Vec lse_a = splat(p.lse_a[row]), lse_b = splat(p.lse_b[row]);
    const Vec top = max_of(lse_a, lse_b);
    const Vec part_a = share(lse_a * kLog2E, top * kLog2E);
    const Vec part_b = share(lse_b * kLog2E, top * kLog2E);
    const Vec sum = part_a + part_b;
    const Vec scale = sum == 0.0f ? Vec{} : 1.0f / sum;
    for (int64_t n = 0; n < p.size; n += kLanes) {
        const Vec both =
            load_at(a, n, p.size) * (part_a * scale) + load_at(b, n, p.size) * (part_b * scale);
        store_at(out, n, p.size, both);
    }
    const float lse = (top + log(sum))[0];
    p.lse[row] = sum[0] == 0.0f ? -kInfinity : sum[0] != sum[0] ? sum[0] : lse;
}

}  // namespace

void merge_state(const MergeParams& p) {
    with_type(p.dtype, [&](auto type) {
        parallel_for(p.num_rows, 64, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) merge_row<decltype(type)>(p, row);
        });
    });
}

namespace {

template <typename From, typename To>
void gather_row(const GatherParams& p, int64_t row, int64_t at) {
    const int64_t position = p.first[row] + at - p.starts[row];
    const int64_t page = p.page_table[p.slots[row] * p.max_pages + position / p.page_size];
    const From* const from =
        static_cast<const From*>(p.cache) + (page * p.page_size + position % p.page_size) * p.size;
    To* const to = static_cast<To*>(p.out) + at * p.size;
    copy_row(to, from, p.size, p.size);
}

}  // namespace

void gather_latent(const GatherParams& p) {
    with_type(p.dtype, [&](auto from) {
        with_type(p.out_dtype, [&](auto to) {
            for (int64_t row = 0; row < p.num_rows; ++row) {
                const int64_t start = p.starts[row];
                parallel_for(p.starts[row + 1] - start, 32, [&](int64_t begin, int64_t end) {
                    for (int64_t at = begin; at < end; ++at) {
                        gather_row<decltype(from), decltype(to)>(p, row, start + at);
                    }
                });
            }
        });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
