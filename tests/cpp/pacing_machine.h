// SPDX-License-Identifier: MIT
// Pacing in a closed simulation: the real scheduler, a clock that costs of steps move, and costs
// that differ from what the model believes first, by a factor of two and by noise. Steps may
// overlap, and rows may carry drafts, all the same or as many as a policy chooses.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "device.h"
#include "policy/pacing.h"
#include "policy/policy.h"
#include "scheduler/check.h"
#include "scheduler/scheduler.h"

namespace tokenspeed::policy {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Seconds for one of each: half or twice what the model's prior says.
constexpr Features kTruth = {12e-3, 5e-4, 1e-4, 1e-4, 2e-5, 0, 0, 0, 0, 0, 0};
constexpr Features kPrior = {6e-3, 1e-3, 2e-5, 5e-5, 4e-5, 0, 0, 0, 0, 0, 0};
constexpr int32_t kMostTokens = 2048;  // of a step
constexpr int32_t kDraftId = 1000;     // whatever is not accepted is below

// Whose drafts have which depths.
enum class Depths {
    kFixed,       // of all, as deep as can be
    kChosen,      // of every other stream, as the policy chooses
    kUnderFloors  // ... and is told of floors
};

struct Life {
    std::vector<double> came;  // its tokens, one entry each
    int32_t depth = 0;         // of its latest draft
    double asked_s = 0;
    bool over = false;
};

struct Setting {
    double tps_floor = 0;  // 0: no pacing
    double noise = 0.1;    // of a step's time, at most
    uint64_t seed = 1;
    int32_t num_pages = 12000;
    int32_t max_num_seqs = 64;
    double max_wait_s = kNever;
    int32_t overlap_depth = 0;
    int32_t num_draft = 0;  // in each row
    double accepted = 0.7;  // of drafts, if those before them are
    Depths depths = Depths::kFixed;
};

class Machine {
  public:
    explicit Machine(const Setting& setting)
        : setting_(setting),
          random_(setting.seed),
          times_({.prior = kPrior}),
          pacing_(&times_, {setting.tps_floor, setting.max_wait_s, setting.max_num_seqs, {}}),
          scheduler_(std::make_unique<Scheduler>(options(setting), HashKey{})) {
        if (setting.tps_floor > 0) scheduler_->pace(&pacing_);
    }

    uint64_t submit(int32_t num_prompt, int32_t max_tokens, const Terms& terms = {},
                    uint64_t user = 0) {
        const uint64_t id = last_id_ + 1;
        return submit(std::vector<int32_t>(num_prompt, static_cast<int32_t>(id)), max_tokens, terms,
                      user);
    }
    uint64_t submit(const std::vector<int32_t>& prompt, int32_t max_tokens, const Terms& terms = {},
                    uint64_t user = 0) {
        const uint64_t id = ++last_id_;
        NewRequest request;
        request.id = id;
        request.prompt = prompt;
        request.max_tokens = max_tokens;
        request.user = user;
        request.terms = terms;
        tell_time();
        scheduler_->submit(request);
        lives_[id].asked_s = now_s;
        return id;
    }

    // As the engine does it: one more step is launched, and as many are committed as are due.
    void step() {
        propose();
        tell_time();
        const auto plan = scheduler_->next_plan();
        if (plan.empty() && flights_.empty()) {
            now_s += 1e-3;
            return;
        }
        if (!plan.empty()) launch(plan);
        const size_t most = plan.empty() ? flights_.size() - 1 : setting_.overlap_depth;
        while (flights_.size() > most) commit_oldest();
        now_s += idle_s;
    }

    void run_until(double end_s) {
        while (now_s < end_s) step();
    }
    bool finish(uint64_t id, double end_s) {
        while (!lives_.at(id).over && now_s < end_s) step();
        return lives_.at(id).over;
    }
    void abort(uint64_t id) {
        scheduler_->abort(id);
        lives_.at(id).over = true;
    }
    void leap(double seconds) { clock_s_ += seconds; }  // of the clock alone

    const Life& life(uint64_t id) const { return lives_.at(id); }
    const std::map<uint64_t, Life>& lives() const { return lives_; }
    Pacing& pacing() { return pacing_; }
    Scheduler& scheduler() { return *scheduler_; }

    double now_s = 0;  // whole microseconds
    double slowness = 1;
    double idle_s = 0;  // between steps; no model knows of it
    std::vector<std::vector<int32_t>> plans;

  private:
    static constexpr int32_t kPageSize = 16;

    struct Slot {
        uint64_t request = 0;
        std::map<int, int32_t> pages;
    };
    struct Flight {
        Features features;
        double cost_s, end_s;
    };

