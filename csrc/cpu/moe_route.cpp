// SPDX-License-Identifier: MIT
// Expert choice. Knows scores, no experts.
#include "simd.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

struct Choice {
    float* scores;  // [num_experts], never biased
    float* ranks;   // [num_experts], what the choice goes by; -inf once taken
    float* groups;  // [n_group]
};

// The index of the largest, the lower one at a tie; NaN and -inf are never taken unless nothing
// else is left.
int64_t argmax(const float* values, int64_t count) {
    float best = -kInfinity;
    int64_t place = 0, i = 0;
    if (count >= kLanes) {
        Vec top = splat(-kInfinity), places{}, here;  // places are exact: fewer than 2^24
        for (int lane = 0; lane < kLanes; ++lane) here[lane] = static_cast<float>(lane);
        for (; i + kLanes <= count; i += kLanes) {
            const Vec some = load(values + i);
            places = some > top ? here : places;
            top = max_of(top, some);
            here += static_cast<float>(kLanes);
        }
        best = reduce_max(top);
        place = static_cast<int64_t>(-reduce_max(top == best ? -places : splat(-kInfinity)));
    }
    for (; i < count; ++i) {
        if (values[i] > best) {
            best = values[i];
            place = i;
        }
    }
    return place;
}

void score(const RouteParams& p, const float* logits, float* scores) {
    const int64_t count = p.num_experts;
    if (p.sigmoid) {
        for (int64_t e = 0; e < count; e += kLanes) {
            const Vec x = load_at(logits, e, count), bound = splat(120.0f);
            store_at(scores, e, count, 1.0f / (1.0f + exp2((-x > bound ? bound : -x) * kLog2E)));
        }
        return;
    }
    const float top = logits[argmax(logits, count)];
    Vec sums{};
    for (int64_t e = 0; e < count; e += kLanes) {
        store_at(scores, e, count, exp(load_at(logits, e, count) - top));
        sums += load_at(scores, e, count);
    }
    const float sum = reduce_add(sums);
    for (int64_t e = 0; e < count; e += kLanes) {
        store_at(scores, e, count, load_at(scores, e, count) / sum);
    }
}

// Leaves -inf as the rank of every expert outside the best groups.
void keep_groups(const RouteParams& p, const Choice& c) {
    const int64_t size = p.num_experts / p.n_group;
    for (int64_t g = 0; g < p.n_group; ++g) {
        float* const ranks = c.ranks + g * size;
        const int64_t first = argmax(ranks, size);
        const float best = ranks[first];
        c.groups[g] = best;
        if (!p.group_top2) continue;
        ranks[first] = -kInfinity;
        c.groups[g] = best + (size > 1 ? ranks[argmax(ranks, size)] : -kInfinity);
        ranks[first] = best;
    }
    // The groups that are kept become NaN, which no argmax takes again.
    for (int i = 0; i < p.topk_group; ++i)
        c.groups[argmax(c.groups, p.n_group)] = __builtin_nanf("");
    for (int64_t g = 0; g < p.n_group; ++g) {
        if (c.groups[g] != c.groups[g]) continue;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) c.ranks[e] = -kInfinity;
    }
}

void route_token(const RouteParams& p, int64_t token, const Choice& c) {
    score(p, p.logits + token * p.num_experts, c.scores);
    for (int64_t e = 0; e < p.num_experts; e += kLanes) {
        Vec rank = load_at(c.scores, e, p.num_experts);
        if (p.bias != nullptr) rank += load_at(p.bias, e, p.num_experts);
        store_at(c.ranks, e, p.num_experts, rank);
    }
    if (p.n_group > 1) keep_groups(p, c);
    float* const weights = p.weights + token * p.top_k;
    int32_t* const ids = p.ids + token * p.top_k;
    float sum = 0.0f;
    for (int k = 0; k < p.top_k; ++k) {
        const int64_t e = argmax(c.ranks, p.num_experts);
        c.ranks[e] = -kInfinity;
        ids[k] = static_cast<int32_t>(e);
        weights[k] = c.scores[e];
        sum += weights[k];
    }
    const float scale = p.norm ? p.scale / (sum + 1e-20f) : p.scale;
    for (int k = 0; k < p.top_k; ++k) weights[k] *= scale;
}

}  // namespace

void route(const RouteParams& p) {
    parallel_for(p.num_tokens, 16, [&](int64_t begin, int64_t end) {
        float* const memory = scratch_of<float>(0, 3 * p.num_experts);
        const Choice c{memory, memory + p.num_experts, memory + 2 * p.num_experts};
        for (int64_t token = begin; token < end; ++token) route_token(p, token, c);
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
