// SPDX-License-Identifier: MIT
// The merge of latent attention's partial results, its CUDA source run on the host, against sums in
// double precision. Partial results that a token must not read are NaN.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/mla_combine.cu"

namespace {

using namespace tokenspeed::cuda;

struct Row {
    int32_t queries, tokens;
};

struct Case {
    std::vector<Row> rows;
    int32_t heads, block, ctas, spare_tokens;
};

struct Inputs {
    std::vector<int32_t> q_start{0}, kv_len;
    std::vector<float> partial, sums;
    std::vector<uint16_t> w_uv;
    std::vector<double> expected;  // [tokens, heads, 128]
    int32_t tokens = 0;
};

// Partial results of every query row, and what they must give.
Inputs Make(const Case& c) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    Inputs in;
    int32_t total = 0;
    for (const Row& row : c.rows) {
        in.q_start.push_back(in.q_start.back() + row.queries);
        in.kv_len.push_back(row.tokens);
        total += WorkOf(row.queries, row.tokens, c.heads, c.block).units();
    }
    in.tokens = in.q_start.back() + c.spare_tokens;
    const int32_t slots =
        c.ctas + in.tokens * c.heads / c.block + static_cast<int32_t>(c.rows.size());
    in.partial.assign(static_cast<size_t>(slots) * c.block * 512, NAN);
    in.sums.assign(static_cast<size_t>(slots) * c.block, NAN);
    for (int32_t i = 0; i < c.heads * 128 * 512; ++i) in.w_uv.push_back(ToBfloat16(normal(random)));
    in.expected.assign(static_cast<size_t>(in.tokens) * c.heads * 128, 0.0);
    Before before{0, 0};
    for (size_t r = 0; r < c.rows.size(); ++r) {
        const Row& row = c.rows[r];
        const RowWork work = WorkOf(row.queries, row.tokens, c.heads, c.block);
        for (int32_t place = 0; place < row.queries * c.heads && work.units() > 0; ++place) {
            const Partials at =
                PartialsOf(place, row.queries, row.tokens, before, total, c.ctas, c.heads, c.block);
            std::vector<double> y(512, 0.0);
            double norm = 0.0;
            for (int32_t i = 0; i < at.count; ++i) {
                const size_t line = static_cast<size_t>(at.slot + i) * c.block + at.line;
                // The last one of several saw nothing.
                const bool empty = at.count > 1 && i + 1 == at.count;
                in.sums[line] = empty ? -INFINITY : 3.0f * normal(random);
                norm += std::exp2(in.sums[line]);
                for (int32_t d = 0; d < 512; ++d) {
                    float& value = in.partial[line * 512 + static_cast<size_t>(d)];
                    value = empty ? 0.0f : normal(random);
                    y[static_cast<size_t>(d)] += std::exp2(in.sums[line]) * value;
                }
            }
            const int32_t token = in.q_start[r] + place / c.heads, head = place % c.heads;
            for (int32_t v = 0; v < 128; ++v) {
                double sum = 0.0;
                for (int32_t d = 0; d < 512; ++d) {
                    const uint32_t bits = in.w_uv[static_cast<size_t>((head * 128 + v) * 512 + d)];
                    sum += static_cast<double>(AsFloat(bits << 16)) * y[static_cast<size_t>(d)];
                }
                in.expected[static_cast<size_t>((token * c.heads + head) * 128 + v)] = sum / norm;
            }
        }
        before.units += work.units();
        before.items += work.blocks;
    }
    return in;
}

bool Check(const Case& c, int32_t groups) {
    const Inputs in = Make(c);
    std::vector<uint16_t> out(in.expected.size(), 0x7FFF);
    const MlaCombineUpParams params{in.partial.data(),
                                    in.sums.data(),
                                    in.q_start.data(),
                                    in.kv_len.data(),
                                    in.w_uv.data(),
                                    out.data(),
                                    static_cast<int32_t>(c.rows.size()),
                                    c.ctas,
                                    in.tokens,
                                    c.heads,
                                    c.block};
    Machine::Launch(4 * c.heads, groups, 4, 256, sizeof(Shared), [&] { mla_combine_up(params); });
    for (size_t i = 0; i < out.size(); ++i) {
        const double got = AsFloat(static_cast<uint32_t>(out[i]) << 16), want = in.expected[i];
        if (!(std::abs(got - want) <= 0.05 + 0.005 * std::abs(want))) {
            std::fprintf(stderr, "value %zu is %g, not %g\n", i, got, want);
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    const Case cases[] = {
        {{{1, 700}}, 2, 16, 132, 0},
        {{{1, 65}, {0, 0}, {3, 200}, {2, 2}}, 2, 16, 5, 1},
        {{{1, 6000}}, 1, 16, 100, 0},
    };
    for (const Case& c : cases) {
        if (!Check(c, 1) || !Check(c, 3)) return EXIT_FAILURE;
    }
    std::puts("ok");
}
