// SPDX-License-Identifier: MIT
#include "policy/acceptance.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace tokenspeed::policy {
namespace {

constexpr uint32_t kLongestInterval = 512;
constexpr double kLossMemory = 256;  // first drafts
// A draft accepted although it was expected so rarely: the text has changed, or the rate was wrong.
constexpr float kSurprise = 0.3F;

double odds(double rate) { return rate / (1 - rate); }

// A rate that none is beyond: odds stay finite.
double bounded(double rate) { return std::clamp(rate, 1e-4, 1 - 1e-4); }

double leant(double hits, double drafts, double rate, double weight) {
    return bounded((hits + weight * rate) / (drafts + weight));
}

void settle(Tries* tries, int hits, bool missed) {
    const int place = std::exchange(tries->place, -1);
    if (place < 0 || (hits <= place && !(missed && hits == place))) return;
    if (hits <= place) {
        tries->interval = std::min(2 * tries->interval, kLongestInterval);
    } else if (tries->expected < kSurprise) {
        tries->interval = 1;
    }
}

}  // namespace

void Acceptance::Counts::observe(int place, bool hit, float keep) {
    hits[place] = keep * hits[place] + (hit ? 1.0F : 0.0F);
    drafts[place] = keep * drafts[place] + 1.0F;
}

Acceptance::Acceptance(const AcceptanceOptions& options)
    : options_(options),
      keep_own_(static_cast<float>(1 - 1 / options.request_memory)),
      keep_shared_(static_cast<float>(1 - 1 / options.shared_memory)),
      shared_(static_cast<size_t>(options.num_drafters) * kMatches) {
    for (Shared& shared : shared_) refresh(&shared);
}

void Acceptance::observe(uint64_t request_id, int drafter, int match_len, int hits, bool missed) {
    const int which = kind(drafter, match_len), num_seen = hits + (missed ? 1 : 0);
    Shared& shared = shared_[which];
    for (int i = 0; i < num_seen; ++i) {
        shared.counts.observe(std::min(i, kPlaces - 1), i < hits, keep_shared_);
    }
    if (num_seen > 0) refresh(&shared);
    const auto found = requests_.find(request_id);
    if (found == requests_.end()) return;
    Cell& own = cell(&found->second, which);
    if (num_seen > 0) compare(&shared, own.counts, hits > 0);
    for (int i = 0; i < num_seen; ++i) {
        own.counts.observe(std::min(i, kPlaces - 1), i < hits, keep_own_);
    }
    settle(&own.tries, hits, missed);
}

Acceptance::Cell& Acceptance::expect(uint64_t request_id, int drafter, int match_len, int max_depth,
                                     double least, std::vector<double>* probabilities) {
    const int which = kind(drafter, match_len);
    Cell& own = cell(&requests_[request_id], which);
    double probability = 1, rate = 0;
    for (int i = 0; i < max_depth; ++i) {
        if (i < kPlaces) rate = own_rate(shared_[which], own.counts, i, rate);
        probability *= rate;
        if (probability < least) break;
        probabilities->push_back(probability);
    }
    return own;
}

double Acceptance::rate(uint64_t request_id, int drafter, int match_len, int place) const {
    const int which = kind(drafter, match_len), last = std::min(place, kPlaces - 1);
    static const Counts kNone;
    const Counts* counts = &kNone;
    if (const auto found = requests_.find(request_id); found != requests_.end()) {
        for (const Cell& own : found->second) {
            if (own.kind == which) counts = &own.counts;
        }
    }
    double rate = 0;
    for (int i = 0; i <= last; ++i) rate = own_rate(shared_[which], *counts, i, rate);
    return rate;
}

int Acceptance::kind(int drafter, int match_len) const {
    const auto length = static_cast<uint32_t>(std::max(match_len, 0));
    return drafter * kMatches + std::min(static_cast<int>(std::bit_width(length)), kMatches - 1);
}

void Acceptance::refresh(Shared* shared) const {
    const double weight = options_.shared_shrinkage;
    double rate = options_.prior;
    for (int i = 0; i < kPlaces; ++i) {
        rate = (shared->counts.hits[i] + weight * rate) / (shared->counts.drafts[i] + weight);
        shared->rates[i] = rate = bounded(rate);
    }
}

// What the drafter's rate would be for a request that differs from the others as much here as at
// the place before (as a ratio of odds), corrected by what was seen here.
double Acceptance::own_rate(const Shared& shared, const Counts& own, int place, double before) {
    double expected = shared.rates[place];
    if (place > 0) {
        const double moved = odds(expected) * odds(before) / odds(shared.rates[place - 1]);
        expected = moved / (1 + moved);
    }
    return leant(own.hits[place], own.drafts[place], expected, kShrinkages[shared.best]);
}

// Which shrinkage foretells first drafts best.
void Acceptance::compare(Shared* shared, const Counts& own, bool hit) {
    for (size_t i = 0; i < kShrinkages.size(); ++i) {
        const double rate = leant(own.hits[0], own.drafts[0], shared->rates[0], kShrinkages[i]);
        const double loss = -std::log(hit ? rate : 1 - rate);
        shared->losses[i] += (loss - shared->losses[i]) / kLossMemory;
    }
    shared->best = std::ranges::min_element(shared->losses) - shared->losses.begin();
}

Acceptance::Cell& Acceptance::cell(Cells* cells, int kind) {
    for (Cell& own : *cells) {
        if (own.kind == kind) return own;
    }
    return cells->emplace_back(Cell{kind, {}, {}});
}

}  // namespace tokenspeed::policy
