// SPDX-License-Identifier: MIT
// How many drafts each row of a step should carry so that the step gives most tokens per second.
// A pure function; knows neither requests nor how probabilities and times were found.
#pragma once

#include <cstdint>
#include <span>

#include "policy/step_time.h"

namespace tokenspeed::policy {

struct DraftRow {
    std::span<const double> probabilities;  // that the first 1, 2, .. drafts are accepted; falling
    bool proposes = false;  // its drafts are made with weights, at a cost, as well as verified
};

struct DepthChoice {
    double tokens;   // expected of the step's decoding rows
    double seconds;  // the step, its prefill left out
};

// Drafts of a step, all told.
struct Drafted {
    int verified = 0;
    int proposed = 0;  // of those, by weights
    int deepest = 0;   // most that are proposed for one row
};

// What a step without drafts gives and costs, and what drafts add.
struct DraftCosts {
    DraftCosts(const StepTimeModel& times, const Features& base, Experts experts);
    // Of the step with these drafts. REQUIRES: verified >= proposed >= deepest >= 0.
    double seconds(const Drafted& drafts) const;
    // What they add to the step.
    Features added(const Drafted& drafts) const;

    Features coefficients;
    Experts experts;
    double num_tokens;    // of the step, drafts left out
    double rows;          // tokens that it gives without drafts
    double base_seconds;  // prefill left out
    bool verifies;        // it does so without these drafts
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
// REQUIRES: depths.size() == rows.size().
DepthChoice choose_depths(const DraftCosts& costs, std::span<const DraftRow> rows,
                          int64_t max_drafts, std::span<int32_t> depths);

}  // namespace tokenspeed::policy
