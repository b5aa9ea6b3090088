// SPDX-License-Identifier: MIT
// How long a step takes, learnt from steps: seconds = sum of coefficient x feature. Knows no
// requests, no plans and no clock; it is told features and times.
//
// Recursive least squares in information form, with directional forgetting (Cao and Schwartz, "A
// directional forgetting algorithm based on the decomposition of the information matrix",
// Automatica 36, 2000): a step makes the model forget only what that step tells anew, so what
// drafts cost is remembered through any number of steps without drafts. Errors are relative and
// weighted as by Huber.
//   S1  coefficients are finite and >= 0
//   S2  the information matrix is positive definite
//   S3  one observation, whatever its time, moves the model no more than a few typical errors do
#pragma once

#include <array>
#include <cstdint>

namespace tokenspeed::policy {

enum Feature : int {
    kStep,              // 1
    kDecodeRows,        // rows that sample and are no prefill
    kVerifyTokens,      // drafts
    kPrefillTokens,     //
    kContextThousands,  // tokens of KV that the step reads, in thousands
    kExperts,           // distinct experts touched in a layer, as far as can be said
    kProposeTokens,     // tokens that a drafter with weights proposes
    kVerifies,          // 1 if any row carries drafts
    kProposeDepth,      // most tokens proposed for a row: as often is the drafter run
    kPrefills,          // rows that are prefill
    kPrefillContext,    // their pairs of a new token and one before it, in millions: `pairs`
    kNumFeatures,
};

using Features = std::array<double, kNumFeatures>;

// Of a prefill row of so many tokens behind `start` others, in millions.
inline double pairs(double start, double num_tokens) {
    return num_tokens * (start + num_tokens / 2) * 1e-6;
}

// Of a layer; all zero for a dense model.
struct Experts {
    int32_t count = 0;      // routed experts
    int32_t per_token = 0;  // of which a token goes to so many

    // How many are touched if every token chose at random:
    // count * (1 - (1 - per_token / count)^tokens).
    double touched(double num_tokens) const;
};

struct StepTimeOptions {
    // Seconds for one of each. 0: costs nothing for ever, whatever is observed.
    Features prior = {1e-3, 5e-5, 2e-5, 2e-5, 1e-5, 2e-5, 2e-5, 5e-5, 1e-4, 1e-4, 1e-3};
    double forgetting = 0.92;    // of what a step tells about, this much of the old is kept
    double prior_weight = 1e-4;  // steps that the prior counts for
};

struct Prediction {
    double seconds, stddev;
};

class StepTimeModel {
  public:
    // REQUIRES: priors finite and >= 0, at least one > 0; 0 < forgetting <= 1; prior_weight > 0.
    explicit StepTimeModel(const StepTimeOptions& options);

    // Learns. False, and nothing learnt: a time that is not finite and > 0, a feature that is not
    // finite or < 0, or none that costs anything.
    bool observe(const Features& features, double seconds);

    Prediction predict(const Features& features) const;
    double seconds(const Features& features) const;
    // Of a difference between two steps that take about `seconds`, the noise of steps left out.
    double stddev_of_difference(const Features& difference, double seconds) const;

    const Features& coefficients() const { return coefficients_; }  // seconds for one of each
    double relative_error() const { return error_; }                // median of the last 32
    double median_relative_error() const { return median_error(kWindow); }  // ... 256; at first 1
    uint64_t num_observed() const { return num_observed_; }

  private:
    using Matrix = std::array<Features, kNumFeatures>;
    static constexpr int kWindow = 256, kLately = 32;

    Features shares(const Features& features, double seconds) const;
    double median_error(int window) const;
    void inform(const Features& shares, double weight);
    void factorize();
    Features solved(Features right) const;
    void constrain();

    Features prior_;
    double forgetting_, prior_weight_;
    // In units of the prior: 1 is what it said.
    Matrix information_{}, factor_{};
    Features estimate_;      // least squares, may be negative
    Features coefficients_;  // the nearest that is not, in seconds
    double error_ = 1;       // median of |error| / predicted time, lately
    uint64_t num_observed_ = 0;
    std::array<float, kWindow> errors_{};
};

}  // namespace tokenspeed::policy
