// SPDX-License-Identifier: MIT
// The policy under sanitizers: depths, with floors and without, against all depths there are, step
// times against whatever a clock may say, and a policy that is fed nonsense.
#include "policy/policy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <utility>
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

struct Figures {
    double rate;  // tokens per second of the step
    double held;  // of its floor, by the worst stream; at most 1
};

// Each row is a stream.
struct Choice {
    DraftCosts costs;
    std::vector<std::vector<double>> probabilities;
    std::vector<DraftRow> rows;
    int max_drafts;
    double floor_of_others = 0;

    Figures figures(const std::vector<int32_t>& depths) const {
        Drafted drafted;
        for (size_t i = 0; i < rows.size(); ++i) {
            drafted.verified += depths[i];
            if (!rows[i].proposes) continue;
            drafted.proposed += depths[i];
            drafted.deepest = std::max(drafted.deepest, static_cast<int>(depths[i]));
        }
        if (drafted.verified > max_drafts) return {0, 0};
        const double seconds = costs.seconds(drafted);
        double sum = costs.rows, held = std::min(1.0, 1 / (floor_of_others * seconds));
        for (size_t i = 0; i < rows.size(); ++i) {
            double tokens = 1;
            for (int j = 0; j < depths[i]; ++j) tokens += rows[i].probabilities[j];
            sum += tokens - 1;
            held = std::min(held, tokens / (rows[i].floor * seconds));
        }
        return {sum / seconds, held};
    }

    // All depths, counted up like an odometer.
    std::vector<Figures> all() const {
        std::vector<int32_t> depths(rows.size());
        std::vector<Figures> found = {figures(depths)};
        for (size_t i = 0; i < rows.size();) {
            const auto limit = static_cast<int32_t>(rows[i].probabilities.size());
            if (depths[i] == limit) {
                depths[i++] = 0;
                continue;
            }
            ++depths[i];
            found.push_back(figures(depths));
            i = 0;
        }
        return found;
    }

    std::pair<DepthChoice, std::vector<int32_t>> chosen() const {
        std::vector<int32_t> depths(rows.size(), -1);
        return {choose_depths(costs, rows, max_drafts, depths, floor_of_others), depths};
    }
};

Choice random_choice(Random& random) {
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
    return choice;
}

void depths_are_the_best(uint64_t seed) {
    Random random(seed);
    Choice choice = random_choice(random);
    const auto [chosen, depths] = choice.chosen();
    const double best = std::ranges::max(choice.all(), {}, &Figures::rate).rate;
    TS_CHECK(std::abs(choice.figures(depths).rate - best) <= 1e-9 * best);
    TS_CHECK(std::abs(chosen.tokens / chosen.seconds - best) <= 1e-9 * best);
    TS_CHECK(chosen.held == 1);
    // Floors that are held by these depths anyway.
    for (DraftRow& row : choice.rows) row.floor = 0.999 / chosen.seconds;
    choice.floor_of_others = 0.999 / chosen.seconds;
    const auto [same, same_depths] = choice.chosen();
    TS_CHECK(same_depths == depths && same.held == 1);
    TS_CHECK(same.tokens == chosen.tokens && same.seconds == chosen.seconds);
}

// Floors from such as are held without drafts to such as hardly any depths hold, or none.
// Returns the share of the most tokens per second that there are at such floors.
double floors_are_held(uint64_t seed, std::array<int, 3>* num_kinds) {
    Random random(seed);
    Choice choice = random_choice(random);
    const double plain_rate = 1 / choice.costs.base_seconds;
    for (DraftRow& row : choice.rows) {
        row.floor = below(random, 3) > 0 ? (0.5 + uniform(random)) * plain_rate : 0;
    }
    if (below(random, 2) == 0) choice.floor_of_others = (0.5 + uniform(random) / 2) * plain_rate;
    const auto [chosen, depths] = choice.chosen();
    const Figures got = choice.figures(depths);
    const std::vector<Figures> all = choice.all();
    const double held = std::ranges::max(all, {}, &Figures::held).held;
    constexpr double kNearly = 1e-4;
    TS_CHECK(got.held >= held * (1 - kNearly) && (held < 1 || got.held >= 1 - 1e-9));
    TS_CHECK(std::abs(chosen.held - got.held) <= 1e-9);
    TS_CHECK(std::abs(chosen.tokens / chosen.seconds - got.rate) <= 1e-9 * got.rate);
    double best = 0, free = 0;
    for (const Figures& figures : all) {
        free = std::max(free, figures.rate);
        if (figures.held >= got.held) best = std::max(best, figures.rate);
    }
    ++(*num_kinds)[held < 1 ? 2 : best < free];
    TS_CHECK(got.rate >= 0.7 * best);
    return got.rate / best;
}

