// SPDX-License-Identifier: MIT
// Expert choice. Knows scores, no experts.
#include "simd.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int kMaxExperts = 4096;

struct Choice {
    float* scores;  // [num_experts], never biased
    float* ranks;   // [num_experts], what the choice goes by; -inf once taken
    float* groups;  // [n_group]
};

// The index of the largest, the lower one at a tie; -inf is never taken unless nothing else is
// left.
int64_t argmax(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i) {
        if (values[i] > values[best]) best = i;
    }
    return best;
}

void score(const RouteParams& p, const float* logits, float* scores) {
    float top = -kInfinity;
    for (int64_t e = 0; e < p.num_experts; ++e) top = max_of(top, logits[e]);
    float sum = 0.0f;
    for (int64_t e = 0; e < p.num_experts; e += kLanes) {
        const Vec x = load_at(logits, e, p.num_experts);
        const Vec bounded = -x > 120.0f ? splat(120.0f) : -x;
        store_at(scores, e, p.num_experts,
                 p.sigmoid ? 1.0f / (1.0f + exp2(bounded * kLog2E)) : exp(x - top));
    }
    if (p.sigmoid) return;
    for (int64_t e = 0; e < p.num_experts; ++e) sum += scores[e];
    for (int64_t e = 0; e < p.num_experts; ++e) scores[e] /= sum;
}

// Leaves -inf as the rank of every expert outside the best groups.
void keep_groups(const RouteParams& p, const Choice& c) {
    const int64_t size = p.num_experts / p.n_group;
    for (int64_t g = 0; g < p.n_group; ++g) {
        const float* const ranks = c.ranks + g * size;
        const int64_t best = argmax(ranks, size);
        float second = -kInfinity;
        for (int64_t e = 0; e < size; ++e) {
            if (e != best) second = max_of(second, ranks[e]);
        }
        c.groups[g] = p.group_top2 ? ranks[best] + second : ranks[best];
    }
    bool kept[kMaxExperts] = {};
    for (int i = 0; i < p.topk_group; ++i) {
        const int64_t g = argmax(c.groups, p.n_group);
        c.groups[g] = -kInfinity;
        kept[g] = true;
    }
    for (int64_t e = 0; e < p.num_experts; ++e) {
        if (!kept[e / size]) c.ranks[e] = -kInfinity;
    }
}

void route_token(const RouteParams& p, int64_t token, const Choice& c) {
    score(p, p.logits + token * p.num_experts, c.scores);
    for (int64_t e = 0; e < p.num_experts; ++e) {
        c.ranks[e] = c.scores[e] + (p.bias != nullptr ? p.bias[e] : 0.0f);
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
