// SPDX-License-Identifier: MIT
// The policy under sanitizers: depths against all depths there are, step times against whatever a
// clock may say, and a policy that is fed nonsense.
#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "scheduler/check.h"

namespace tokenspeed::policy {
namespace {

using Random = std::mt19937_64;

double uniform(Random& random) { return std::uniform_real_distribution<double>()(random); }

int below(Random& random, int end) { return static_cast<int>(random() % end); }

Features random_step(Random& random) {
    Features x{1};
    for (int i = 1; i < kNumFeatures; ++i) x[i] = below(random, 64);
    return x;
}

struct Choice {
    DraftCosts costs;
    std::vector<std::vector<double>> probabilities;
    std::vector<DraftRow> rows;
    int max_drafts;

    double rate(const std::vector<int32_t>& depths) const {
        double tokens = costs.rows;
        Drafted drafted;
        for (size_t i = 0; i < rows.size(); ++i) {
            for (int j = 0; j < depths[i]; ++j) tokens += rows[i].probabilities[j];
            drafted.verified += depths[i];
            if (!rows[i].proposes) continue;
            drafted.proposed += depths[i];
            drafted.deepest = std::max(drafted.deepest, static_cast<int>(depths[i]));
        }
        return drafted.verified > max_drafts ? 0 : tokens / costs.seconds(drafted);
    }

    // Of all depths, counted up like an odometer.
    double best_rate() const {
        std::vector<int32_t> depths(rows.size());
        double best = rate(depths);
        for (size_t i = 0; i < rows.size();) {
            const auto limit = static_cast<int32_t>(rows[i].probabilities.size());
            if (depths[i] == limit) {
                depths[i++] = 0;
                continue;
            }
            ++depths[i];
            best = std::max(best, rate(depths));
            i = 0;
        }
        return best;
    }
};

void depths_are_the_best(uint64_t seed) {
    Random random(seed);
    StepTimeOptions options;
    for (double& cost : options.prior) cost = uniform(random) * 1e-3;
    options.prior[kStep] *= 20;
    const StepTimeModel times(options);
    const Experts experts = below(random, 2) == 0 ? Experts{} : Experts{32, 1 + below(random, 4)};
    Choice choice{DraftCosts(times, random_step(random), experts), {}, {}, below(random, 12)};
    choice.costs.rows = 4;
    for (int i = 0; i < 4; ++i) {
        auto& own = choice.probabilities.emplace_back(below(random, 5));
        double probability = 1;
        for (double& p : own) p = probability *= std::sqrt(uniform(random));
    }
    for (const auto& own : choice.probabilities) choice.rows.push_back({own, random() % 2 == 0});
    std::vector<int32_t> depths(choice.rows.size(), -1);
    const DepthChoice chosen = choose_depths(choice.costs, choice.rows, choice.max_drafts, depths);
    const double best = choice.best_rate();
    TS_CHECK(std::abs(choice.rate(depths) - best) <= 1e-9 * best);
    TS_CHECK(std::abs(chosen.tokens / chosen.seconds - best) <= 1e-9 * best);
}

void any_time_is_survived(uint64_t seed) {
    Random random(seed);
    StepTimeModel times(StepTimeOptions{});
    const Features constant{1, 1, 8, 0, 50, 0, 8};
    for (int i = 0; i < 20000; ++i) {
        const Features x = below(random, 100) == 0 ? random_step(random) : constant;
        constexpr double kOdd[] = {0,
                                   -1,
                                   1e-300,
                                   1e300,
                                   std::numeric_limits<double>::infinity(),
                                   std::numeric_limits<double>::quiet_NaN()};
        times.observe(x, below(random, 10) == 0 ? kOdd[below(random, 6)] : uniform(random));
        for (const double cost : times.coefficients()) TS_CHECK(std::isfinite(cost) && cost >= 0);
        const Prediction prediction = times.predict(x);
        TS_CHECK(std::isfinite(prediction.stddev) && prediction.seconds >= 0);
    }
    TS_CHECK(times.seconds(constant) > 0.1 && times.seconds(constant) < 1);
}

void limits_are_kept(uint64_t seed) {
    Random random(seed);
    StepTimeModel times(StepTimeOptions{});
    Acceptance acceptance({.num_drafters = 2});
    DepthPolicy policy(&times, &acceptance, {false, true}, {16, 2});
    for (int step = 0; step < 300; ++step) {
        const auto size = static_cast<size_t>(below(random, 12));
        std::vector<uint64_t> ids(size);
        std::vector<int32_t> drafters(size), matches(size), limits(size), depths(size, -1);
        for (size_t i = 0; i < size; ++i) {
            ids[i] = random() % 6;
            drafters[i] = below(random, 2);
            matches[i] = below(random, 100) - 1;
            limits[i] = below(random, 3) == 0 ? 0 : below(random, 200);
        }
        const int max_drafts = below(random, 50);
        const Features base = random_step(random);
        policy.choose(base, {ids, drafters, matches, limits}, max_drafts, depths);
        int total = 0;
        for (size_t i = 0; i < size; ++i) {
            TS_CHECK(depths[i] >= 0 && depths[i] <= limits[i]);
            total += depths[i];
            const int hits = below(random, depths[i] + 1);
            acceptance.observe(ids[i], drafters[i], matches[i], hits, hits < depths[i]);
        }
        TS_CHECK(total <= max_drafts);
        times.observe(base, std::exp(uniform(random) * 20 - 10));
        if (below(random, 10) == 0) acceptance.forget(random() % 6);
    }
    TS_CHECK(acceptance.num_requests() <= 6);
}

}  // namespace
}  // namespace tokenspeed::policy

int main() {
    for (uint64_t seed = 0; seed < 500; ++seed) tokenspeed::policy::depths_are_the_best(seed);
    for (uint64_t seed = 0; seed < 3; ++seed) tokenspeed::policy::any_time_is_survived(seed);
    for (uint64_t seed = 0; seed < 10; ++seed) tokenspeed::policy::limits_are_kept(seed);
    return 0;
}
