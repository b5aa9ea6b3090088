// SPDX-License-Identifier: MIT
// x times a packed weight, or one weight a head.
#include "packed.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int64_t kBlockRows = 192;
constexpr int64_t kFewRows = 4;  // encoded by the caller's thread alone
constexpr int64_t kChunks = 16;  // of panels, for each thread

// Row m of c plus the bias into the output.
template <typename A, typename Out>
void put(const PackedLinearParams& p, int64_t head, int64_t n, int64_t first, int64_t rows,
         const float* c) {
    const PackedWeight& w = p.weight;
    const int64_t count = min_of(kPanelOut, w.out - n);
    const A* const bias = static_cast<const A*>(p.bias);
    for (int64_t m = 0; m < rows; ++m) {
        Out* const out = static_cast<Out*>(p.out) + ((first + m) * w.count + head) * w.out + n;
        for (int64_t i = 0; i < count; i += kLanes) {
            Vec sum = load(c + m * kPanelOut + i);
            if (bias != nullptr) sum += load_at(bias + head * w.out + n, i, count);
            store_at(out, i, count, sum);
        }
    }
}

// A head's rows, as the weight's format wants them.
template <typename A>
Rows<A> rows_of(const PackedLinearParams& p, int64_t head, const CodesRoom& room) {
    const PackedWeight& w = p.weight;
    const A* const x = static_cast<const A*>(p.x) + head * p.x_head_stride;
    Rows<A> rows{x, p.x_stride, {}};
    if (w.format != Format::kPlain) {
        rows.codes = room.view(w).from(head * p.num_tokens);
    }
    return rows;
}

// Pairs of an odd number of inputs reach past a row's end: rows of their own end with a zero.
template <typename A>
PackedLinearParams with_even_rows(PackedLinearParams p) {
    const int64_t in = p.weight.in, all = p.num_tokens * p.weight.count;
    A* const rows = scratch_of<A>(2, all * (in + 1));
    for (int64_t i = 0; i < all; ++i) {
        const int64_t token = i / p.weight.count, head = i % p.weight.count;
        copy_row(rows + i * (in + 1),
                 static_cast<const A*>(p.x) + token * p.x_stride + head * p.x_head_stride, in,
                 in + 1);
    }
    p.x = rows;
    p.x_head_stride = in + 1;
    p.x_stride = p.weight.count * (in + 1);
    return p;
}

template <typename A, typename Out>
void products(const PackedLinearParams& given) {
    const PackedWeight& w = given.weight;
    const bool pairs = w.format == Format::kPlain && w.dtype == DType::kBFloat16;
    const bool odd = pairs && w.in % 2 != 0;
    const PackedLinearParams p = odd ? with_even_rows<A>(given) : given;
    const int64_t heads = w.count, all = p.num_tokens * heads;
    char* const memory = scratch_of<char>(1, codes_bytes(all, w) + 64);
    const CodesRoom room(memory, all, w);
    if (w.format != Format::kPlain) {
        parallel_for(all, kFewRows, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                room.encode(i,
                            static_cast<const A*>(p.x) + i % p.num_tokens * p.x_stride +
                                i / p.num_tokens * p.x_head_stride,
                            w);
            }
        });
    }
    const int64_t blocks = div_ceil(p.num_tokens, kBlockRows), panels = w.num_panels();
    const int64_t block = div_ceil(p.num_tokens, max_of<int64_t>(blocks, 1));
    // What a panel asks for ahead is the next one's: a thread takes some in a row.
    const int64_t in_a_row =
        blocks > 1 ? 1 : max_of<int64_t>(1, heads * panels / (kChunks * num_threads()));
    parallel_for(heads * panels * blocks, in_a_row, [&](int64_t begin, int64_t end) {
        float* const c = scratch_of<float>(0, block * kPanelOut);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks * block, head = task / blocks / panels;
            const int64_t panel = task / blocks % panels;
            const int64_t rows = min_of(block, p.num_tokens - first);
            if (rows <= 0) continue;
            panel_of(first, rows, rows_of<A>(p, head, room), w, head, panel, c);
            put<A, Out>(p, head, panel * kPanelOut, first, rows, c);
        }
    });
}

}  // namespace

void linear_packed(const PackedLinearParams& p) {
    with_type(p.dtype, [&](auto in) {
        with_type(p.out_dtype, [&](auto out) { products<decltype(in), decltype(out)>(p); });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
