// SPDX-License-Identifier: MIT
// Merges partial results of latent attention and brings them back from the latent: one cluster of
// four CTAs for a head, 256 threads each.
//
//   out[t, h, v] = sum_d w_uv[h, v, d] y[t, h, d],   y = sum_i 2^(s_i - max) y_i / sum_i 2^(s_i -
//   max)
//
// Each CTA merges 128 of the 512 latent features and gives them to the other three through their
// shared memory; each then computes 32 of the 128 values from all 512. So partial results and
// weights are read once, by all of the cluster at the same time, and the weights wait in registers
// before the kernel ahead has ended. Grid (4 * heads, token groups). Where partial results stand:
// mla_schedule.h. `q_start` and `kv_len` must be older than the kernel ahead.
#include "cuda/device.h"
#include "cuda/mla_combine.h"
#include "cuda/mla_schedule.h"

namespace tokenspeed::cuda {
namespace {

constexpr int32_t kLatent = 512, kValue = 128, kCluster = 4, kThreads = 256, kWarps = 8;
constexpr int32_t kSlice = kLatent / kCluster;            // features that a CTA merges: 4 a lane
constexpr int32_t kOutputs = kValue / kCluster / kWarps;  // values that a warp computes
constexpr int32_t kAhead = 4;  // partial results that a warp has in flight

struct Shared {
    float merged[2][kLatent];     // of this token and the one before, from all four CTAs
    float parts[kWarps][kSlice];  // each warp's sum of its partial results
    float norms[kWarps];
};

template <class T>
TS_DEVICE T WarpSum(T value) {
    for (int32_t mask = 16; mask > 0; mask >>= 1) value += ShuffleXor(value, mask);
    return value;
}

// Where the partial results of a token's head stand; count 0 for a token that no row has. By a
// warp.
TS_DEVICE Partials Find(const MlaCombineUpParams& p, int32_t token, int32_t head) {
    int32_t row = 0, total = 0;
    Before before{0, 0};
    for (int32_t r = ThreadX() % 32; r < p.rows; r += 32) {
        const int32_t end = p.q_start[r + 1];
        const RowWork work = WorkOf(end - p.q_start[r], p.kv_len[r], p.heads, p.block);
        const int32_t past = end <= token ? 1 : 0;
        row += past;
        before.units += past * work.units();
        before.items += past * work.blocks;
        total += work.units();
    }
    row = WarpSum(row), total = WarpSum(total);
    before.units = WarpSum(before.units), before.items = WarpSum(before.items);
    if (row >= p.rows) return {0, 0, 0};
    const int32_t first = p.q_start[row];
    return PartialsOf((token - first) * p.heads + head, p.q_start[row + 1] - first, p.kv_len[row],
                      before, total, p.ctas, p.heads, p.block);
}

TS_DEVICE float SumAt(const MlaCombineUpParams& p, const Partials& at, int32_t i) {
    return p.sums[(static_cast<int64_t>(at.slot) + i) * p.block + at.line];
}

// This warp's share of the merge: partial results warp, warp + 8, ...
TS_DEVICE void MergeShare(const MlaCombineUpParams& p, const Partials& at, int32_t first_feature,
                          Shared& shared) {
    const int32_t warp = ThreadX() / 32, lane = ThreadX() % 32;
    float peak = -INFINITY;
    for (int32_t i = lane; i < at.count; i += 32) peak = fmaxf(peak, SumAt(p, at, i));
    for (int32_t mask = 16; mask > 0; mask >>= 1) peak = fmaxf(peak, ShuffleXor(peak, mask));
    Float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
    float norm = 0.0f;
    const float* source = p.partial + first_feature + lane * 4;
    for (int32_t first = warp; first < at.count; first += kWarps * kAhead) {
        Float4 value[kAhead];
        float share[kAhead];
        TS_UNROLL(4)
        for (int32_t j = 0; j < kAhead; ++j) {
            const int32_t i = first + j * kWarps;
            const bool there = i < at.count;
            const int64_t line = (static_cast<int64_t>(at.slot) + i) * p.block + at.line;
            value[j] = there ? LoadFloat4(source + line * kLatent) : Float4{0, 0, 0, 0};
            share[j] = there ? Exp2(SumAt(p, at, i) - peak) : 0.0f;
        }
        TS_UNROLL(4)
        for (int32_t j = 0; j < kAhead; ++j) {
            acc.x += share[j] * value[j].x, acc.y += share[j] * value[j].y;
            acc.z += share[j] * value[j].z, acc.w += share[j] * value[j].w;
            norm += share[j];
        }
    }
    float* target = shared.parts[warp] + lane * 4;
    target[0] = acc.x, target[1] = acc.y, target[2] = acc.z, target[3] = acc.w;
    if (lane == 0) shared.norms[warp] = norm;
}

// The CTA's 128 merged features, to all CTAs of the cluster.
TS_DEVICE void GiveMerged(Shared& shared, int32_t buffer) {
    const int32_t feature = ThreadX();
    if (feature >= kSlice) return;
    float sum = 0.0f, norm = 0.0f;
    for (int32_t w = 0; w < kWarps; ++w) sum += shared.parts[w][feature], norm += shared.norms[w];
    const float y = norm > 0.0f ? sum / norm : 0.0f;
    float* target = &shared.merged[buffer][ClusterRank() * kSlice + feature];
    for (int32_t rank = 0; rank < kCluster; ++rank) StoreInCluster(target, rank, y);
}

// Two words hold four weights: features 8 j .. of a lane's two runs of eight.
TS_DEVICE float Dot(const Word4& w, const float* y) {
    float sum = LowHalf(w.x) * y[0] + HighHalf(w.x) * y[1];
    sum += LowHalf(w.y) * y[2] + HighHalf(w.y) * y[3];
    sum += LowHalf(w.z) * y[4] + HighHalf(w.z) * y[5];
    return sum + LowHalf(w.w) * y[6] + HighHalf(w.w) * y[7];
}

}  // namespace

TS_KERNEL(kThreads, kCluster) mla_combine_up(TS_PARAMS(MlaCombineUpParams) p) {
    Shared& shared = SharedMemory<Shared>();
    const int32_t head = BlockX() / kCluster, rank = ClusterRank();
    const int32_t warp = ThreadX() / 32, lane = ThreadX() % 32;
    const int32_t value = (rank * kWarps + warp) * kOutputs;
    Word4 weights[kOutputs][2];
    TS_UNROLL(4)
    for (int32_t i = 0; i < kOutputs; ++i) {
        const uint16_t* row = p.w_uv + (static_cast<int64_t>(head) * kValue + value + i) * kLatent;
        weights[i][0] = LoadConstant4(row + lane * 8);
        weights[i][1] = LoadConstant4(row + kLatent / 2 + lane * 8);
    }
    Partials at = Find(p, BlockY(), head);
    WaitForKernelAhead();
    ReleaseKernelBehind();
    int32_t buffer = 0;
    for (int32_t token = BlockY(); token < p.tokens; token += GridY(), buffer ^= 1) {
        if (token != BlockY()) at = Find(p, token, head);
        MergeShare(p, at, rank * kSlice, shared);
        SyncThreads();
        GiveMerged(shared, buffer);
        SyncCluster();
        const float* y = shared.merged[buffer] + lane * 8;
        TS_UNROLL(4)
        for (int32_t i = 0; i < kOutputs; ++i) {
            const float sum = WarpSum(Dot(weights[i][0], y) + Dot(weights[i][1], y + kLatent / 2));
            const int64_t line = static_cast<int64_t>(token) * p.heads + head;
            if (lane == 0) p.out[line * kValue + value + i] = ToBfloat16(sum);
        }
    }
}

}  // namespace tokenspeed::cuda
