// SPDX-License-Identifier: MIT
#include "policy/depths.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <vector>

namespace tokenspeed::policy {
namespace {

constexpr int kMostRounds = 50;  // each but the last raises the rate; four are usual
constexpr int kHalvings = 16;    // until it is known how much of the floors can be held

struct Draft {
    double gain;
    int32_t row, place;
};

using Lists = std::array<std::vector<Draft>, 2>;  // of drafts in hand, of drafts to be proposed

// Drafts behind those of `depths` that can pay, best first. The order of a row's own is that of its
// places: their gains fall.
Lists sorted(const DraftCosts& costs, std::span<const DraftRow> rows,
             std::span<const int32_t> depths) {
    const double rate = costs.rows / costs.base_seconds;
    Lists lists;
    for (size_t i = 0; i < rows.size(); ++i) {
        double least = rate * costs.coefficients[kVerifyTokens];
        if (rows[i].proposes) least += rate * costs.coefficients[kProposeTokens];
        int32_t place = depths[i];
        for (const double gain : rows[i].probabilities.subspan(place)) {
            if (gain <= least) break;
            lists[rows[i].proposes].push_back({gain, static_cast<int32_t>(i), place++});
        }
    }
    for (auto& list : lists) {
        std::ranges::stable_sort(list, std::greater(), &Draft::gain);
    }
    return lists;
}

struct Best {
    Drafted drafts;
    double tokens = 0;  // beyond the rows' own
    double value = 0;   // less what their time is worth
};

// The best number of drafts if a second were worth `rate` tokens and the drafter ran `deepest`
// times.
Best best_of(const DraftCosts& costs, const Lists& lists, double rate, int64_t max_drafts,
             int deepest) {
    const double proposing = rate * costs.coefficients[kProposeTokens];
    const double verifying = rate * costs.coefficients[kVerifyTokens];
    const double expert = rate * costs.coefficients[kExperts];
    const auto& [in_hand, proposals] = lists;
    double untouched = costs.experts.count - costs.experts.touched(costs.num_tokens);
    const double touching = costs.experts.count > 0
                                ? static_cast<double>(costs.experts.per_token) / costs.experts.count
                                : 0.0;
    double tokens = 0;
    double value = -rate * costs.coefficients[kProposeDepth] * (deepest - costs.deepest);
    if (!costs.verifies) value -= rate * costs.coefficients[kVerifies];
    Best best;
    size_t a = 0, b = 0;
    int num_proposed = 0;
    for (int n = 1; n <= max_drafts; ++n) {
        while (b < proposals.size() && proposals[b].place >= deepest) ++b;
        if (a == in_hand.size() && b == proposals.size()) break;
        const bool propose =
            b < proposals.size() &&
            (a == in_hand.size() || proposals[b].gain - proposing > in_hand[a].gain);
        const double gain = propose ? proposals[b++].gain : in_hand[a++].gain;
        num_proposed += propose;
        tokens += gain;
        value += gain - verifying - (propose ? proposing : 0) - expert * untouched * touching;
        untouched *= 1 - touching;
        if (value > best.value) best = {{n, num_proposed, deepest}, tokens, value};
    }
    return best;
}

Best best_at(const DraftCosts& costs, const Lists& lists, double rate, int64_t max_drafts) {
    int32_t most = costs.deepest;
    for (const Draft& draft : lists[1]) most = std::max(most, draft.place + 1);
    Best best;
    for (int deepest = costs.deepest; deepest <= most; ++deepest) {
        const Best found = best_of(costs, lists, rate, max_drafts, deepest);
        if (found.value > best.value) best = found;
    }
    return best;
}

struct Optimum {
    Drafted drafts;
    double rate, tokens, seconds;
};

// Of most tokens per second.
Optimum optimum(const DraftCosts& costs, const Lists& lists, int64_t max_drafts) {
    const double plain = costs.rows / costs.base_seconds;
    Optimum optimum{{}, plain, costs.rows, costs.base_seconds};
    for (int round = 0; round < kMostRounds; ++round) {
        const Best best = best_at(costs, lists, optimum.rate, max_drafts);
        const double tokens = costs.rows + best.tokens;
        const double seconds = costs.seconds(best.drafts);
        if (!(tokens > optimum.rate * seconds * (1 + 1e-12))) break;
        optimum = {best.drafts, tokens / seconds, tokens, seconds};
    }
    return optimum;
}

// Adds to `depths`, behind which the lists begin.
void take(const Lists& lists, const Drafted& drafts, std::span<int32_t> depths) {
    const int num_in_hand = drafts.verified - drafts.proposed;
    for (int i = 0; i < num_in_hand; ++i) ++depths[lists[0][i].row];
    for (int i = 0, left = drafts.proposed; left > 0; ++i) {
        if (lists[1][i].place >= drafts.deepest) continue;
        ++depths[lists[1][i].row];
        --left;
    }
}

struct Floors {
    const DraftCosts& costs;
    std::span<const DraftRow> rows;
    int64_t max_drafts;
    double of_others;

