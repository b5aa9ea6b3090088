// SPDX-License-Identifier: MIT
// Pacing in a closed simulation: the real scheduler, a clock that costs of steps move, and costs
// that differ from what the model believes first, by a factor of two and by noise.
#include "policy/pacing.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "scheduler/check.h"
#include "scheduler/scheduler.h"

namespace tokenspeed::policy {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Seconds for one of each: half or twice what the model's prior says.
constexpr Features kTruth = {12e-3, 5e-4, 0, 1e-4, 2e-5, 0, 0, 0, 0};
constexpr Features kPrior = {6e-3, 1e-3, 2e-5, 5e-5, 4e-5, 0, 0, 0, 0};

struct Life {
    std::vector<double> came;  // its tokens, one entry each
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
        const uint64_t id = ++last_id_;
        std::vector<int32_t> prompt(num_prompt, static_cast<int32_t>(id));
        NewRequest request;
        request.id = id;
        request.prompt = prompt;
        request.max_tokens = max_tokens;
        request.user = user;
        request.terms = terms;
        scheduler_->submit(request);
        lives_[id].asked_s = now_s;
        return id;
    }

    void step() {
        tell_time();
        const auto plan = scheduler_->next_plan();
        if (plan.empty()) {
            now_s += 1e-3;
            return;
        }
        plans.emplace_back(plan.begin(), plan.end());
        const Features x = features(plan);
        double cost_s = 0;
        for (int i = 0; i < kNumFeatures; ++i) cost_s += x[i] * kTruth[i] * slowness;
        cost_s *= 1 + setting_.noise * (2 * std::uniform_real_distribution<double>()(random_) - 1);
        now_s += cost_s;
        times_.observe(x, cost_s);
        tell_time();
        commit(plan);
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

    const Life& life(uint64_t id) const { return lives_.at(id); }
    const std::map<uint64_t, Life>& lives() const { return lives_; }
    Pacing& pacing() { return pacing_; }
    Scheduler& scheduler() { return *scheduler_; }

    double now_s = 0;
    double slowness = 1;
    std::vector<std::vector<int32_t>> plans;

  private:
    static SchedulerOptions options(const Setting& setting) {
        SchedulerOptions o;
        o.num_pages = setting.num_pages;
        o.page_size = 16;
        o.max_num_seqs = setting.max_num_seqs;
        o.max_num_batched_tokens = 2048;
        o.max_model_len = 131072;
        return o;
    }
    void tell_time() { scheduler_->advance(static_cast<TimeUs>(now_s * 1e6)); }

    static Features features(std::span<const int32_t> plan) {
        Features x{1};
        for (int32_t i = 0; i < plan[kPlanHeaderNumRows]; ++i) {
            const int32_t* row = plan.data() + kPlanHeaderWords + i * kRowWords;
            const bool prefill = (row[kRowFlags] & kRowPrefill) != 0;
            x[prefill ? kPrefillTokens : kDecodeRows] += prefill ? row[kRowNumTokens] : 1;
            x[kContextThousands] += (row[kRowStart] + row[kRowNumTokens]) / 1000.0;
        }
        return x;
    }

    void commit(std::span<const int32_t> plan) {
        const int32_t num_rows = plan[kPlanHeaderNumRows];
        std::vector<int32_t> result(kResultHeaderWords), ids;
        for (int32_t i = 0; i < num_rows; ++i) {
            const int32_t* row = plan.data() + kPlanHeaderWords + i * kRowWords;
            const bool samples = (row[kRowFlags] & kRowSample) != 0;
            for (int32_t word : {row[kRowSlot], int32_t{kRowOk}, int32_t{samples}}) {
                result.push_back(word);
            }
            if (samples) ids.push_back(static_cast<int32_t>(random_() % 1000));
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
            life.came.insert(life.came.end(), updates.num_ids[i], now_s);
            life.over = updates.finish[i] != 0;
        }
    }

    Setting setting_;
    std::mt19937_64 random_;
    StepTimeModel times_;
    Pacing pacing_;
    std::unique_ptr<Scheduler> scheduler_;  // dies before the pacing
    std::map<uint64_t, Life> lives_;
    uint64_t last_id_ = 0;
};

// The fewest tokens in any window of one second in [from_s, to_s].
int64_t fewest_in_a_second(const std::vector<double>& came, double from_s, double to_s) {
    int64_t fewest = std::numeric_limits<int64_t>::max();
    // The emptiest windows begin right behind a token, or at the start.
    std::vector<double> begins = {from_s};
    for (double t : came) {
        if (t >= from_s) begins.push_back(t);
    }
    for (double begin : begins) {
        if (begin + 1 > to_s) continue;
        const auto first = std::ranges::upper_bound(came, begin);
        const auto last = std::ranges::upper_bound(came, begin + 1);
        fewest = std::min<int64_t>(fewest, last - first);
    }
    return fewest;
}

constexpr int kStreams = 8;
constexpr int32_t kLong = 100'000;

std::vector<uint64_t> start_streams(Machine& machine) {
    std::vector<uint64_t> ids;
    for (int i = 0; i < kStreams; ++i) ids.push_back(machine.submit(500, 100'000));
    machine.run_until(5);
    return ids;
}

// Tokens per second of a stream among eight, with nothing else going on.
double unloaded_rate() {
    Machine machine({.noise = 0});
    const uint64_t first = start_streams(machine)[0];
    const auto before = machine.life(first).came.size();
    machine.run_until(15);
    return static_cast<double>(machine.life(first).came.size() - before) / 10;
}

struct Found {
    int64_t fewest;    // of any stream in any second from the newcomer's arrival on
    double prefill_s;  // of the newcomer; infinite: it had no token in 200 s
};

Found long_prompt_arrives(const Setting& setting) {
    Machine machine(setting);
    const std::vector<uint64_t> ids = start_streams(machine);
    const uint64_t newcomer = machine.submit(kLong, 100);
    const double came_s = machine.now_s;
    const bool over = machine.finish(newcomer, came_s + 200);
    Found found{std::numeric_limits<int64_t>::max(), kNever};
    if (over) found.prefill_s = machine.life(newcomer).came[0] - came_s;
    for (uint64_t id : ids) {
        found.fewest = std::min(found.fewest,
                                fewest_in_a_second(machine.life(id).came, came_s, machine.now_s));
    }
    return found;
}

void test_floors_hold_while_a_long_prompt_arrives() {
    const double floor = 0.6 * unloaded_rate();
    for (const double noise : {0.0, 0.1, 0.2, 0.3}) {
        for (uint64_t seed = 1; seed <= 4; ++seed) {
            const Found found =
                long_prompt_arrives({.tps_floor = floor, .noise = noise, .seed = seed});
            std::printf("floor %.1f noise %.1f: fewest %ld, first token after %.1f s\n", floor,
                        noise, static_cast<long>(found.fewest), found.prefill_s);
            TS_CHECK(static_cast<double>(found.fewest) >= floor);
            TS_CHECK(found.prefill_s < 100'000 * kTruth[kPrefillTokens] * 5);
        }
    }
    const Found unpaced = long_prompt_arrives({});
    std::printf("no pacing: fewest %ld\n", static_cast<long>(unpaced.fewest));
    TS_CHECK(static_cast<double>(unpaced.fewest) < 0.25 * floor);
}

// The machine gets so slow that no floor can hold: the newcomer ends all the same.
void test_prompts_get_their_least_share() {
    Machine machine({.tps_floor = 40, .noise = 0});
    start_streams(machine);
    const uint64_t newcomer = machine.submit(4000, 10);
    machine.run_until(machine.now_s + 0.05);  // it is admitted
    machine.slowness = 4;
    const double from_s = machine.now_s;
    TS_CHECK(machine.finish(newcomer, from_s + 200));
    TS_CHECK(machine.pacing().num_forced() > 10);
    const double prefill_s = machine.life(newcomer).came[0] - from_s;
    const double cost_s = 4000 * kTruth[kPrefillTokens] * 4;
    TS_CHECK(prefill_s > 3 * cost_s && prefill_s < cost_s / Pacing::kLeastShare * 1.5);
}

// Short prompts pass a long one that waits with them, but not for ever.
void test_short_before_long_and_nothing_starves() {
    Machine machine({.tps_floor = 20, .noise = 0, .max_num_seqs = 9});
    start_streams(machine);
    const uint64_t running = machine.submit(600, 200);  // takes the last slot
    machine.run_until(machine.now_s + 0.5);
    const uint64_t longer = machine.submit(20'000, 5);
    machine.run_until(machine.now_s + 0.1);
    const uint64_t shorter = machine.submit(100, 5);
    TS_CHECK(machine.finish(shorter, machine.now_s + 60));
    TS_CHECK(machine.life(running).over && machine.life(longer).came.empty());
    // From now on there is always a short one that waits, and came a moment ago.
    const double from_s = machine.now_s;
    std::vector<uint64_t> last;
    while (machine.life(longer).came.empty() && machine.now_s < from_s + 120) {
        std::erase_if(last, [&](uint64_t id) { return machine.life(id).over; });
        while (last.size() < 3) last.push_back(machine.submit(100, 5));
        machine.step();
    }
    TS_CHECK(!machine.life(longer).came.empty());
    std::printf("a long prompt among short ones: %.1f s\n", machine.now_s - from_s);
}

void test_priorities_and_users() {
    Machine machine({.tps_floor = 20, .noise = 0, .max_num_seqs = 8});
    const std::vector<uint64_t> ids = start_streams(machine);
    const uint64_t flex = machine.submit(100, 20, {.tps_floor = 0, .priority = 10}, 1);
    std::vector<uint64_t> flood;
    for (int i = 0; i < 30; ++i) flood.push_back(machine.submit(100, 20, {}, 2));
    const uint64_t other = machine.submit(100, 20, {}, 3);
    const uint64_t sooner = machine.submit(3000, 20, {.priority = -10}, 4);
    machine.abort(ids[0]);
    TS_CHECK(machine.finish(sooner, machine.now_s + 60));
    for (uint64_t id : flood) TS_CHECK(machine.life(id).came.empty());
    TS_CHECK(machine.finish(other, machine.now_s + 60));
    const auto served =
        std::ranges::count_if(flood, [&](uint64_t id) { return !machine.life(id).came.empty(); });
    TS_CHECK(served <= 3);
    TS_CHECK(machine.finish(flex, machine.now_s + 600));
    for (uint64_t id : flood) TS_CHECK(machine.life(id).over);
}

// Requests come three times as fast as they can be served: who runs has its floor.
void test_overload() {
    const double floor = 20;
    Machine machine({.tps_floor = floor, .noise = 0.1, .max_wait_s = 3});
    std::mt19937_64 random(7);
    int64_t num_refused = 0;
    double next_s = 1;
    while (machine.now_s < 120) {
        while (next_s < machine.now_s) {
            const auto length = static_cast<int32_t>(200 + random() % 3000);
            const uint64_t id = machine.submit(length, 200);
            next_s += 0.05;
            if (!machine.pacing().hopeless(id)) continue;
            TS_CHECK(machine.pacing().retry_after_s(id) >= Pacing::kLeastRetryS);
            machine.abort(id);
            ++num_refused;
        }
        for (uint64_t id : machine.pacing().overdue()) {
            TS_CHECK(machine.life(id).came.empty());
            TS_CHECK(machine.now_s - machine.life(id).asked_s > 3);
            machine.abort(id);
            ++num_refused;
        }
        machine.step();
    }
    int64_t num_served = 0, num_seconds = 0, num_below = 0;
    double longest_wait_s = 0;
    for (const auto& [id, life] : machine.lives()) {
        if (life.came.empty()) continue;
        ++num_served;
        longest_wait_s = std::max(longest_wait_s, life.came[0] - life.asked_s);
        for (double begin = life.came[0]; begin + 1 <= life.came.back(); begin += 0.25) {
            ++num_seconds;
            num_below +=
                static_cast<double>(fewest_in_a_second(life.came, begin, begin + 1)) < floor - 1;
        }
    }
    std::printf(
        "overload: %ld served, %ld refused, %ld of %ld seconds below, first token after at "
        "most %.1f s\n",
        static_cast<long>(num_served), static_cast<long>(num_refused), static_cast<long>(num_below),
        static_cast<long>(num_seconds), longest_wait_s);
    TS_CHECK(num_served > 100 && num_refused > 500);
    TS_CHECK(num_below * 100 <= num_seconds);
}

bool refused(Machine& machine, const Terms& terms) {
    try {
        machine.submit(10, 10, terms);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_bad_floors_are_refused() {
    Machine machine({.tps_floor = 20});
    for (const double floor : {-1.0, 1e6, kNever, std::nan("")}) {
        TS_CHECK(refused(machine, {.tps_floor = floor}));
    }
    TS_CHECK(refused(machine, {.max_wait_us = -1}));
    TS_CHECK(!machine.scheduler().has_work() && machine.pacing().streams().empty());
    Machine unpaced({});
    TS_CHECK(refused(unpaced, {.tps_floor = 5}) && refused(unpaced, {.max_wait_us = 5}));
    TS_CHECK(!refused(unpaced, {.tps_floor = 0, .priority = 3}));
}

void test_a_hopeless_floor_is_none() {
    Machine machine({.tps_floor = 20, .noise = 0});
    start_streams(machine);
    const uint64_t id = machine.submit(100, 20, {.tps_floor = 9000});
    TS_CHECK(machine.finish(id, machine.now_s + 10));
    TS_CHECK(machine.pacing().num_unmeetable() == 1);
    TS_CHECK(machine.pacing().last_unmeetable() == 9000);
}

// The same events give the same plans.
void test_replay() {
    const auto plans = [] {
        Machine machine({.tps_floor = 36});
        start_streams(machine);
        machine.submit(20'000, 10);
        machine.run_until(15);
        return machine.plans;
    };
    TS_CHECK(plans() == plans());
}

// Few pages, anything at any time: no invariant breaks, and all ends.
void test_at_random() {
    for (uint64_t seed = 1; seed <= 20; ++seed) {
        Machine machine({.tps_floor = 30, .seed = seed, .num_pages = 80, .max_num_seqs = 6});
        std::mt19937_64 random(seed);
        std::vector<uint64_t> ids;
        for (int i = 0; i < 400; ++i) {
            if (random() % 6 == 0) {
                const std::optional<double> floors[] = {std::nullopt, 0, 10, 45, 5000};
                const Terms terms{floors[random() % 5], std::nullopt,
                                  static_cast<int32_t>(random() % 3)};
                ids.push_back(machine.submit(static_cast<int32_t>(1 + random() % 900),
                                             static_cast<int32_t>(1 + random() % 200), terms,
                                             random() % 3));
            }
            if (!ids.empty() && random() % 40 == 0) machine.abort(ids[random() % ids.size()]);
            machine.step();
            const std::string broken = machine.scheduler().broken_invariant();
            if (!broken.empty()) std::puts(broken.c_str());
            TS_CHECK(broken.empty());
        }
        for (uint64_t id : ids) TS_CHECK(machine.finish(id, machine.now_s + 2000));
        TS_CHECK(machine.pacing().streams().empty());
    }
}

}  // namespace
}  // namespace tokenspeed::policy

int main() {
    using namespace tokenspeed::policy;
    test_bad_floors_are_refused();
    test_a_hopeless_floor_is_none();
    test_short_before_long_and_nothing_starves();
    test_priorities_and_users();
    test_prompts_get_their_least_share();
    test_overload();
    test_replay();
    test_at_random();
    test_floors_hold_while_a_long_prompt_arrives();
    std::puts("ok");
}