// Floors that cost something, or cannot be held, are as many as others.
void floors_of_all_kinds_are_held() {
    std::array<int, 3> num_kinds{};
    double sum = 0;
    for (uint64_t seed = 0; seed < 3000; ++seed) sum += floors_are_held(seed, &num_kinds);
    std::printf("floors: %d free, %d that cost, %d beyond reach; %.4f of the most tokens\n",
                num_kinds[0], num_kinds[1], num_kinds[2], sum / 3000);
    TS_CHECK(std::ranges::min(num_kinds) > 300);
    TS_CHECK(sum / 3000 > 0.998);
}

// A step of 10 ms, each draft 1 ms.
DraftCosts costs_by_hand(double rows) {
    StepTimeOptions options;
    options.prior = {};
    options.prior[kStep] = 10e-3, options.prior[kVerifyTokens] = 1e-3;
    return {StepTimeModel(options), {1, rows}, {}};
}

// What a stream has in hand and what is proposed for it count together.
void rows_of_one_stream_count_together() {
    const std::vector<double> sure = {0.9, 0.9, 0.9}, poor = {0.05};
    std::vector<DraftRow> rows = {{sure, false, 250}, {sure, false, 250, true}, {poor, false, 70}};
    std::vector<int32_t> depths(3);
    const DepthChoice choice = choose_depths(costs_by_hand(3), rows, 100, depths);
    TS_CHECK(choice.held == 1 && depths[0] + depths[1] == 4 && depths[2] == 0);
    rows[1].again = false;
    TS_CHECK(choose_depths(costs_by_hand(3), rows, 100, depths).held < 1);
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

void limits_are_kept(uint64_t seed, bool paced) {
    Random random(seed);
    StepTimeModel times(StepTimeOptions{});
    Acceptance acceptance({.num_drafters = 2});
    DepthPolicy policy(&times, &acceptance, {16, 2});
    for (int step = 0; step < 300; ++step) {
        const auto size = static_cast<size_t>(below(random, 12));
        std::vector<uint64_t> ids(size);
        std::vector<int32_t> drafters(size), matches(size), limits(size), depths(size, -1);
        std::array<bool, 12> proposes{};
        std::vector<Rival> rivals(below(random, 2) * size);
        for (size_t i = 0; i < size; ++i) {
            ids[i] = random() % 6;
            drafters[i] = below(random, 2);
            matches[i] = below(random, 100) - 1;
            limits[i] = below(random, 3) == 0 ? 0 : below(random, 200);
            proposes[i] = drafters[i] == 1;
        }
        for (Rival& rival : rivals) rival = {0, below(random, 100), below(random, 40)};
        const int max_drafts = below(random, 50);
        const Features base = random_step(random);
        std::vector<double> floors(paced ? size : 0);
        for (double& floor : floors) floor = below(random, 2) * uniform(random) * 100;
        const double floor_of_others = floors.empty() ? 0 : floors[0];
        policy.choose(base,
                      {ids, drafters, matches, limits, std::span(proposes).first(size), rivals,
                       floors, floor_of_others},
                      max_drafts, depths);
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
    for (uint64_t seed = 0; seed < 10; ++seed)
        tokenspeed::policy::limits_are_kept(seed, seed % 2 == 1);
    tokenspeed::policy::floors_of_all_kinds_are_held();
    tokenspeed::policy::rows_of_one_stream_count_together();
    return 0;
}
