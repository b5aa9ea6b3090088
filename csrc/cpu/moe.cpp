// SPDX-License-Identifier: MIT
// Expert choice, and the experts themselves: tokens are sorted by expert, so each routed expert's
// weights are read once for all of them and others not at all.
#include "gemm.h"

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

// Which (token, choice) pairs each expert serves. A pair's place is its row in the sorted order;
// one that is computed elsewhere (its id is below 0) has none.
struct Grouping {
    int32_t* begin;  // [num_experts + 1] places
    int32_t* pair;   // [pairs] place -> token * top_k + choice
    int32_t* place;  // [pairs] and back, -1 for none

    Grouping(const MoeParams& p, int32_t* memory)
        : begin(memory), pair(memory + p.num_experts + 1), place(pair + p.num_tokens * p.top_k) {
        const int64_t pairs = p.num_tokens * p.top_k;
        for (int64_t e = 0; e <= p.num_experts; ++e) begin[e] = 0;
        for (int64_t i = 0; i < pairs; ++i) {
            if (p.ids[i] >= 0) ++begin[p.ids[i] + 1];
        }
        for (int64_t e = 0; e < p.num_experts; ++e) begin[e + 1] += begin[e];
        for (int64_t i = 0; i < pairs; ++i) {
            place[i] = p.ids[i] < 0 ? -1 : begin[p.ids[i]]++;
            if (place[i] >= 0) pair[place[i]] = static_cast<int32_t>(i);
        }
        for (int64_t e = p.num_experts; e > 0; --e) begin[e] = begin[e - 1];
        begin[0] = 0;
    }

    static int64_t words(const MoeParams& p) {
        return p.num_experts + 1 + 2 * p.num_tokens * p.top_k;
    }
};

constexpr int64_t kPanelRows = 128;  // rows of a task at most

// A block of rows of one expert times kPanel outputs.
struct Task {
    int32_t expert, first, count, column;
};

template <typename T>
class Experts {
    using P = Product<T, T>;
    using Element = typename P::Element;

  public:
    explicit Experts(const MoeParams& p)
        : p_(p), groups_(p, scratch_of<int32_t>(3, Grouping::words(p) + max_tasks(p) * 4)) {
        tasks_ = reinterpret_cast<Task*>(groups_.begin + Grouping::words(p));
        const int64_t pairs = p.num_tokens * p.top_k;
        in_stride_ = div_ceil(p.size, 2) * 2;
        inner_stride_ = div_ceil(p.inner, 2) * 2;
        const int64_t elements = pairs * (in_stride_ + inner_stride_);
        char* const memory = scratch_of<char>(
            2, elements * static_cast<int64_t>(sizeof(Element)) + pairs * p.size * 4 + 64);
        out_ = reinterpret_cast<float*>(memory);
        in_ = reinterpret_cast<Element*>(memory + pairs * p.size * 4);
        inner_ = in_ + pairs * in_stride_;
    }