    bool any() const {
        return of_others > 0 || std::ranges::any_of(rows, [](auto& row) { return row.floor > 0; });
    }
    DepthChoice choice(std::span<const int32_t> depths) const;
    bool deepen(double share, std::span<int32_t> depths) const;
    bool deepen_stream(size_t begin, size_t end, double tokens, std::span<int32_t> depths) const;
    double most_held() const;
};

DepthChoice Floors::choice(std::span<const int32_t> depths) const {
    std::vector<double> gains;
    double tokens = costs.rows;
    for (size_t i = 0; i < rows.size(); ++i) {
        double& gain = gains.emplace_back(0);
        for (const double probability : rows[i].probabilities.first(depths[i])) gain += probability;
        tokens += gain;
    }
    const double seconds = costs.seconds(counted(rows, depths));
    return {tokens, seconds, least_held(rows, gains, of_others, seconds)};
}

// Makes drafts deeper until every stream has this share of its floor. False: that is never so. A
// longer step asks for more of every stream and deeper drafts make it longer, so what is added is
// part of whatever is as deep and holds the floors: what is found is the least such.
bool Floors::deepen(double share, std::span<int32_t> depths) const {
    for (;;) {
        const Drafted drafts = counted(rows, depths);
        const double seconds = share * costs.seconds(drafts);
        if (drafts.verified > max_drafts || of_others * seconds > 1) return false;
        for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
            do ++end;
            while (end < rows.size() && rows[end].again);
            if (!deepen_stream(begin, end, rows[begin].floor * seconds, depths)) return false;
        }
        if (counted(rows, depths).verified == drafts.verified) return true;
    }
}

// ... of the stream with these rows, until it has so many tokens in the step.
bool Floors::deepen_stream(size_t begin, size_t end, double tokens,
                           std::span<int32_t> depths) const {
    double missing = tokens - 1;
    for (size_t i = begin; i < end && missing > 0; ++i) {
        const auto& own = rows[i].probabilities;
        for (const double probability : own.first(depths[i])) missing -= probability;
    }
    for (size_t i = begin; i < end; ++i) {
        const auto& own = rows[i].probabilities;
        while (missing > 0 && depths[i] < std::ssize(own)) missing -= own[depths[i]++];
    }
    return missing <= 0;
}

// The greatest share of their floors that all streams can have at once.
double Floors::most_held() const {
    const auto can = [&](double share) {
        std::vector<int32_t> depths(rows.size());
        return deepen(share, depths);
    };
    if (can(1)) return 1;
    double low = 0, high = 1;
    for (int i = 0; i < kHalvings; ++i) {
        const double middle = (low + high) / 2;
        (can(middle) ? low : high) = middle;
    }
    return low;
}

// Depths that hold every floor, or the greatest share of all.
DepthChoice best_under(const Floors& floors, std::span<int32_t> depths) {
    const double share = floors.most_held();
    std::vector<int32_t> needed(depths.size()), tried;
    floors.deepen(share, needed);
    DepthChoice best = floors.choice(needed);
    std::ranges::copy(needed, depths.begin());
    const Drafted base = counted(floors.rows, needed);
    const DraftCosts costs = floors.costs.with(base, best.tokens - floors.costs.rows);
    const Lists lists = sorted(costs, floors.rows, needed);
    int64_t most = optimum(costs, lists, floors.max_drafts - base.verified).drafts.verified;
    // `low` more drafts leave the floors held, `high` do not.
    for (int64_t low = 0, high = most + 1; high - low > 1; most = (low + high) / 2) {
        tried = needed;
        take(lists, optimum(costs, lists, most).drafts, tried);
        const bool holds = floors.deepen(share, tried);
        (holds ? low : high) = most;
        if (!holds) continue;
        const DepthChoice choice = floors.choice(tried);
        if (choice.tokens * best.seconds <= best.tokens * choice.seconds) continue;
        best = choice;
        std::ranges::copy(tried, depths.begin());
    }
    return best;
}

}  // namespace