    static SchedulerOptions options(const Setting& setting) {
        SchedulerOptions o;
        o.num_pages = setting.num_pages;
        o.page_size = kPageSize;
        o.max_num_seqs = setting.max_num_seqs;
        o.max_num_batched_tokens = kMostTokens;
        o.max_model_len = 131072;
        o.overlap_depth = setting.overlap_depth;
        return o;
    }
    static double whole(double seconds) { return std::round(seconds * 1e6) * 1e-6; }
    void tell_time() {
        scheduler_->advance(static_cast<TimeUs>(std::llround((now_s + clock_s_) * 1e6)));
    }

    void propose() {
        if (setting_.num_draft == 0) return;
        if (setting_.depths != Depths::kFixed) return propose_what_pays();
        const std::vector<int32_t> draft(setting_.num_draft, kDraftId);
        for (const auto& [id, life] : lives_) {
            if (!life.over) scheduler_->speculate(id, draft, 0);
        }
    }

    void propose_what_pays() {
        std::vector<uint64_t> ids;
        for (const auto& [id, life] : lives_) {
            if (!life.over && !life.came.empty() && id % 2 == 0) ids.push_back(id);
        }
        if (ids.empty()) return;
        const size_t size = ids.size();
        const std::vector<int32_t> drafters(size), matches(size), limits(size, setting_.num_draft);
        const std::array<bool, 64> in_hand{};
        TS_CHECK(size <= in_hand.size());
        std::vector<double> floors = pacing_.least_rates(ids);
        if (setting_.depths == Depths::kChosen) floors.assign(size + 1, 0);
        std::vector<int32_t> depths(size);
        policy_.choose(base_,
                       {ids,
                        drafters,
                        matches,
                        limits,
                        std::span(in_hand).first(size),
                        {},
                        std::span(floors).first(size),
                        floors[size]},
                       kMostTokens, depths);
        for (size_t i = 0; i < size; ++i) {
            lives_.at(ids[i]).depth = depths[i];
            scheduler_->speculate(ids[i], std::vector<int32_t>(depths[i], kDraftId), 0);
        }
    }

    // What a device must know of each row: whose it is, and all its pages.
    void check_tables(std::span<const int32_t> words) {
        const PlanView plan(words);
        for (int i = 0; i < plan.num_binds(); ++i) {
            TS_CHECK(!lives_.at(plan.request(i)).over);
            slots_[plan.bind(i)[0]] = {plan.request(i), {}};
        }
        for (int i = 0; i < plan.num_deltas(); ++i) {
            slots_.at(plan.delta(i)[1]).pages[plan.delta(i)[2]] = plan.delta(i)[3];
        }
        for (int i = 0; i < plan.num_rows(); ++i) {
            const int32_t* row = plan.row(i);
            const Slot& slot = slots_.at(row[kRowSlot]);
            TS_CHECK(!lives_.at(slot.request).over);
            const int num_pages = (row[kRowStart] + row[kRowNumTokens] - 1) / kPageSize + 1;
            for (int page = 0; page < num_pages; ++page) TS_CHECK(slot.pages.contains(page));
        }
    }

    void launch(std::span<const int32_t> plan) {
        check_tables(plan);
        plans.emplace_back(plan.begin(), plan.end());
        const Features x = features(plan);
        double cost_s = 0;
        for (int i = 0; i < kNumFeatures; ++i) cost_s += x[i] * kTruth[i] * slowness;
        cost_s *= 1 + setting_.noise * (2 * std::uniform_real_distribution<double>()(random_) - 1);
        const double start_s = flights_.empty() ? now_s : std::max(now_s, flights_.back().end_s);
        flights_.push_back({x, cost_s, whole(start_s + cost_s)});
        base_ = {1, x[kDecodeRows] + x[kPrefills], 0, 0, x[kContextThousands]};
    }

    void commit_oldest() {
        const Flight flight = flights_.front();
        now_s = std::max(now_s, flight.end_s);
        times_.observe(flight.features, flight.cost_s);
        tell_time();
        commit(plans[plans.size() - flights_.size()]);
        flights_.pop_front();
    }

    static Features features(std::span<const int32_t> plan) {
        Features x{1};
        for (int32_t i = 0; i < plan[kPlanHeaderNumRows]; ++i) {
            const int32_t* row = plan.data() + kPlanHeaderWords + i * kRowWords;
            const bool prefill = (row[kRowFlags] & kRowPrefill) != 0;
            x[prefill ? kPrefillTokens : kDecodeRows] += prefill ? row[kRowNumTokens] : 1;
            x[kVerifyTokens] += row[kRowNumDraft];
            x[kVerifies] = x[kVerifyTokens] > 0;
            x[kContextThousands] += (row[kRowStart] + row[kRowNumTokens]) / 1000.0;
            if (!prefill) continue;
            x[kPrefills] += 1;
            x[kPrefillContext] += pairs(row[kRowStart], row[kRowNumTokens]);
        }
        return x;
    }

