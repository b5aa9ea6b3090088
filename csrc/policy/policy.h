// SPDX-License-Identifier: MIT
// The depths of a step as an engine wants them: the best by what is believed, and now and then
// another one, so that no belief stays wrong for ever. Knows no tokens and no clock.
//
//   P1  what is tried although it is believed to cost time costs kTryingShare of the time in the
//       long run, as far as beliefs go, and at most kMostSaved steps' worth at once
//   P2  the same calls give the same depths: nothing is random
//   P3  what is tried leaves every stream as much of its floor as the best would, up to all of it;
//       if it is tried because its time is in doubt, in the shortest time that it well may take
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "policy/acceptance.h"
#include "policy/depths.h"
#include "policy/step_time.h"

namespace tokenspeed::policy {

// A draft that costs no proposing; depth 0: none.
struct Rival {
    int32_t drafter = 0, match_len = 0, depth = 0;
};

// The rows of a step that may carry drafts; all of the same length. A request may stand here twice,
// with drafts in hand and with drafts to be proposed.
struct Candidates {
    std::span<const uint64_t> request_ids;
    std::span<const int32_t> drafters;
    std::span<const int32_t> match_lens;
    std::span<const int32_t> max_depths;
    std::span<const bool> proposes;  // in this step, at a cost, for the next; else they are in hand
    // Of a row that proposes: what tokens alone say. They will say something as good in the next
    // step, so proposals are worth what they are more likely to be right. Empty: nothing.
    std::span<const Rival> rivals = {};
    // Tokens per second that each one's stream must have; empty: nothing. A request's rows stand
    // together.
    std::span<const double> floors = {};
    double floor_of_others = 0;  // the highest of streams in the step that are no candidates
};

class DepthPolicy {
  public:
    static constexpr double kTryingShare = 0.008;
    static constexpr double kMostSaved = 16;
    static constexpr int kMostDepth = 128;

    // Both collaborators outlive this.
    // REQUIRES: 0 <= per_token <= count.
    DepthPolicy(const StepTimeModel* times, Acceptance* acceptance, Experts experts)
        : times_(times), acceptance_(acceptance), experts_(experts) {}

    const Acceptance& acceptance() const { return *acceptance_; }

    // `base`: the step without these drafts. Writes a depth in [0, max_depth] for each, at most
    // `max_drafts` in all.
    // REQUIRES: drafters in range, depths >= 0, floors finite and >= 0.
    void choose(const Features& base, const Candidates& candidates, int64_t max_drafts,
                std::span<int32_t> depths);

  private:
    // Depths of a step, all told.
    struct Option {
        Drafted drafts;
        double tokens, seconds;  // expected
    };

    void gather(const DraftCosts& costs, const Candidates& candidates);
    Option counted(const DraftCosts& costs, std::span<const int32_t> depths) const;
    Option expected(const DraftCosts& costs, const Candidates& candidates,
                    std::span<const int32_t> depths);
    bool could_win(const DraftCosts& costs, const Option& other, const Option& best,
                   double floor_of_others) const;
    bool keeps_floors(double floor_of_others, double seconds) const;
    bool compare(const DraftCosts& costs, const Option& best, const Candidates& candidates,
                 int64_t max_drafts, std::span<int32_t> depths);
    bool look(const DraftCosts& costs, const Option& best, const Candidates& candidates,
              std::span<int32_t> depths);
    void try_deeper(const DraftCosts& costs, double rate, const Candidates& candidates,
                    int64_t max_drafts, std::span<int32_t> depths);
    bool afford(double loss_s);
    double proposal_s(const DraftCosts& costs, const Candidates& candidates) const;
    void book(const DraftCosts& costs, std::span<const int32_t> depths);
    bool never_pays(const DraftCosts& costs, double rate, int depth) const;
    Tries& expect(const Candidates& candidates, size_t i, int depth, double least);
    Tries& expect_more(const Candidates& candidates, size_t i, int depth, double least);

    const StepTimeModel* times_;
    Acceptance* acceptance_;
    Experts experts_;
    double saved_s_ = -1;  // that may be lost by trying; -1: before the first step
    int64_t num_steps_ = 0, num_proposing_ = 0;
    // Of steps lately: their time without drafts for each token that they gave, and their time.
    double plain_s_ = 0, spent_s_ = 0;
    bool has_floors_ = false;  // any, in this step
    double held_ = 1;          // of them, by the best depths
    bool looked_ = false;      // the step before had one draft, to see what it costs
    // Scratch of one call.
    std::vector<double> probabilities_, rival_;
    std::vector<size_t> ends_;
    std::vector<DraftRow> rows_;
    std::vector<size_t> due_;
    std::vector<int32_t> other_;
    std::vector<double> gains_;  // of the rows, in tokens, by what is looked at
};

}  // namespace tokenspeed::policy