Drafted counted(std::span<const DraftRow> rows, std::span<const int32_t> depths) {
    Drafted drafts;
    for (size_t i = 0; i < depths.size(); ++i) {
        drafts.verified += depths[i];
        if (!rows[i].proposes) continue;
        drafts.proposed += depths[i];
        drafts.deepest = std::max(drafts.deepest, depths[i]);
    }
    return drafts;
}

double least_held(std::span<const DraftRow> rows, std::span<const double> gains,
                  double floor_of_others, double seconds) {
    double least = std::min(1.0, 1 / (floor_of_others * seconds));
    double tokens = 1;
    for (size_t i = 0; i < rows.size(); ++i) {
        tokens = gains[i] + (rows[i].again ? tokens : 1);
        const bool is_last = i + 1 == rows.size() || !rows[i + 1].again;
        if (is_last) least = std::min(least, tokens / (rows[i].floor * seconds));
    }
    return least;
}

DraftCosts::DraftCosts(const StepTimeModel& times, const Features& base, Experts of_a_layer)
    : coefficients(times.coefficients()),
      experts(of_a_layer),
      rows(base[kDecodeRows]),
      verifies(base[kVerifies] > 0) {
    num_tokens = base[kDecodeRows] + base[kVerifyTokens] + base[kPrefillTokens];
    Features decode = base;
    decode[kPrefillTokens] = decode[kPrefills] = decode[kPrefillContext] = 0;
    base_seconds = std::max(times.seconds(decode), 1e-9);
}

Features DraftCosts::added(const Drafted& drafts) const {
    Features more{};
    more[kVerifyTokens] = drafts.verified;
    more[kProposeTokens] = drafts.proposed;
    more[kExperts] = experts.touched(num_tokens + drafts.verified) - experts.touched(num_tokens);
    more[kVerifies] = drafts.verified > 0 && !verifies;
    more[kProposeDepth] = std::max(drafts.deepest - deepest, 0);
    return more;
}

DraftCosts DraftCosts::with(const Drafted& drafts, double tokens) const {
    DraftCosts more = *this;
    more.base_seconds = seconds(drafts);
    more.num_tokens += drafts.verified;
    more.rows += tokens;
    more.verifies = verifies || drafts.verified > 0;
    more.deepest = std::max(deepest, drafts.deepest);
    return more;
}

double DraftCosts::seconds(const Drafted& drafts) const {
    double sum = base_seconds;
    const Features more = added(drafts);
    for (int i = 0; i < kNumFeatures; ++i) sum += coefficients[i] * more[i];
    return sum;
}

DepthChoice choose_depths(const DraftCosts& costs, std::span<const DraftRow> rows,
                          int64_t max_drafts, std::span<int32_t> depths, double floor_of_others) {
    std::ranges::fill(depths, 0);
    const Lists lists = sorted(costs, rows, depths);
    const Optimum best = optimum(costs, lists, max_drafts);
    take(lists, best.drafts, depths);
    DepthChoice choice{best.tokens, best.seconds};
    const Floors floors{costs, rows, std::max<int64_t>(max_drafts, 0), floor_of_others};
    if (!floors.any()) return choice;
    choice.held = floors.choice(depths).held;
    return choice.held < 1 ? best_under(floors, depths) : choice;
}

}  // namespace tokenspeed::policy