    int32_t num_accepted(const int32_t* row) {
        int32_t count = 0;
        while (count < row[kRowNumDraft] &&
               std::uniform_real_distribution<double>()(random_) < setting_.accepted) {
            ++count;
        }
        return count;
    }

    void commit(std::span<const int32_t> plan) {
        const int32_t num_rows = plan[kPlanHeaderNumRows];
        std::vector<int32_t> result(kResultHeaderWords), ids;
        for (int32_t i = 0; i < num_rows; ++i) {
            const int32_t* row = plan.data() + kPlanHeaderWords + i * kRowWords;
            const bool samples = (row[kRowFlags] & kRowSample) != 0;
            const int32_t num_drafts = samples ? num_accepted(row) : 0;
            for (int32_t word : {row[kRowSlot], int32_t{kRowOk}, num_drafts + samples}) {
                result.push_back(word);
            }
            ids.insert(ids.end(), num_drafts, kDraftId);
            if (samples) ids.push_back(static_cast<int32_t>(random_() % kDraftId));
        }
        result.insert(result.end(), ids.begin(), ids.end());
        result[kResultHeaderMagic] = kResultMagic;
        result[kResultHeaderVersion] = kLayoutVersion;
        result[kResultHeaderTotalWords] = static_cast<int32_t>(result.size());
        result[kResultHeaderStepLow] = plan[kPlanHeaderStepLow];
        result[kResultHeaderStepHigh] = plan[kPlanHeaderStepHigh];
        result[kResultHeaderNumRows] = num_rows;
        result[kResultHeaderNumIds] = static_cast<int32_t>(ids.size());
        const Updates& updates = scheduler_->commit(result);
        for (size_t i = 0; i < updates.request_ids.size(); ++i) {
            Life& life = lives_.at(updates.request_ids[i]);
            const int32_t hits = updates.num_ids[i] - 1;
            if (hits >= 0 && !life.came.empty()) {
                acceptance_.observe(updates.request_ids[i], 0, 0, hits, hits < life.depth);
            }
            life.came.insert(life.came.end(), updates.num_ids[i], now_s);
            life.over = updates.finish[i] != 0;
        }
    }

    Setting setting_;
    std::mt19937_64 random_;
    StepTimeModel times_;
    Acceptance acceptance_{{}};
    DepthPolicy policy_{&times_, &acceptance_, {}};
    Features base_{};  // of the latest step, without its drafts
    Pacing pacing_;
    std::unique_ptr<Scheduler> scheduler_;  // dies before the pacing
    std::map<uint64_t, Life> lives_;
    std::map<int32_t, Slot> slots_;
    std::deque<Flight> flights_;
    double clock_s_ = 0;  // what the clock shows beyond `now_s`
    uint64_t last_id_ = 0;
};

// Tokens in the second behind `begin`.
inline int64_t num_within_a_second(const std::vector<double>& came, double begin) {
    constexpr double kRounding = 1e-9;  // of times, which are whole microseconds
    return std::ranges::upper_bound(came, begin + 1 + kRounding) -
           std::ranges::upper_bound(came, begin + kRounding);
}

// The fewest tokens in any window of one second in [from_s, to_s].
inline int64_t fewest_in_a_second(const std::vector<double>& came, double from_s, double to_s) {
    int64_t fewest = std::numeric_limits<int64_t>::max();
    // The emptiest windows begin right behind a token, or at the start.
    std::vector<double> begins = {from_s};
    for (double t : came) {
        if (t >= from_s) begins.push_back(t);
    }
    for (double begin : begins) {
        if (begin + 1 <= to_s) fewest = std::min(fewest, num_within_a_second(came, begin));
    }
    return fewest;
}

constexpr int kStreams = 8;
constexpr int32_t kLong = 100'000;

inline std::vector<uint64_t> start_streams(Machine& machine) {
    std::vector<uint64_t> ids;
    for (int i = 0; i < kStreams; ++i) ids.push_back(machine.submit(500, 100'000));
    machine.run_until(5);
    return ids;
}

// Tokens of prompts in a step.
inline int32_t num_prefill(const std::vector<int32_t>& plan) {
    int32_t count = 0;
    for (int32_t i = 0; i < plan[kPlanHeaderNumRows]; ++i) {
        const int32_t* row = plan.data() + kPlanHeaderWords + i * kRowWords;
        count += (row[kRowFlags] & kRowPrefill) != 0 ? row[kRowNumTokens] : 0;
    }
    return count;
}

}  // namespace tokenspeed::policy
