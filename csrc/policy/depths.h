// SPDX-License-Identifier: MIT
// How many drafts each row of a step should carry so that the step gives most tokens per second,
// and every stream what it must have. A pure function; knows neither requests nor how probabilities
// and times were found.
#pragma once

#include <cstdint>
#include <span>

#include "policy/step_time.h"

namespace tokenspeed::policy {

struct DraftRow {
    std::span<const double> probabilities;  // that the first 1, 2, .. drafts are accepted; falling
    bool proposes = false;  // its drafts are made with weights, at a cost, as well as verified
    double floor = 0;       // tokens per second that its stream must have
    bool again = false;     // of the same stream as the row before
};

struct DepthChoice {
    double tokens;    // expected of the step's decoding rows
    double seconds;   // the step, its prefill left out
    double held = 1;  // of its floor, by the worst stream; at most 1
};

// Drafts of a step, all told.
struct Drafted {
    int verified = 0;
    int proposed = 0;  // of those, by weights
    int deepest = 0;   // most that are proposed for one row
};

// REQUIRES: depths.size() == rows.size().
Drafted counted(std::span<const DraftRow> rows, std::span<const int32_t> depths);

// How much of its floor the stream has that has least of it, if rows gain so many tokens by their
// drafts in a step of so many seconds; at most 1. `floor_of_others`: the highest of streams that
// have no row here.
// REQUIRES: gains.size() == rows.size().
double least_held(std::span<const DraftRow> rows, std::span<const double> gains,
                  double floor_of_others, double seconds);

// What a step without drafts gives and costs, and what drafts add.
struct DraftCosts {
    DraftCosts(const StepTimeModel& times, const Features& base, Experts experts);
    // Of the step with these drafts. REQUIRES: verified >= proposed >= deepest >= 0.
    double seconds(const Drafted& drafts) const;
    // What they add to the step.
    Features added(const Drafted& drafts) const;
    // The step that has these in any case, and gives so many more tokens.
    DraftCosts with(const Drafted& drafts, double tokens) const;

    Features coefficients;
    Experts experts;
    double num_tokens;    // of the step, drafts left out
    double rows;          // tokens that it gives without drafts
    double base_seconds;  // prefill left out
    bool verifies;        // it does so without these drafts
    int deepest = 0;      // most that are proposed for one row without these
};

// Maximises (rows + expected accepted drafts) / seconds over all depths, exactly: Dinkelbach's
// method ("On nonlinear fractional programming", Management Science 13, 1967), in each round of
// which, for each number of times that the drafter might be run, the rows' drafts, sorted, are
// tried one more at a time. A token is worth the time of a step without prefill: what a long
// prefill costs is spent in any case, and would make any draft look cheap. A proposal is verified
// in the next step; both belong to one choice.
//
// `base`: the step without the rows' drafts. A draft adds one verified token, experts, and one
// proposed token where the row proposes; the first, what verifying costs at all.
//
// Floors that these depths hold change nothing. Otherwise every stream has as many drafts as it
// needs, and besides, as many are taken, the best for so many, as leave every floor held: by
// halving. What can be held is found exactly, the most tokens per second only nearly. Where nothing
// holds every floor, every stream has the same share of it at least, the greatest that can be.
// REQUIRES: depths.size() == rows.size(); rows of one stream stand together and have one floor.
DepthChoice choose_depths(const DraftCosts& costs, std::span<const DraftRow> rows,
                          int64_t max_drafts, std::span<int32_t> depths,
                          double floor_of_others = 0);

}  // namespace tokenspeed::policy
