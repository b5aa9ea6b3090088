// SPDX-License-Identifier: MIT
#include "policy/policy.h"

#include <algorithm>
#include <utility>

namespace tokenspeed::policy {
namespace {

constexpr double kFirstSaved = 4;
constexpr int kStepsBetweenComparisons = 8;
// A time is in doubt if its standard deviation is more than this of the step's.
constexpr double kDoubt = 0.05;
constexpr double kHope = 2;     // standard deviations
constexpr int kKnown = 16;      // steps that proposed
constexpr double kMemory = 32;  // steps

// Values that would rise have their mean, for they only come together: the first of them alone are
// not worth more than all.
void make_falling(std::span<double> values) {
    for (size_t end = 1; end <= values.size(); ++end) {
        double sum = 0;
        size_t begin = end, count = 0;
        do {
            sum += values[--begin];
            ++count;
        } while (begin > 0 && values[begin - 1] * static_cast<double>(count) < sum);
        std::ranges::fill(values.subspan(begin, count), sum / static_cast<double>(count));
    }
}

}  // namespace

void DepthPolicy::choose(const Features& base, const Candidates& candidates, int64_t max_drafts,
                         std::span<int32_t> depths) {
    DraftCosts costs(*times_, base, experts_);
    costs.rows = std::max(costs.rows, 1.0);
    has_floors_ = candidates.floor_of_others > 0 ||
                  std::ranges::any_of(candidates.floors, [](double floor) { return floor > 0; });
    gather(costs, candidates);
    const DepthChoice choice =
        choose_depths(costs, rows_, max_drafts, depths, candidates.floor_of_others);
    held_ = choice.held;
    if (saved_s_ < 0) saved_s_ = kFirstSaved * costs.base_seconds;
    saved_s_ = std::min(saved_s_ + kTryingShare * choice.seconds, kMostSaved * costs.base_seconds);
    if (max_drafts < 1) return;
    Option best = counted(costs, depths);
    best.tokens = choice.tokens, best.seconds = choice.seconds;
    if (!compare(costs, best, candidates, max_drafts, depths) &&
        !look(costs, best, candidates, depths)) {
        try_deeper(costs, choice.tokens / choice.seconds, candidates, max_drafts, depths);
    }
    num_proposing_ += counted(costs, depths).drafts.proposed > 0;
    book(costs, depths);
}

// What drafts in hand gained lately is what time is worth: proposals take time from steps to come.
void DepthPolicy::book(const DraftCosts& costs, std::span<const int32_t> depths) {
    double tokens = costs.rows;
    for (size_t i = 0; i < depths.size(); ++i) {
        if (rows_[i].proposes) continue;
        const auto& own = rows_[i].probabilities;
        const size_t depth = std::min<size_t>(depths[i], own.size());
        for (const double probability : own.first(depth)) tokens += probability;
    }
    plain_s_ += (tokens / costs.rows * costs.base_seconds - plain_s_) / kMemory;
    spent_s_ += (costs.seconds(counted(costs, depths).drafts) - spent_s_) / kMemory;
}

// What one more proposal and its verification take, if all rows that may have another one.
double DepthPolicy::proposal_s(const DraftCosts& costs, const Candidates& candidates) const {
    const auto rows = std::ranges::count(candidates.proposes, true);
    const double depth = costs.coefficients[kProposeDepth];
    return costs.coefficients[kVerifyTokens] + costs.coefficients[kProposeTokens] +
           depth / static_cast<double>(std::max<int64_t>(rows, 1));
}

// Fills rows_ with what could pay, due_ with the candidates whose turn it is to try more.
void DepthPolicy::gather(const DraftCosts& costs, const Candidates& candidates) {
    const double rate = costs.rows / costs.base_seconds;
    const double gain = spent_s_ > 0 ? std::max(plain_s_ / spent_s_, 1.0) : 1;
    const double proposed_s = proposal_s(costs, candidates);
    const size_t size = candidates.request_ids.size();
    probabilities_.clear(), ends_.clear(), rows_.clear(), due_.clear();
    for (size_t i = 0; i < size; ++i) {
        const int depth = std::min(candidates.max_depths[i], kMostDepth);
        if (depth > 0) {
            double cost = costs.coefficients[kVerifyTokens];
            double worth = rate;
            if (candidates.proposes[i]) cost = proposed_s, worth *= gain;
            // A stream may need drafts that do not pay for the others.
            const double floor = candidates.floors.empty() ? 0 : candidates.floors[i];
            const double least = floor > 0 ? std::min(worth, floor) : worth;
            Tries& tries = expect_more(candidates, i, depth, least * cost);
            const bool hopeless = candidates.proposes[i] && never_pays(costs, rate, depth);
            if (++tries.waited >= tries.interval && !hopeless) due_.push_back(i);
        }
        ends_.push_back(probabilities_.size());
    }
    size_t begin = 0;
    for (size_t i = 0; i < size; ++i) {
        const std::span all(probabilities_);
        DraftRow& row = rows_.emplace_back();
        row.probabilities = all.subspan(begin, ends_[i] - begin);
        row.proposes = candidates.proposes[i];
        if (!candidates.floors.empty()) row.floor = candidates.floors[i];
        row.again = i > 0 && candidates.request_ids[i] == candidates.request_ids[i - 1];
        begin = ends_[i];
    }
}

// Whether proposals of this depth for every row would not be worth their time, were they all right.
// What a few of them took may have been an accident.
bool DepthPolicy::never_pays(const DraftCosts& costs, double rate, int depth) const {
    if (num_proposing_ < kKnown) return false;
    const int drafts = static_cast<int>(costs.rows) * depth;
    const double more = costs.seconds({drafts, drafts, depth}) - costs.base_seconds;
    return drafts <= rate * more;
}

DepthPolicy::Option DepthPolicy::counted(const DraftCosts& costs,
                                         std::span<const int32_t> depths) const {
    const Drafted drafts = policy::counted(rows_, depths);
    return {drafts, costs.rows, costs.seconds(drafts)};
}

// Overwrites probabilities_ and gains_.
DepthPolicy::Option DepthPolicy::expected(const DraftCosts& costs, const Candidates& candidates,
                                          std::span<const int32_t> depths) {
    Option option = counted(costs, depths);
    gains_.assign(depths.size(), 0);
    for (size_t i = 0; i < depths.size(); ++i) {
        probabilities_.clear();
        if (depths[i] > 0) expect_more(candidates, i, depths[i], 0);
        for (const double probability : probabilities_) {
            option.tokens += probability;
            gains_[i] += probability;
        }
    }
    return option;
}

// Whether the other option's time is in doubt, and if it were as short as it well may be, would
// give more tokens a second than the best, and keep the floors. REQUIRES: gains_ are the other's.
bool DepthPolicy::could_win(const DraftCosts& costs, const Option& other, const Option& best,
                            double floor_of_others) const {
    Features difference = costs.added(other.drafts);
    const Features own = costs.added(best.drafts);
    for (int i = 0; i < kNumFeatures; ++i) difference[i] -= own[i];
    const double doubt = times_->stddev_of_difference(difference, best.seconds);
    if (doubt < kDoubt * best.seconds) return false;
    const double seconds = other.seconds - kHope * doubt;
    return other.tokens * best.seconds > best.tokens * seconds &&
           keeps_floors(floor_of_others, seconds);
}

// Whether all have as much of their floors as by the best depths.
bool DepthPolicy::keeps_floors(double floor_of_others, double seconds) const {
    constexpr double kRounding = 1e-9;
    if (!has_floors_ || seconds <= 0) return true;
    return least_held(rows_, gains_, floor_of_others, seconds) >= held_ - kRounding;
}

// Whether all rows of this step go without drafts, or with all they may have, to see what that
// costs: in steps of always the same drafts, their cost cannot be told from the step's own.
bool DepthPolicy::compare(const DraftCosts& costs, const Option& best, const Candidates& candidates,
                          int64_t max_drafts, std::span<int32_t> depths) {
    if (++num_steps_ % kStepsBetweenComparisons != 0) return false;
    const bool plain = num_steps_ / kStepsBetweenComparisons % 2 == 0;
    other_.assign(depths.size(), 0);
    for (size_t i = 0; !plain && i < depths.size(); ++i) {
        other_[i] = static_cast<int32_t>(
            std::min<int64_t>(std::min(candidates.max_depths[i], kMostDepth), max_drafts));
        max_drafts -= other_[i];
    }
    const Option other = expected(costs, candidates, other_);
    if (!could_win(costs, other, best, candidates.floor_of_others)) return false;
    if (!afford(other.seconds - other.tokens * best.seconds / best.tokens)) return false;
    std::ranges::copy(other_, depths.begin());
    return true;
}

// One draft in every other step where there would be none although what it costs is in doubt: an
// outlier among the first observations could otherwise never be seen to be one.
bool DepthPolicy::look(const DraftCosts& costs, const Option& best, const Candidates& candidates,
                       std::span<int32_t> depths) {
    const auto able = std::ranges::find_if(candidates.max_depths, [](int d) { return d > 0; });
    if (std::exchange(looked_, false) || best.drafts.verified > 0) return false;
    if (able == candidates.max_depths.end()) return false;
    other_.assign(depths.size(), 0);
    other_[able - candidates.max_depths.begin()] = 1;
    looked_ =
        could_win(costs, expected(costs, candidates, other_), best, candidates.floor_of_others);
    if (looked_) std::ranges::copy(other_, depths.begin());
    return looked_;
}

void DepthPolicy::try_deeper(const DraftCosts& costs, double rate, const Candidates& candidates,
                             int64_t max_drafts, std::span<int32_t> depths) {
    Drafted drafts = counted(costs, depths).drafts;
    gains_.assign(depths.size(), 0);
    if (has_floors_ && !due_.empty()) expected(costs, candidates, depths);
    for (const size_t i : due_) {
        const int place = depths[i];
        if (drafts.verified >= max_drafts ||
            place >= std::min(candidates.max_depths[i], kMostDepth)) {
            continue;
        }
        probabilities_.clear();
        Tries& tries = expect(candidates, i, place + 1, 0);
        const double before = place > 0 ? probabilities_[place - 1] : 1;
        Drafted more = drafts;
        ++more.verified;
        if (rows_[i].proposes) {
            ++more.proposed;
            more.deepest = std::max(more.deepest, place + 1);
        }
        gains_[i] += probabilities_[place];
        if (!keeps_floors(candidates.floor_of_others, costs.seconds(more))) {
            gains_[i] -= probabilities_[place];
            continue;
        }
        const double cost = costs.seconds(more) - costs.seconds(drafts);
        if (!afford(cost - probabilities_[place] / rate)) return;
        tries.waited = 0;
        tries.place = place;
        tries.expected = static_cast<float>(probabilities_[place] / before);
        ++depths[i];
        drafts = more;
    }
}

bool DepthPolicy::afford(double loss_s) {
    if (loss_s > saved_s_) return false;
    saved_s_ -= std::max(loss_s, 0.0);
    return true;
}

// Appends to probabilities_ what each draft gives that the rival would not.
Tries& DepthPolicy::expect_more(const Candidates& candidates, size_t i, int depth, double least) {
    rival_.clear();
    if (candidates.proposes[i] && !candidates.rivals.empty()) {
        const Rival& rival = candidates.rivals[i];
        acceptance_->expect(candidates.request_ids[i], rival.drafter, rival.match_len,
                            std::min(rival.depth, depth), 0, &rival_);
    }
    const size_t begin = probabilities_.size();
    Tries& tries = expect(candidates, i, depth, least);
    const std::span own = std::span(probabilities_).subspan(begin);
    for (size_t j = 0; j < std::min(own.size(), rival_.size()); ++j) {
        own[j] = std::max(own[j] - rival_[j], 0.0);
    }
    if (rival_.empty()) return tries;
    make_falling(own);
    while (probabilities_.size() > begin && probabilities_.back() < least) {
        probabilities_.pop_back();
    }
    return tries;
}

// Appends to probabilities_.
Tries& DepthPolicy::expect(const Candidates& candidates, size_t i, int depth, double least) {
    return acceptance_
        ->expect(candidates.request_ids[i], candidates.drafters[i], candidates.match_lens[i], depth,
                 least, &probabilities_)
        .tries;
}

}  // namespace tokenspeed::policy
