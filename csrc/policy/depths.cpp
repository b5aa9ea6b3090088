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
    int32_t row, place;
};

using Lists = std::array<std::vector<Draft>, 2>;  // of drafts in hand, of drafts to be proposed

// Drafts that can pay at a rate of at least `rate` tokens a second, best first. The order of a
// row's own is that of its places: their gains fall.
Lists sorted(const DraftCosts& costs, std::span<const DraftRow> rows, double rate) {
    Lists lists;
    for (size_t i = 0; i < rows.size(); ++i) {
        double least = rate * costs.coefficients[kVerifyTokens];
        if (rows[i].proposes) least += rate * costs.coefficients[kProposeTokens];
        int32_t place = 0;
        for (const double gain : rows[i].probabilities) {
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
    double tokens = 0, value = -rate * costs.coefficients[kProposeDepth] * deepest;
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
    int32_t most = 0;
    for (const Draft& draft : lists[1]) most = std::max(most, draft.place + 1);
    Best best;
    for (int deepest = 0; deepest <= most; ++deepest) {
        const Best found = best_of(costs, lists, rate, max_drafts, deepest);
        if (found.value > best.value) best = found;
    }
    return best;
}

}  // namespace

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
    more[kProposeDepth] = drafts.deepest;
    return more;
}

double DraftCosts::seconds(const Drafted& drafts) const {
    double sum = base_seconds;
    const Features more = added(drafts);
    for (int i = 0; i < kNumFeatures; ++i) sum += coefficients[i] * more[i];
    return sum;
}

DepthChoice choose_depths(const DraftCosts& costs, std::span<const DraftRow> rows,
                          int64_t max_drafts, std::span<int32_t> depths) {
    double rate = costs.rows / costs.base_seconds;
    DepthChoice choice{costs.rows, costs.base_seconds};
    const Lists lists = sorted(costs, rows, rate);
    Drafted chosen;
    for (int round = 0; round < kMostRounds; ++round) {
        const Best best = best_at(costs, lists, rate, max_drafts);
        const double tokens = costs.rows + best.tokens;
        const double seconds = costs.seconds(best.drafts);
        if (!(tokens > rate * seconds * (1 + 1e-12))) break;
        rate = tokens / seconds;
        choice = {tokens, seconds};
        chosen = best.drafts;
    }
    std::ranges::fill(depths, 0);
    const int num_in_hand = chosen.verified - chosen.proposed;
    for (int i = 0; i < num_in_hand; ++i) ++depths[lists[0][i].row];
    for (int i = 0, left = chosen.proposed; left > 0; ++i) {
        if (lists[1][i].place >= chosen.deepest) continue;
        ++depths[lists[1][i].row];
        --left;
    }
    return choice;
}

}  // namespace tokenspeed::policy
