// SPDX-License-Identifier: MIT
#include "policy/policy.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tokenspeed::policy {
namespace {

constexpr int kStepsBetweenComparisons = 16;
// What drafts cost is in doubt while its standard deviation is more than this of the step.
constexpr double kDoubt = 0.05;

}  // namespace

DepthPolicy::DepthPolicy(const StepTimeModel* times, Acceptance* acceptance,
                         std::vector<bool> proposes, Experts experts)
    : times_(times), acceptance_(acceptance), proposes_(std::move(proposes)), experts_(experts) {}

void DepthPolicy::choose(const Features& base, const Candidates& candidates, int64_t max_drafts,
                         std::span<int32_t> depths) {
    DraftCosts costs(*times_, base, experts_);
    costs.rows = std::max(costs.rows, 1.0);
    gather(costs, candidates);
    const DepthChoice choice = choose_depths(costs, rows_, max_drafts, depths);
    saved_s_ = std::min(saved_s_ + kTryingShare * choice.seconds, kMostSaved * costs.base_seconds);
    if (compare(costs, choice, depths)) return;
    try_deeper(costs, choice.tokens / choice.seconds, candidates, max_drafts, depths);
}

// Fills rows_ with what could pay, due_ with the candidates whose turn it is to try more.
void DepthPolicy::gather(const DraftCosts& costs, const Candidates& candidates) {
    const double rate = costs.rows / costs.base_seconds;
    const size_t size = candidates.request_ids.size();
    probabilities_.clear(), ends_.clear(), rows_.clear(), due_.clear();
    for (size_t i = 0; i < size; ++i) {
        const int depth = std::min(candidates.max_depths[i], kMostDepth);
        if (depth > 0) {
            double cost = costs.coefficients[kVerifyTokens];
            if (proposes_[candidates.drafters[i]]) cost += costs.coefficients[kProposeTokens];
            Tries& tries = expect(candidates, i, depth, rate * cost);
            if (++tries.waited >= tries.interval) due_.push_back(i);
        }
        ends_.push_back(probabilities_.size());
    }
    size_t begin = 0;
    for (size_t i = 0; i < size; ++i) {
        const std::span all(probabilities_);
        rows_.push_back({all.subspan(begin, ends_[i] - begin), proposes_[candidates.drafters[i]]});
        begin = ends_[i];
    }
}

// Whether this step goes without drafts, to tell what they cost: in steps of always the same
// drafts, theirs cannot be told from the step's own.
bool DepthPolicy::compare(const DraftCosts& costs, const DepthChoice& choice,
                          std::span<int32_t> depths) {
    Features drafts{};
    for (size_t i = 0; i < depths.size(); ++i) {
        drafts[kVerifyTokens] += depths[i];
        if (rows_[i].proposes) drafts[kProposeTokens] += depths[i];
    }
    if (drafts[kVerifyTokens] == 0) {
        steps_since_plain_ = 0;
        return false;
    }
    if (++steps_since_plain_ < kStepsBetweenComparisons) return false;
    const double doubt = times_->stddev_of_difference(drafts, choice.seconds);
    if (doubt < kDoubt * choice.seconds) return false;
    if (!afford(costs.base_seconds - costs.rows * choice.seconds / choice.tokens)) return false;
    steps_since_plain_ = 0;
    std::ranges::fill(depths, 0);
    return true;
}

void DepthPolicy::try_deeper(const DraftCosts& costs, double rate, const Candidates& candidates,
                             int64_t max_drafts, std::span<int32_t> depths) {
    auto drafts = std::accumulate(depths.begin(), depths.end(), int64_t{0});
    for (const size_t i : due_) {
        const int place = depths[i];
        if (drafts >= max_drafts || place >= std::min(candidates.max_depths[i], kMostDepth)) {
            continue;
        }
        probabilities_.clear();
        Tries& tries = expect(candidates, i, place + 1, 0);
        const double before = place > 0 ? probabilities_[place - 1] : 1;
        const int verified = static_cast<int>(drafts);
        const double cost =
            costs.seconds(verified + 1, rows_[i].proposes ? 1 : 0) - costs.seconds(verified, 0);
        if (!afford(cost - probabilities_[place] / rate)) return;
        tries.waited = 0;
        tries.place = place;
        tries.expected = static_cast<float>(probabilities_[place] / before);
        ++depths[i];
        ++drafts;
    }
}

bool DepthPolicy::afford(double loss_s) {
    if (loss_s > saved_s_) return false;
    saved_s_ -= std::max(loss_s, 0.0);
    return true;
}

// Appends to probabilities_.
Tries& DepthPolicy::expect(const Candidates& candidates, size_t i, int depth, double least) {
    return acceptance_
        ->expect(candidates.request_ids[i], candidates.drafters[i], candidates.match_lens[i], depth,
                 least, &probabilities_)
        .tries;
}

}  // namespace tokenspeed::policy
