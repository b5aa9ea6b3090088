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

struct Draft {
    double gain;
    int32_t row;
};

struct Count {
    int verified = 0, proposed = 0;
};

using Lists = std::array<std::vector<Draft>, 2>;  // of drafts in hand, of drafts to be proposed

// Drafts that can pay at a rate of at least `rate` tokens a second, best first. The order of a
// row's own is that of its places: their gains fall.
Lists sorted(const DraftCosts& costs, std::span<const DraftRow> rows, double rate) {
    Lists lists;
    for (size_t i = 0; i < rows.size(); ++i) {
        double least = rate * costs.coefficients[kVerifyTokens];
        if (rows[i].proposes) least += rate * costs.coefficients[kProposeTokens];
        for (const double gain : rows[i].probabilities) {
            if (gain <= least) break;
            lists[rows[i].proposes].push_back({gain, static_cast<int32_t>(i)});
        }
    }
    for (auto& list : lists) std::ranges::sort(list, std::greater(), &Draft::gain);
    return lists;
}

struct Best {
    Count count;
    double tokens;  // beyond the rows' own
};

// The best number of drafts if a second were worth `rate` tokens.
Best best_at(const DraftCosts& costs, const Lists& lists, double rate, int64_t max_drafts) {
    const double proposing = rate * costs.coefficients[kProposeTokens];
    const double verifying = rate * costs.coefficients[kVerifyTokens];
    const double expert = rate * costs.coefficients[kExperts];
    const auto& [in_hand, proposals] = lists;
    const size_t size = in_hand.size() + proposals.size();
    const int most = static_cast<int>(std::min<int64_t>(static_cast<int64_t>(size), max_drafts));
    double untouched = costs.experts.count - costs.experts.touched(costs.num_tokens);
    const double touching = costs.experts.count > 0
                                ? static_cast<double>(costs.experts.per_token) / costs.experts.count
                                : 0.0;
    double tokens = 0, value = 0, best_value = 0;
    Best best{{}, 0};
    size_t a = 0, b = 0;
    for (int n = 1; n <= most; ++n) {
        const bool propose =
            b < proposals.size() &&
            (a == in_hand.size() || proposals[b].gain - proposing > in_hand[a].gain);
        const double gain = propose ? proposals[b++].gain : in_hand[a++].gain;
        tokens += gain;
        value += gain - verifying - (propose ? proposing : 0) - expert * untouched * touching;
        untouched *= 1 - touching;
        if (value > best_value) {
            best_value = value;
            best = {{n, static_cast<int>(b)}, tokens};
        }
    }
    return best;
}

}  // namespace

DraftCosts::DraftCosts(const StepTimeModel& times, const Features& base, Experts of_a_layer)
    : coefficients(times.coefficients()), experts(of_a_layer), rows(base[kDecodeRows]) {
    num_tokens = base[kDecodeRows] + base[kVerifyTokens] + base[kPrefillTokens];
    Features decode = base;
    decode[kPrefillTokens] = 0;
    base_seconds = std::max(times.seconds(decode), 1e-9);
}

Features DraftCosts::added(int num_verified, int num_proposed) const {
    Features drafts{};
    drafts[kVerifyTokens] = num_verified;
    drafts[kProposeTokens] = num_proposed;
    drafts[kExperts] = experts.touched(num_tokens + num_verified) - experts.touched(num_tokens);
    return drafts;
}

double DraftCosts::seconds(int num_verified, int num_proposed) const {
    double sum = base_seconds;
    const Features drafts = added(num_verified, num_proposed);
    for (const Feature i : {kVerifyTokens, kProposeTokens, kExperts}) {
        sum += coefficients[i] * drafts[i];
    }
    return sum;
}

DepthChoice choose_depths(const DraftCosts& costs, std::span<const DraftRow> rows,
                          int64_t max_drafts, std::span<int32_t> depths) {
    double rate = costs.rows / costs.base_seconds;
    DepthChoice choice{costs.rows, costs.base_seconds};
    const Lists lists = sorted(costs, rows, rate);
    Count count;
    for (int round = 0; round < kMostRounds; ++round) {
        const Best best = best_at(costs, lists, rate, max_drafts);
        const double tokens = costs.rows + best.tokens;
        const double seconds = costs.seconds(best.count.verified, best.count.proposed);
        if (!(tokens > rate * seconds * (1 + 1e-12))) break;
        rate = tokens / seconds;
        choice = {tokens, seconds};
        count = best.count;
    }
    std::ranges::fill(depths, 0);
    const int num_in_hand = count.verified - count.proposed;
    for (int i = 0; i < num_in_hand; ++i) ++depths[lists[0][i].row];
    for (int i = 0; i < count.proposed; ++i) ++depths[lists[1][i].row];
    return choice;
}

}  // namespace tokenspeed::policy