    void run() {
        parallel_for(groups_.begin[p_.num_experts], 16, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                copy_row(in_ + i * in_stride_,
                         static_cast<const T*>(p_.x) + groups_.pair[i] / p_.top_k * p_.x_stride,
                         p_.size, in_stride_);
            }
        });
        each_task(p_.inner, [&](const Task& task) { up(task); });
        each_task(p_.size, [&](const Task& task) { down(task); });
        parallel_for(p_.num_tokens, 8, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) combine(token);
        });
    }

  private:
    // Outputs of a task; every expert's last block may be short.
    static int64_t max_tasks(const MoeParams& p) {
        const int64_t pairs = p.num_tokens * p.top_k;
        const int64_t blocks = min_of(pairs, p.num_experts) + pairs / kPanelRows;
        return blocks * div_ceil(max_of(p.size, p.inner), kPanel);
    }

    template <typename Body>
    void each_task(int64_t columns, const Body& body) {
        int64_t count = 0;
        for (int64_t e = 0; e < p_.num_experts; ++e) {
            for (int32_t first = groups_.begin[e]; first < groups_.begin[e + 1];
                 first += kPanelRows) {
                const int32_t rows = min_of<int32_t>(kPanelRows, groups_.begin[e + 1] - first);
                for (int64_t column = 0; column < columns; column += kPanel) {
                    tasks_[count++] = {static_cast<int32_t>(e), first, rows,
                                       static_cast<int32_t>(column)};
                }
            }
        }
        parallel_for(count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(tasks_[i]);
        });
    }

    // Products of the task's rows with weight rows [column, column + count) into c[row][kPanel].
    void product(const Task& task, const Element* a, int64_t stride, const T* weight, int64_t count,
                 int64_t size, float* c) {
        const Element* const rows = a + task.first * stride;
        dot_product<P>(task.count, rows, stride, weight, size, 0, count,
                       [&](int64_t m, int64_t n, float sum) { c[m * kPanel + n] = sum; });
    }

    void up(const Task& task) {
        float* const gate = scratch_of<float>(0, 2 * kPanelRows * kPanel);
        float* const up = gate + kPanelRows * kPanel;
        const int64_t count = min_of<int64_t>(kPanel, p_.inner - task.column);
        const T* const weight =
            static_cast<const T*>(p_.w13) + (task.expert * 2 * p_.inner + task.column) * p_.size;
        product(task, in_, in_stride_, weight, count, p_.size, gate);
        product(task, in_, in_stride_, weight + p_.inner * p_.size, count, p_.size, up);
        for (int64_t m = 0; m < task.count; ++m) {
            Element* const out = inner_ + (task.first + m) * inner_stride_ + task.column;
            for (int64_t n = 0; n < count; n += kLanes) {
                store_at(out, n, count,
                         silu(load(gate + m * kPanel + n)) * load(up + m * kPanel + n));
            }
            if (count % 2 != 0) store_one(out + count, 0.0f);
        }
    }

    void down(const Task& task) {
        float* const c = scratch_of<float>(0, kPanelRows * kPanel);
        const int64_t count = min_of<int64_t>(kPanel, p_.size - task.column);
        const T* const weight =
            static_cast<const T*>(p_.w2) + (task.expert * p_.size + task.column) * p_.inner;
        product(task, inner_, inner_stride_, weight, count, p_.inner, c);
        for (int64_t m = 0; m < task.count; ++m) {
            copy_row(out_ + (task.first + m) * p_.size + task.column, c + m * kPanel, count, count);
        }
    }

    // Sums in the order of the token's choices.
    void combine(int64_t token) {
        T* const out = static_cast<T*>(p_.out) + token * p_.size;
        for (int64_t n = 0; n < p_.size; n += kLanes) {
            Vec sum{};
            for (int64_t k = 0; k < p_.top_k; ++k) {
                const int64_t pair = token * p_.top_k + k;
                const int64_t place = groups_.place[pair];
                if (place < 0) continue;
                sum += load_at(out_ + place * p_.size, n, p_.size) * p_.weights[pair];
            }
            store_at(out, n, p_.size, sum);
        }
    }

    const MoeParams& p_;
    Grouping groups_;
    Task* tasks_;
    int64_t in_stride_, inner_stride_;
    Element* in_;     // [pairs, in_stride] tokens in sorted order
    Element* inner_;  // [pairs, inner_stride]
    float* out_;      // [pairs, size]
};

}  // namespace

void route(const RouteParams& p) {
    parallel_for(p.num_tokens, 16, [&](int64_t begin, int64_t end) {
        float* const memory = scratch_of<float>(0, 3 * p.num_experts);
        const Choice c{memory, memory + p.num_experts, memory + 2 * p.num_experts};
        for (int64_t token = begin; token < end; ++token) route_token(p, token, c);
    });
}

void moe(const MoeParams& p) {
    with_type(p.dtype, [&](auto type) { Experts<decltype(type)>(p).run(); });
}

}  // namespace tokenspeed::cpu::TS_ISA
